"""Reading small files that somebody else wrote: bounded in size and depth, and never from outside their folder."""

from __future__ import annotations

import json
import ntpath
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError

# the index of a checkpoint of a million tensors has this size; real ones are a hundredth of it
MAX_JSON_BYTES = 100_000_000


def read_bytes(path: str | Path, limit: int, error: type[SecateurError]) -> bytes:
    """The content of a regular file of at most ``limit`` bytes. Raises ``error``, and OSError as it comes."""
    path = Path(path)
    if not path.is_file():
        path.stat()  # a missing file says so; a pipe or a device would be read for ever
        raise error(f"{path} is no regular file")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise error(f"{path} has more than {limit // 1000:,} kB; no file of this kind is that large")
    return data


def read_json(path: str | Path, error: type[SecateurError], limit: int = MAX_JSON_BYTES) -> Any:
    """The value that a JSON file holds. Raises ``error`` when it is unreadable, too large, too deep or no JSON."""
    try:
        return json.loads(read_bytes(path, limit, error).decode("utf8"))
    except OSError as problem:
        raise error(f"can't read {path}: {problem.strerror or problem}") from None
    except RecursionError:
        raise error(f"{path} is nested too deeply") from None
    except ValueError as problem:
        raise error(f"{path} is not valid JSON: {problem}") from None


def is_plain_name(name: Any) -> bool:
    """True for the name of a file that lies directly in its folder, on every operating system."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and "\0" not in name
        and ntpath.basename(name) == name
        and not ntpath.splitdrive(name)[0]
    )


def shown(name: Any) -> str:
    """A name out of a file as a message shows it: on one line, and not for ever."""
    text = repr(name)
    return text if len(text) <= 100 else f"{text[:60]}… ({len(text):,} characters)"


def check_links(folder: str | Path, error: type[SecateurError]) -> None:
    """Refuse symbolic links that lead out of ``folder``; the cache of the hub may point to its own blobs.

    Looked at are the files of the folder itself and of the sub-folders that a loader reads.
    """
    root = Path(folder).resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    for path in _entries(root):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
            raise error(
                f"{folder}: {path.relative_to(root)} is a link that leads out of the folder; put the file there"
            )


def _entries(root: Path) -> list[Path]:
    found = []
    for path in sorted(root.iterdir()):
        # links to other folders are common among experiments, and nothing follows them
        if not path.is_dir():
            found.append(path)
        elif path.name in ("plan", "additional_chat_templates"):
            found += [path, *sorted(path.rglob("*"))] if not path.is_symlink() else [path]
    return found
