"""What a sweep varies: the names of axes, their values, and putting a value where it belongs in a recipe."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from secateur.errors import RecipeError, UsageError, nearest
from secateur.recipes import CalibrationSpec, Recipe, Step, make_recipe

Scalar = str | int | float | bool
Place = tuple[str | int, ...]
"""keys that lead from the top of a recipe to one value"""

_STEP = tuple(key for key in Step.model_fields if key != "options")
_LONGEST_NAME = 100


def rounded(value: Scalar) -> Scalar:
    """A value as a point of a search has it."""
    # what Optuna draws has more digits than anybody wants to read in the name of a folder
    return float(f"{value:.4g}") if isinstance(value, float) else value


class Range(BaseModel):
    """Numbers from ``low`` to ``high``, both included; whole numbers when both are whole."""

    model_config = ConfigDict(extra="forbid")

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a logarithmic range needs low above 0 and takes no step")
        if self.whole and isinstance(self.step, float):
            raise ValueError("a range of whole numbers takes a whole step")
        return self

    @property
    def whole(self) -> bool:
        """True when only whole numbers are meant."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def corners(self) -> tuple[Scalar, ...]:
        """Both ends: what is valid there is taken to be valid between them."""
        return (self.low, self.high)

    def holds(self, value: Scalar) -> bool:
        """Whether a point may have this value, which is rounded like all that is drawn."""
        low, high = (float(rounded(end)) for end in (self.low, self.high))
        return not isinstance(value, (str, bool)) and low <= value <= high


@dataclass(frozen=True)
class Choice:
    """Some values to choose from."""

    values: tuple[Scalar, ...]

    @property
    def corners(self) -> tuple[Scalar, ...]:
        """All values."""
        return self.values

    def holds(self, value: Scalar) -> bool:
        """Whether it is one of the values."""
        return value in self.values


@dataclass(frozen=True)
class Point:
    """One setting of a sweep: ``values`` by axis, and the recipe that they give.

    ``name`` may be the name of a folder; ``key`` is equal for equal decisions, whatever their axes are called.
    """

    name: str
    values: Mapping[str, Scalar]
    recipe: Recipe

    @property
    def key(self) -> str:
        decided = self.recipe.model_dump(mode="json", include={"steps", "calibration", "dtype"})
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()


def make_point(data: Mapping[str, Any], values: Mapping[str, Scalar], where: str) -> Point:
    """The point at ``values``; its methods and their options are looked up. Raises UsageError that names the point."""
    where = f"{where}: point {point_name(values)}"
    recipe = make_recipe(place(data, values), where)
    try:
        recipe.check_methods()
    except UsageError as error:
        raise type(error)(f"{where}: {error}") from None
    return Point(point_name(values), dict(values), recipe)


def point_name(values: Mapping[str, Scalar]) -> str:
    """``wanda-sparsity=0.5-seed=0``: letters, digits and ``._=-`` only; a hash where something else was lost."""
    parts = [str(v) if axis == "method" else f"{axis}={_shown(v)}" for axis, v in values.items()]
    text = "-".join(parts).replace(":", "_")
    name = re.sub(r"[^A-Za-z0-9._=-]", "_", text)
    if name != text or len(name) > _LONGEST_NAME or name.startswith("."):
        digest = hashlib.sha256(json.dumps(dict(values), sort_keys=True).encode()).hexdigest()
        name = f"{name.lstrip('.')[:_LONGEST_NAME]}-{digest[:8]}"
    return name


def _shown(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def place(data: Mapping[str, Any], values: Mapping[str, Scalar]) -> dict[str, Any]:
    """A copy of the recipe ``data`` with the value of every axis put where it belongs."""
    copied: dict[str, Any] = copy.deepcopy(dict(data))
    for axis, value in values.items():
        *parents, last = locate(axis, len(copied["steps"]))
        inner: Any = copied
        for key in parents:
            inner = inner[key] if isinstance(key, int) else inner.setdefault(key, {})
        inner[last] = value
    return copied


def locate(axis: str, steps: int) -> Place:
    """Where the values of an axis go in a recipe of so many steps.

    ``sparsity`` is a field of the step, ``samples`` or ``calibration.samples`` one of the calibration data, ``dtype``
    one of the recipe, and any other word an option of the method. With several steps, the step is named:
    ``steps.2.sparsity``. Raises RecipeError for a step that there is not.
    """
    found = re.fullmatch(r"steps\.(\d+)\.(.+)", axis)
    if found:
        number, key = int(found[1]), found[2].removeprefix("options.")
        if not 1 <= number <= steps:
            raise RecipeError(f"axis '{axis}' names step {number}, but the recipe has {steps}")
        return ("steps", number - 1, key) if key in _STEP else ("steps", number - 1, "options", key)
    if axis == "dtype":
        return ("dtype",)
    if axis.removeprefix("calibration.") in CalibrationSpec.model_fields:
        return ("calibration", axis.removeprefix("calibration."))
    if steps > 1:
        raise RecipeError(f"axis '{axis}': the recipe has {steps} steps; say which is meant, as in 'steps.1.{axis}'")
    return locate(f"steps.1.{axis}", steps)


def check_axes(axes: Mapping[str, Sequence[Scalar]], data: Mapping[str, Any], words: Iterable[str] = ()) -> None:
    """Refuse names that are neither a field nor an option of any method in question, and one field under two names.

    ``words`` are other keys that stand beside the axes, for the nearest name. Raises UsageError.
    """
    steps = len(data["steps"])
    places: dict[Place, str] = {}
    for axis in axes:
        path = locate(axis, steps)
        if path in places:
            raise RecipeError(f"axes '{places[path]}' and '{axis}' are the same")
        places[path] = axis
    for path, axis in places.items():
        if path[0] == "steps" and path[2] == "options":
            known = _options(path, places, axes, data)
            if path[3] not in known:
                general = (*_STEP, *CalibrationSpec.model_fields, "dtype")
                hint = nearest(axis, [*words, *general, *known]) or "; valid are " + ", ".join([*general, *known])
                raise RecipeError(f"unknown axis '{axis}'{hint}")


def _options(
    path: Place, places: Mapping[Place, str], axes: Mapping[str, Sequence[Scalar]], data: Mapping[str, Any]
) -> list[str]:
    """Options of all methods that the step of ``path`` may have."""
    from secateur.methods import get_method

    axis = places.get((*path[:2], "method"))
    step: Any = data["steps"][path[1]]
    methods = axes[axis] if axis else [step["method"]] if "method" in step else []
    return list(dict.fromkeys(name for method in methods for name in get_method(str(method)).option_fields()))
