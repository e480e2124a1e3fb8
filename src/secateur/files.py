"""Writing without leaving anything half done."""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager, suppress
from enum import Enum
from pathlib import Path

from secateur.errors import OutputError
from secateur.remote import check_remote, expanded, is_url, place, remote_folder, upload_folder


def cache_folder() -> Path:
    """Where measurements of this machine are kept: SECATEUR_CACHE, or ``secateur`` in the user's cache folder."""
    if own := os.environ.get("SECATEUR_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur"


def run_path(out: str | Path) -> Path:
    """The folder of the run that writes ``out``: beside it, and in the current folder for a URL."""
    if is_url(out):
        return Path(f"{str(out).rstrip('/').rpartition('/')[2]}.run")
    path = Path(place(out))
    return path.with_name(f"{path.name}.run")


def check_output(folder: str | Path, overwrite: bool = False) -> None:
    """Refuse an output that exists, before any work starts. Raises OutputError, and for a URL what fsspec lacks.

    What a kill in the middle of a replacement left aside is put back first, and what killed processes left
    unfinished beside the folder is removed.
    """
    if is_url(folder):
        _remove_abandoned(run_path(folder))
        check_remote(str(folder), overwrite)
        return
    try:
        folder = Path(place(folder))
    except RuntimeError as error:  # links that lead to each other
        raise OutputError(f"can't write to {folder}: {error}") from None
    _check_place(folder)
    _put_back(folder)
    _remove_abandoned(folder)
    _remove_abandoned(run_path(folder))
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


def check_apart(out: str | Path, inputs: Iterable[str | Path | None]) -> None:
    """Refuse an output that would replace one of the ``inputs``, a folder that holds one, or a part of one.

    Links are followed. Of the inputs, those that aren't files or folders of this machine (built-in names, ids of the
    hub, None) are passed over; an output that doesn't exist yet, or is empty, replaces nothing. Raises OutputError.
    """
    if is_url(out):
        return
    # the folder of the run is replaced as well
    for folder in (Path(place(out)), run_path(out)):
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            continue
        replaced = folder.resolve()
        for given in inputs:
            if given is None or is_url(given) or not os.path.exists(source := expanded(given)):
                continue
            read = source.resolve()
            if read == replaced:
                raise OutputError(f"{folder} is what is read: choose another output")
            if read.is_relative_to(replaced):
                raise OutputError(f"{folder} holds {given}, which is read: choose another output")
            if replaced.is_relative_to(read):
                raise OutputError(f"{folder} is a part of {given}, which is read: choose another output")


def _check_place(path: Path) -> None:
    """Refuse a path that no file or folder can be made at. Raises OutputError."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long
        raise OutputError(f"can't write to {path}: {error.strerror or error}") from None
    if not path.absolute().name:
        raise OutputError(f"{path} is where all files of this machine are: give a folder inside of it")
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
        _remove_abandoned(path)
        with _temporary_beside(path) as folder:
            whole = folder / path.name
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
    with _parents(folder), ExitStack() as stack:
        try:
            temporary = stack.enter_context(_temporary_beside(folder))
        except OSError as error:
            raise OutputError(f"can't write to {folder}: {error.strerror or error}") from None
        with _told_of_the_disk(folder):
            yield temporary
            finish_folder(temporary, folder)


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


@contextmanager
def _temporary_beside(path: Path) -> Generator[Path, None, None]:
    """A folder beside ``path`` for as long as the block lasts, which is locked so that no other process removes it."""
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        try:
            with _locked(temporary) as lock:
                # another process may have taken it for abandoned before it was locked
                if lock is not _Lock.TAKEN and temporary.is_dir():
                    yield temporary
                    return
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def discard_folder(folder: Path) -> None:
    """Remove a folder so that a kill leaves either all of it, or nothing under its name."""
    # the next one that writes to this place removes what has such a name
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    with suppress(OSError):
        os.replace(folder, aside)
    for path in (aside, folder):
        shutil.rmtree(path, ignore_errors=True)


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes left beside ``path``: temporary folders, and a folder that was replaced."""
    if not path.name or not path.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.part")
    with suppress(OSError):
        for left in [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name) and entry.is_dir()]:
            with _locked(left) as lock:
                if lock is _Lock.OURS:
                    shutil.rmtree(left, ignore_errors=True)
    if path.is_dir() and _aside(path).is_dir():
        shutil.rmtree(_aside(path), ignore_errors=True)


class _Lock(Enum):
    OURS = "no other process works on the folder"
    TAKEN = "another process does"
    UNKNOWN = "this file system, or this machine, has no locks"


@contextmanager
def _locked(folder: Path) -> Generator[_Lock, None, None]:
    """The lock of a folder while the block lasts, where it can be had; it ends with the process, however that ends."""
    if importlib.util.find_spec("fcntl") is None:
        yield _Lock.UNKNOWN
        return
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield _Lock.TAKEN
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock = _Lock.OURS
        except BlockingIOError:
            lock = _Lock.TAKEN
        except OSError:
            lock = _Lock.UNKNOWN
        yield lock
    finally:
        os.close(descriptor)


def _open_to_others(folder: Path) -> None:
    """Give everything the usual permissions; temporary folders and safetensors files are made private."""
    mask = _umask()
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
