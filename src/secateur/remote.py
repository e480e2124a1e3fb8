"""Outputs at URLs of ``fsspec`` (``s3://``, ``gs://``, ``memory://``): written here first, then uploaded file by file.

An object store has no rename that would make a folder appear at once. What makes a folder a checkpoint or a plan (the
config, the index of the shards, the manifest) is therefore uploaded last, and removed first when a folder is replaced,
so that half an upload is never mistaken for the whole.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from secateur.errors import (
    MissingExtraError,
    OutputError,
    SecateurError,
    UsageError,
    first_line,
    nearest,
    require_extra,
)

_URL = re.compile(r"([\w+.:-]+)://")
_LOCAL = ("file", "local")
_BUCKETS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss")
_PROBE = ".secateur-write-test"
# from the first uploaded to the last: a reader that finds the last one finds all
_MARKERS = ("plan.json", "model.safetensors.index.json", "manifest.json", "config.json")


def is_url(folder: str | Path) -> bool:
    """True for a place that only ``fsspec`` reaches; ``file://`` is this machine, and so is every Path."""
    found = _URL.match(folder) if isinstance(folder, str) else None
    return found is not None and found[1] not in _LOCAL


def expanded(path: str | Path) -> Path:
    """A local path with the home folder in place of ``~``; that of somebody unknown stays as it is written."""
    return Path(os.path.expanduser(path))


def place(folder: str | Path) -> Path | str:
    """A local folder as Path, ``file://`` included, and what a link leads to; any other URL as it is.

    Raises UsageError for a URL in a Path, which has lost one of its slashes, and for the home folder of nobody.
    """
    if is_url(folder):
        return str(folder).rstrip("/")
    if isinstance(folder, Path) and (found := re.match(r"([a-z][\w+.-]+):/", folder.as_posix())):
        raise UsageError(f"{folder}: give a URL as text, '{found[1]}://…', not as a Path")
    path = expanded(re.sub(rf"^({'|'.join(_LOCAL)})://", "", folder) if isinstance(folder, str) else folder)
    if str(path).startswith("~"):
        raise UsageError(f"{folder}: this machine knows nobody of the name {path.parts[0][1:]}")
    # a link would be renamed and replaced instead of the folder that it stands for, and "." has no name
    return path.resolve() if os.path.islink(path) or path.name in ("", "..") else path


def check_remote(url: str, overwrite: bool = False) -> None:
    """Refuse a URL that can't be written to, or holds something already; a small file is written there and removed.

    Raises UsageError for an unknown protocol, MissingExtraError, or OutputError.
    """
    fs, root = _open(url)
    with _failing(url):
        _check_free(fs, root, url, overwrite)
        fs.pipe_file(f"{root}/{_PROBE}", b"secateur\n")
        with suppress(Exception):
            fs.rm_file(f"{root}/{_PROBE}")


@contextmanager
def remote_folder(url: str, overwrite: bool = False) -> Generator[Path, None, None]:
    """A local temporary folder whose files are uploaded to ``url`` when the block ends well.

    Nothing is uploaded when it fails, and what was uploaded is removed again when the upload does. An existing folder
    is replaced only with ``overwrite``; a failure while it is replaced leaves neither. Raises what ``check_remote``
    raises.
    """
    fs, root = _open(url)
    with _failing(url):
        _check_free(fs, root, url, overwrite)
    with tempfile.TemporaryDirectory(prefix="secateur.") as temporary:
        yield Path(temporary)
        with _failing(url):
            _replace(fs, Path(temporary), root)


def upload_folder(folder: Path, url: str) -> None:
    """Upload a folder that is complete here; what ``url`` holds is replaced. Raises what ``check_remote`` raises."""
    fs, root = _open(url)
    with _failing(url):
        _replace(fs, folder, root)


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path of the folder in it without a slash at the end."""
    fsspec = require_extra("fsspec", "cloud", f"writing to {url}")
    found = _URL.match(url)
    protocol = found[1] if found else ""
    if protocol == "hf":
        raise UsageError(f"{url}: write to a folder here, and upload it with --push-to-hub OWNER/NAME")
    if protocol in ("http", "https") or "::" in protocol:
        raise UsageError(f"{url} can't be written to: give a folder, or a URL such as s3://bucket/folder")
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        hint = nearest(protocol, ("s3", "gs", "abfs", "memory", "file", "sftp", "hdfs"))
        raise UsageError(
            f"{url}: unknown protocol '{protocol}'{hint or '; known are s3, gs, abfs, sftp and more'}"
        ) from None
    except ImportError as error:
        raise MissingExtraError(f"{url} can't be written to: {_lower(first_line(error))}") from error
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except Exception as error:
        raise OutputError(f"can't write to {url}: {first_line(error)}") from error
    root = root.rstrip("/")
    # a bucket may hold much else, which --overwrite would take for the checkpoint before
    if not root or (protocol in _BUCKETS and "/" not in root):
        raise UsageError(f"{url} names no folder: give one, as in {protocol}://bucket/folder")
    return fs, root


def _check_free(fs: Any, root: str, url: str, overwrite: bool) -> None:
    if fs.isfile(root):
        raise OutputError(f"{url} is a file; give a folder that doesn't exist yet")
    if not overwrite and _list(fs, root):
        raise OutputError(f"{url} exists and is not empty: choose another folder, or pass --overwrite")


def _list(fs: Any, root: str) -> list[str]:
    """Paths of all files below ``root``, relative to it."""
    fs.invalidate_cache()
    try:
        found = [str(path) for path in fs.find(root)]
    except FileNotFoundError:
        return []
    # a store answers with or without the slash in front that the path has
    start = len(root.strip("/")) + 1
    names = [path.strip("/")[start:] for path in found]
    return [name for name in names if name and name != _PROBE]


def _replace(fs: Any, folder: Path, root: str) -> None:
    old = _list(fs, root)
    new = sorted((path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()), key=_rank)
    uploaded: list[str] = []
    try:
        _remove(fs, root, sorted((name for name in old if _rank(name)[0]), key=_rank, reverse=True))
        _remove(fs, root, [name for name in old if not _rank(name)[0] and name not in new])
        for name in new:
            uploaded.append(name)
            _put(fs, folder / name, f"{root}/{name}")
    except BaseException:
        with suppress(Exception):
            _remove(fs, root, reversed(uploaded))
        raise


def _put(fs: Any, file: Path, path: str) -> None:
    fs.put_file(str(file), path)
    size, found = file.stat().st_size, fs.info(path).get("size")
    if found is not None and found != size:
        raise OSError(f"{file.name} arrived with {found} of {size} bytes")


def _remove(fs: Any, root: str, names: Iterable[str]) -> None:
    for name in names:
        with suppress(FileNotFoundError):
            fs.rm_file(f"{root}/{name}")


def _rank(name: str) -> tuple[int, str]:
    """Where a file comes in the upload: 0 for those that mean nothing alone."""
    base = name.rsplit("/", 1)[-1]
    if base in _MARKERS:
        return _MARKERS.index(base) + 1, name
    return 0, name


@contextmanager
def _failing(url: str) -> Generator[None, None, None]:
    try:
        yield
    except SecateurError:
        raise
    except Exception as error:
        said = getattr(error, "strerror", None) or first_line(error)
        raise OutputError(f"can't write to {url}: {said}; nothing was left there") from error


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
