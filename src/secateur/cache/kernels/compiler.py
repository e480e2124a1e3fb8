"""Compiles the kernels for this processor, once, into the user's cache folder; only a C++ compiler is needed."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from secateur.errors import SecateurError, first_line
from secateur.files import cache_folder

SOURCES = tuple(Path(__file__).with_name(name) for name in ("attention.cpp", "compression.cpp"))
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi")
_COMPILERS = ("c++", "g++", "clang++")
# what a compiler doesn't know is left out: Apple's has no OpenMP, and calls processors otherwise on Arm
_PROCESSORS = (("-march=native",), ("-mcpu=native",), ())
_THREADS = (("-fopenmp",), ("-pthread",))


class CompilationError(SecateurError):
    """There is no compiler, or it can't compile the kernels."""


def compiled(processors: tuple[tuple[str, ...], ...] = _PROCESSORS) -> ctypes.CDLL:
    """The kernels as a library, compiled with the first of ``processors`` that works. Raises CompilationError."""
    command = _compiler()
    target = cache_folder() / "kernels" / f"cache-{_key(command, processors)}.so"
    try:
        if not target.exists():
            _compile(command, processors, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilationError(first_line(error)) from None


def _compiler() -> list[str]:
    """The compiler that CXX names, or the first that there is."""
    if os.name == "nt":
        raise CompilationError("kernels are compiled on Linux and macOS only")
    named = os.environ.get("CXX", "").split()
    for command in [named] if named else [[name] for name in _COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise CompilationError(f"no C++ compiler was found (looked for {' '.join(named) or ', '.join(_COMPILERS)})")


def _key(command: list[str], processors: tuple[tuple[str, ...], ...]) -> str:
    """Names what the result depends on: source, flags, compiler, and the processor that it sees.

    A home directory may be shared by machines with different processors.
    """
    known = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES))
    known.update(repr((_FLAGS, processors, sys.platform)).encode())
    for flags in processors:
        macros = _run([*command, *flags, "-E", "-dM", "-x", "c++", os.devnull])
        if macros.returncode == 0:
            known.update(macros.stdout)
            break
    return known.hexdigest()[:16]


def _compile(command: list[str], processors: tuple[tuple[str, ...], ...], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    said = ""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        for flags in _choices(processors):
            done = _run([*command, *_FLAGS, *flags, *map(str, SOURCES), "-o", str(made)])
            if done.returncode == 0:
                made.replace(target)  # another process may have been faster; both are the same
                return
            said = done.stderr.decode(errors="replace")
    raise CompilationError(f"{command[0]} failed: {first_line(RuntimeError(said))}")


def _choices(processors: tuple[tuple[str, ...], ...]) -> Iterator[tuple[str, ...]]:
    for processor in processors:
        for threads in _THREADS:
            yield (*processor, *threads)


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=600)
