"""Python code that the user names: modules, files, and objects in them."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from secateur.errors import SecateurError, UsageError, nearest

_OURS = Path(__file__).parent
_END = object()
_OBJECT = re.compile(r"(?P<source>[^:]+):(?P<name>[A-Za-z_][\w.]*)")


def is_reference(text: str) -> bool:
    """Whether this names an object: ``package.module:name`` or ``path/to/file.py:name``."""
    found = _OBJECT.fullmatch(text)
    return bool(found) and (is_file(found["source"]) or all(w.isidentifier() for w in found["source"].split(".")))


def is_file(source: str) -> bool:
    """Whether this names a file and not a module."""
    return source.endswith(".py") or os.sep in source


def load_object(reference: str) -> Any:
    """The object that ``package.module:name`` or ``file.py:name`` names.

    Modules are looked for in the working folder too, which joins ``sys.path``. Raises UsageError when there is none.
    """
    if not is_reference(reference):
        raise UsageError(f"name an object as package.module:name or file.py:name, got '{reference}'")
    source, _, name = reference.rpartition(":")
    found: Any = import_file(source, "module") if is_file(source) else _import_here(source)
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{source} has no {name}{nearest(part, [n for n in dir(found) if n[0] != '_'])}")
        found = getattr(found, part)
    return found


def check_trusted(named: Iterable[str], where: str, trust_remote_code: bool) -> None:
    """Refuse the code that the file ``where`` names, unless the user trusts it. Raises UsageError."""
    for name in named:
        if not trust_remote_code:
            raise UsageError(
                f"{where} names code that would be run ({name}): pass --trust-remote-code (trust_remote_code=True) if"
                " you trust the file"
            )


def call_object(reference: str, made: Callable[..., Any], *arguments: Any) -> Any:
    """What the user's function returns. Raises UsageError, with the place, when it fails; errors of ours are theirs."""
    try:
        return made(*arguments)
    except SecateurError:
        raise
    except Exception as error:
        raise UsageError(f"{reference} failed: {_what_and_where(error)}") from error


def load_function(reference: str, of: str = "") -> Callable[..., Any]:
    """The function that ``package.module:name`` names, ``of`` some arguments; when it fails, see ``call_object``."""
    function = load_object(reference)
    if not callable(function):
        raise UsageError(f"{reference} must be a function{of and f' of {of}'}, got {type(function).__name__}")
    return partial(call_object, reference, function)


class Batches(Iterable[Any]):
    """What a loader or a generator of the user's gives; when that fails, see ``call_object``."""

    def __init__(self, reference: str, given: Iterable[Any]) -> None:
        self._reference, self._given = reference, given

    def __iter__(self) -> Iterator[Any]:
        given = call_object(self._reference, iter, self._given)
        while (batch := call_object(self._reference, next, given, _END)) is not _END:
            yield batch


def import_module(module: str, what: str) -> ModuleType:
    """Import a module from outside the package; ``what`` it is to the user. Raises UsageError, with the place."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise UsageError(_failure(what, module, error)) from error


def import_file(source: str, what: str) -> ModuleType:
    """Import a Python file, once. Raises UsageError, with the place."""
    name, path = file_module(source), Path(source)
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise UsageError(f"{what} {source} is not a file; give a Python file or the name of a module")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{what} {source} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    # the registry reads type hints and docstrings through sys.modules
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(_failure(what, source, error)) from error
    return module


def file_module(source: str) -> str:
    """The name under which a file is imported."""
    # the path is part of the name: two files may carry the same name
    path = Path(source).resolve()
    return f"secateur_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _import_here(module: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        # `python -m` has the working folder on its path, an installed command hasn't
        sys.path.insert(0, here)
    return import_module(module, "module")


def _failure(what: str, source: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == source:
        return f"{what} {source} is not installed; for a file give its path, as in ./{source}.py"
    if isinstance(error, SyntaxError):
        return f"{what} {source} can't be loaded: line {error.lineno}: {error.msg}"
    return f"{what} {source} can't be loaded: {_what_and_where(error)}"


def _what_and_where(error: Exception) -> str:
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    # a function that can't even be called has failed in none of its lines
    theirs = [f for f in traceback.extract_tb(error.__traceback__) if not Path(f.filename).is_relative_to(_OURS)]
    return f"{message} ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else message
