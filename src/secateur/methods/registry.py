"""Names → methods: strict, lazy, and the only place that knows which methods exist."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from secateur.errors import OptionError, UnknownMethodError, nearest
from secateur.methods.base import Method
from secateur.methods.descriptor import Descriptor
from secateur.methods.options import interval
from secateur.methods.plugins import PLUGIN, installed_methods
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


def option_values(name: str, cls: type[Any], options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of a dataclass as values of their types; ``where`` says what lists them. Raises OptionError."""
    known, hints = {field.name for field in dataclasses.fields(cls)}, get_type_hints(cls)
    for key in options:
        if key not in known:
            raise OptionError(f"{name} has no option '{key}'{nearest(key, known) or ';'} {where}")
    return {key: _convert(name, key, value, hints[key]) for key, value in options.items()}


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


def describe_options(cls: type[Any]) -> dict[str, Any]:
    """The options of a dataclass by name, with default, unit, range, choices and meaning."""
    return {
        field.name: {
            "default": field.default,
            "unit": field.metadata.get("unit", ""),
            "range": interval(field.metadata),
            "choices": list(field.metadata.get("choices") or ()),
            "help": field.metadata.get("help", ""),
        }
        for field in dataclasses.fields(cls)
    }


def _convert(method: str, key: str, value: Any, hint: Any) -> Any:
    if not isinstance(value, str):
        return value
    kinds = get_args(hint) or (hint,)
    if str in kinds:
        return value
    if bool in kinds:
        if value.lower() in ("true", "yes", "on", "1"):
            return True
        if value.lower() in ("false", "no", "off", "0"):
            return False
        raise OptionError(f"{method}: {key} must be true or false, got {value!r}")
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(value)
            except ValueError:
                continue
    wanted = " or ".join(k.__name__ for k in kinds)
    raise OptionError(f"{method}: {key} must be of type {wanted}, got {value!r}")
