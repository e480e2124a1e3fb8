"""Writing without leaving anything half done."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from secateur.errors import OutputError


def check_output(folder: str | Path, overwrite: bool = False) -> None:
    """Refuse an output that exists, before any work starts. Raises OutputError."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; give a folder that doesn't exist yet")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(f"{folder} exists and is not empty: choose another folder, or pass --overwrite")


@contextmanager
def output_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of ``folder`` that takes its name when the block ends well, and vanishes otherwise.

    An existing folder is replaced only at the very end and only with ``overwrite``.
    Raises OutputError when the output exists or the disk is full.
    """
    folder = Path(folder)
    check_output(folder, overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    except OSError as error:
        raise OutputError(f"can't write to {folder}: {error.strerror or error}") from None
    try:
        yield temporary
        _open_to_others(temporary)
        _replace(temporary, folder)
    except OSError as error:
        raise OutputError(f"can't write {folder}: {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file under a temporary name and rename it. Raises OutputError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf8")
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"can't write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def _replace(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(temporary, folder)
        return
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def _open_to_others(folder: Path) -> None:
    """Give everything the usual permissions; temporary folders and safetensors files are made private."""
    mask = _umask()
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
