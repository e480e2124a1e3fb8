"""Names → methods: strict, lazy, and the only place that knows which methods exist."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from secateur.errors import UnknownMethodError, nearest
from secateur.methods.base import Method
from secateur.methods.descriptor import Descriptor
from secateur.methods.plugins import PLUGIN, installed_methods
from secateur.options import describe_options, option_values
from secateur.usercode import import_module

_registered: dict[str, type[Method]] = {}


def _shipped() -> dict[str, str]:
    """Method name → module: ours from the file names (a method's file carries its name), others from entry points."""
    root = Path(__file__).parent
    ours = {
        module.name: f"secateur.methods.{room.name}.{module.name}"
        for room in pkgutil.iter_modules([str(root)])
        if room.ispkg
        for module in pkgutil.iter_modules([str(root / room.name)])
        if not module.name.startswith("_")
    }
    return {**installed_methods(), **ours}


M = TypeVar("M", bound=Method)


def register(name: str) -> Callable[[type[M]], type[M]]:
    """Class decorator that adds a method under ``name``. Raises ValueError for a name that is taken."""

    def add(cls: type[M]) -> type[M]:
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise TypeError(f"{cls!r} is not a Method")
        if not isinstance(getattr(cls, "descriptor", None), Descriptor):
            raise TypeError(f"method {name!r} has no descriptor")
        taken = _registered.get(name)
        shipped = _shipped().get(name)
        if (taken and taken.__module__ != cls.__module__) or (shipped and shipped != cls.__module__):
            raise ValueError(f"a method named {name!r} is registered already")
        cls.name = name
        _registered[name] = cls
        return cls

    return add


def list_methods(**filters: str) -> list[str]:
    """Names of all methods, sorted; filter by descriptor fields: ``list_methods(object="weights")``."""
    names = sorted({*_shipped(), *_registered})
    return [n for n in names if all(getattr(get_method(n).descriptor, k) == v for k, v in filters.items())]


def get_method(name: str) -> type[Method]:
    """The method class of that name. Raises UnknownMethodError with the nearest name."""
    if name not in _registered:
        module = _shipped().get(name)
        if module is None:
            choices = {*_shipped(), *_registered}
            raise UnknownMethodError(
                f"unknown method '{name}'{nearest(name, choices) or ';'} 'secateur methods' shows them all"
            )
        # a failing file of ours is a bug and shows its traceback; a failing plugin is named
        if module.startswith("secateur."):
            importlib.import_module(module)
        else:
            import_module(module, PLUGIN)
        if name not in _registered:
            raise UnknownMethodError(f"{module} registers no method named '{name}'")
    return _registered[name]


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """An instance with these options; text values (from the command line) are converted to the option's type.

    Raises UnknownMethodError and OptionError.
    """
    cls = get_method(name)
    return cls(**option_values(name, cls, options or {}, f"'secateur describe {name}' lists them"))


def describe(name: str) -> dict[str, Any]:
    """Everything known of a method: summary, docstring, descriptor and options with default, unit, range, meaning."""
    cls = get_method(name)
    module_doc = importlib.import_module(cls.__module__).__doc__ or cls.__doc__ or ""
    return {
        "name": name,
        "summary": module_doc.strip().split("\n")[0],
        "doc": module_doc.strip(),
        "descriptor": dataclasses.asdict(cls.descriptor),
        "options": describe_options(cls),
        "sequential": cls.sequential,
        "costly": cls.costly,
    }
