"""Methods from outside the package: Python files and modules named by the user, and installed entry points.

A plugin is ordinary code that calls ``secateur.register``. An installed package announces its methods in its metadata,
one entry point per method, named like the method and pointing at the module that registers it:

    [project.entry-points."secateur.methods"]
    tide = "my_package.tide"
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from secateur.errors import UsageError

GROUP = "secateur.methods"


@cache
def installed_methods() -> dict[str, str]:
    """Method name → module, from the entry points of installed packages; nothing is imported."""
    return {point.name: point.module for point in entry_points(group=GROUP)}


def load_plugin(source: str) -> None:
    """Import a Python file (``./tide.py``) or module (``my_package.tide``) so that it registers its methods.

    A plugin that is loaded already is left alone. Raises UsageError when it is missing, fails, or registers nothing.
    """
    from secateur.methods.registry import list_methods

    is_file = source.endswith(".py") or os.sep in source
    name = _file_module(source) if is_file else source
    if name in sys.modules:
        return
    before = set(list_methods())
    if is_file:
        _import_file(source, name)
    else:
        import_plugin(source)
    if set(list_methods()) <= before and name not in installed_methods().values():
        raise UsageError(f"plugin {source} registers no method: decorate a Method with @secateur.register('name')")


def import_plugin(module: str) -> ModuleType:
    """Import a module from outside the package. Raises UsageError, with the place, when that fails."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise UsageError(_failure(module, error)) from error


def _file_module(source: str) -> str:
    # the path is part of the name: two files may carry the same name
    path = Path(source).resolve()
    return f"secateur_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _import_file(source: str, name: str) -> None:
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"plugin {source} is not a file; give a Python file or the name of a module")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"plugin {source} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    # the registry reads type hints and docstrings through sys.modules
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(_failure(source, error)) from error


def _failure(source: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == source:
        return f"plugin {source} is not installed; for a file give its path, as in ./{source}.py"
    if isinstance(error, SyntaxError):
        return f"plugin {source} can't be loaded: line {error.lineno}: {error.msg}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())
    return f"plugin {source} can't be loaded: {type(error).__name__}: {message} ({place.filename}, line {place.lineno})"
