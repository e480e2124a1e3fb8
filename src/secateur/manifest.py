"""``manifest.json``: size and SHA-256 of every file of an output folder, so that damage and changes show."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from secateur.errors import OutputError, SecateurError
from secateur.files import write_text
from secateur.reading import is_plain_name, read_json

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
_CHUNK_BYTES = 1 << 20


def write_manifest(folder: str | Path, known: Mapping[str, str] | None = None) -> None:
    """Write ``manifest.json``, the last file of an output folder. Raises OutputError.

    It maps the path of every other file below the folder (relative, with ``/``, sorted) to its size and SHA-256.
    ``known`` are hashes by path that were taken while the file was written; the others are read for theirs.
    """
    folder, known = Path(folder), known or {}
    try:
        files = {
            name: {"bytes": (folder / name).stat().st_size, "sha256": known.get(name) or sha256(folder / name)}
            for name in listed(folder)
        }
    except OSError as error:
        raise OutputError(f"can't read {folder} for its manifest: {error.strerror or error}") from error
    document = {"version": MANIFEST_VERSION, "files": files}
    write_text(folder / MANIFEST, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def read_manifest(folder: str | Path) -> dict[str, tuple[int, str]] | None:
    """Path → (size in bytes, SHA-256), or None for a folder without a manifest. Raises SecateurError."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    document = read_json(path, SecateurError)
    if not isinstance(document, dict) or document.get("version") != MANIFEST_VERSION:
        raise SecateurError(f"{path} is no manifest that this secateur knows")
    files = document.get("files")
    if not isinstance(files, dict) or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise SecateurError(f"{path} is not a valid manifest: an entry has no path within the folder, size and SHA-256")
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}


def listed(folder: Path) -> list[str]:
    """Every file below ``folder`` except the manifest itself, as sorted POSIX paths."""
    names = [
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    ]
    return sorted(name for name in names if name != MANIFEST)


def sha256(path: Path) -> str:
    """The hash of a file as hexadecimal digits; read in pieces. Raises OSError."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


def _is_entry(name: str, entry: Any) -> bool:
    return (
        all(is_plain_name(part) for part in name.split("/"))
        and str(PurePosixPath(name)) == name
        and isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
        and re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]) is not None
    )
