"""Names → allocators: a file's name is the allocator's name, looked up when it is first asked for."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from secateur.allocators.base import Allocator, Measuring, check_follows
from secateur.errors import UsageError, nearest
from secateur.methods import Method
from secateur.options import describe_options, option_values, parse_named

A = TypeVar("A", bound=Allocator)

_registered: dict[str, type[Allocator]] = {}


def allocator(name: str) -> Callable[[type[A]], type[A]]:
    """Class decorator that adds an allocator under ``name``. Raises ValueError for a name that is taken."""

    def add(cls: type[A]) -> type[A]:
        taken = _registered.get(name)
        if taken is not None and taken.__module__ != cls.__module__:
            raise ValueError(f"an allocator named {name!r} is registered already")
        cls.name = name
        _registered[name] = cls
        return cls

    return add


@cache
def list_allocators() -> tuple[str, ...]:
    """Names of all allocators, sorted."""
    found = {module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])}
    return tuple(sorted(found - {"base", "registry", "trying"}))


def get_allocator(name: str) -> type[Allocator]:
    """The allocator of that name. Raises UsageError with the nearest name."""
    if name not in _registered:
        if name not in list_allocators():
            raise UsageError(
                f"unknown allocator '{name}'{nearest(name, list_allocators()) or ';'} 'secateur allocators' shows them"
                " all"
            )
        importlib.import_module(f"secateur.allocators.{name}")
    return _registered[name]


def parse_allocator(text: str) -> Allocator:
    """``owl`` or ``owl:m=5,lam=0.08`` → the allocator with these options. Raises UsageError and OptionError."""
    name, options = parse_named(text, "an allocator")
    cls = get_allocator(name)
    return cls(**option_values(cls.name, cls, options, f"'secateur allocators {cls.name}' lists them"))


def chosen_allocation(text: str | None, method: Method) -> Measuring | None:
    """The allocator that ``text`` names, at work for ``method``; by default the method's own, None without one.

    Raises UsageError, also when ``method`` can't follow it, and OptionError.
    """
    if text is None and not getattr(method, "programmed", False):
        text = method.spread
    if not text:
        return None
    found = parse_allocator(text).working()
    return Measuring(found, check_follows(found, method))


def describe_allocator(name: str) -> dict[str, Any]:
    """Everything known of an allocator: summary, docstring, what it observes, options with default and meaning."""
    cls = get_allocator(name)
    doc = (importlib.import_module(cls.__module__).__doc__ or "").strip()
    return {
        "name": name,
        "summary": doc.split("\n")[0],
        "doc": doc,
        "observes": cls.observes,
        "follows": "weights, units" if cls.shares else "weights",
        "options": describe_options(cls),
    }
