"""Methods that stand for a combination of others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.methods.base import Method
from secateur.methods.registry import make_method


@dataclass(frozen=True, kw_only=True)
class Combination:
    """A method with its options, and the allocator that it follows, with its own."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    allocate: str | None = None


@dataclass(frozen=True, kw_only=True)
class Preset(Method):
    """Stands for a combination, chosen by its options; plans name what it stood for."""

    def combination(self) -> Combination:
        """What to do instead. Raises OptionError where nothing fits the options."""
        raise NotImplementedError(f"{type(self).__name__} must define combination()")

    @property
    def uses_data(self) -> bool:
        return settled(self, None)[0].uses_data


def settled(method: Method, allocate: str | None) -> tuple[Method, str | None]:
    """The method that really prunes, and the allocator asked for; of a preset its own unless another one is given."""
    if not isinstance(method, Preset):
        return method, allocate
    found = method.combination()
    return make_method(found.method, found.options), found.allocate if allocate is None else allocate
