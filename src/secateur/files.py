"""Writing without leaving anything half done."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from secateur.errors import OutputError
from secateur.remote import check_remote, is_url, place, remote_folder, upload_folder


def cache_folder() -> Path:
    """Where measurements of this machine are kept: SECATEUR_CACHE, or ``secateur`` in the user's cache folder."""
    if own := os.environ.get("SECATEUR_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur"


def check_output(folder: str | Path, overwrite: bool = False) -> None:
    """Refuse an output that exists, before any work starts. Raises OutputError, and for a URL what fsspec lacks.

    What a kill in the middle of a replacement left aside is put back first.
    """
    if is_url(folder):
        check_remote(str(folder), overwrite)
        return
    try:
        folder = Path(place(folder))
    except RuntimeError as error:  # links that lead to each other
        raise OutputError(f"can't write to {folder}: {error}") from None
    _check_place(folder)
    _put_back(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; give a folder that doesn't exist yet")
    if folder.is_dir() and Path.cwd().is_relative_to(folder.resolve()):
        raise OutputError(f"{folder} is the folder that you are in, and is replaced as a whole: give one inside of it")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(f"{folder} exists and is not empty: choose another folder, or pass --overwrite")


def check_output_file(path: Path, overwrite: bool = False) -> None:
    """Refuse a single file that exists. Raises OutputError."""
    _check_place(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file that doesn't exist yet")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists: choose another name, or pass --overwrite")


def _check_place(path: Path) -> None:
    """Refuse a path that no file or folder can be made at. Raises OutputError."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long
        raise OutputError(f"can't write to {path}: {error.strerror or error}") from None
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        raise OutputError(f"can't write to {path}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"can't write to {path}: {there} may not be written to")


@contextmanager
def output_file(path: str | Path) -> Generator[Path, None, None]:
    """A file of the same name in a temporary folder beside ``path``, which takes its place when the block ends well.

    Parents are made as needed. Raises OutputError when it can't be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".part", dir=path.parent) as folder:
            whole = Path(folder) / path.name
            yield whole
            os.replace(whole, path)
    except OSError as error:
        raise OutputError(f"can't write {path}: {error.strerror or error}") from error


@contextmanager
def output_folder(folder: str | Path, overwrite: bool = False) -> Generator[Path, None, None]:
    """A temporary sibling of ``folder`` that takes its name when the block ends well, and vanishes otherwise.

    An existing folder is replaced only at the very end and only with ``overwrite``; parents are made as needed, and
    removed again when the block fails. The files of a URL are uploaded at the end.
    Raises OutputError when the output exists or the disk is full.
    """
    if is_url(folder):
        with remote_folder(str(folder), overwrite) as temporary, _told_of_the_disk(folder):
            yield temporary
        return
    folder = Path(place(folder))
    check_output(folder, overwrite)
    with _parents(folder):
        try:
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        except OSError as error:
            raise OutputError(f"can't write to {folder}: {error.strerror or error}") from None
        try:
            with _told_of_the_disk(folder):
                yield temporary
                finish_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def finish_folder(temporary: Path, folder: str | Path) -> None:
    """Let a complete folder take its name, with the usual permissions; what has that name already is replaced.

    The files of a URL are uploaded; ``temporary`` then stays.
    """
    if is_url(folder):
        upload_folder(temporary, str(folder))
        return
    folder = Path(place(folder))
    _open_to_others(temporary)
    _replace(temporary, folder)
    sync_folder(folder.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file under a temporary name and rename it. Raises OutputError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf8")
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _told_of_the_disk(folder: str | Path) -> Generator[None, None, None]:
    try:
        yield
    except Exception as error:
        if reason := disk_error(error):
            raise OutputError(f"can't write {folder}: {reason}; nothing was left behind") from error
        raise


@contextmanager
def _parents(folder: Path) -> Generator[None, None, None]:
    """The folders above ``folder`` exist within the block; those that were missing vanish again when it fails."""
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"can't write to {folder}: {error.strerror or error}") from None
        yield
    except BaseException:
        for parent in missing:
            # somebody else may have put something there meanwhile
            with suppress(OSError):
                parent.rmdir()
        raise


def disk_error(error: Exception) -> str:
    """What the operating system said, or an empty string for an error of another kind."""
    # of a file within the output, only the reason counts: its temporary name tells the user nothing
    cause = error.__cause__ if isinstance(error, OutputError) else error
    if isinstance(cause, OSError):
        return cause.strerror or str(cause)
    # safetensors and tokenizers, written in Rust, raise exceptions of their own with this ending
    found = re.search(r"([^:]+) \(os error \d+\)$", str(cause))
    return found[1].strip() if found else ""


def _replace(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(temporary, folder)
        return
    old = _aside(folder)
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    try:
        os.replace(temporary, folder)
    except BaseException:
        os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _aside(folder: Path) -> Path:
    """Where the folder that is replaced lies until the new one has its name."""
    return folder.with_name(f".{folder.name}.old")


def _put_back(folder: Path) -> None:
    """After a kill between the two renames of a replacement the old folder is what there is."""
    if folder.name and _aside(folder).is_dir() and not folder.exists():
        with suppress(OSError):
            os.replace(_aside(folder), folder)


def _open_to_others(folder: Path) -> None:
    """Give everything the usual permissions; temporary folders and safetensors files are made private."""
    mask = _umask()
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
