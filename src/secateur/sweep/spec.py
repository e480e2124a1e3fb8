"""Sweep recipes: a recipe with one more key, ``sweep``, which says what is varied.

    model: smollm2-135m
    steps: [{method: wanda}]
    evaluate: [perplexity:builtin, speed]
    sweep:
      grid: {method: [wanda, magnitude], sparsity: [0.3, 0.5], seed: [0, 1]}

Every combination is a point. A list of grids gives the points of all of them. A search, on the other hand, is given
ranges and choices and lets Optuna pick:

    sweep:
      search: {trials: 20, objective: [perplexity:builtin, parameters], sparsity: [0.2, 0.7], method: [flap, wanda_sp]}

``steps`` may be left out when the method is an axis. The names of axes are explained in ``axes.locate``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from secateur.errors import RecipeError, UsageError, nearest
from secateur.recipes import Recipe, Section, explain, make_recipe, read_recipe
from secateur.sweep.axes import Choice, Point, Range, Scalar, check_axes, make_point
from secateur.usercode import check_trusted

# combinations of the corners of a search space that are looked at before anything runs
_MOST_CORNERS = 2000


class Search(Section):
    """How many points Optuna tries and what it makes small or large; every other key is an axis."""

    model_config = ConfigDict(extra="allow")

    trials: int = Field(default=20, ge=1)
    objective: list[str] = Field(default_factory=list)
    """names of metrics; the first quality metric when there is none"""
    sampler_seed: int = Field(default=0, ge=0)

    @field_validator("objective", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class SweepSpec(Section):
    """The value of ``sweep``: a grid (or several) or a search, and how often a failed point is tried again."""

    grid: list[dict[str, list[Any]]] | None = None
    search: Search | None = None
    retries: int = Field(default=2, ge=0)

    @field_validator("grid", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        grids = value if isinstance(value, list) else [value]
        return [
            {k: v if isinstance(v, list) else [v] for k, v in g.items()} if isinstance(g, dict) else g for g in grids
        ]

    @model_validator(mode="after")
    def _one_kind(self) -> SweepSpec:
        if (self.grid is None) == (self.search is None):
            raise ValueError("give either a grid or a search")
        return self


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class _Document(BaseModel):
    """Makes pydantic say ``sweep.`` in front of its places."""

    sweep: SweepSpec


@dataclass(frozen=True)
class Sweep:
    """A validated sweep.

    ``base`` holds what all points share (model, what is measured and how); ``data`` is the recipe as plain values.
    ``points`` are those of a grid; a search has ``space`` instead, and makes its points while it runs.
    """

    base: Recipe
    data: Mapping[str, Any]
    where: str
    retries: int
    points: tuple[Point, ...] = ()
    search: Search | None = None
    space: Mapping[str, Choice | Range] = field(default_factory=dict)

    def point(self, values: Mapping[str, Scalar]) -> Point:
        """The point at ``values``. Raises UsageError."""
        return make_point(self.data, values, self.where)

    def searches(self, values: Mapping[str, Scalar], key: str) -> bool:
        """Whether the search may ask for the point with these values and this key, which an earlier run may have had.

        The recipe and the space may have changed since.
        """
        if set(values) != set(self.space) or not all(self.space[axis].holds(value) for axis, value in values.items()):
            return False
        try:
            return self.point(values).key == key
        except UsageError:
            return False

    @property
    def size(self) -> int:
        """Number of points that will be there in the end."""
        return self.search.trials if self.search else len(self.points)

    @property
    def axes(self) -> list[str]:
        """Names of all axes."""
        return list(self.space) if self.search else list(dict.fromkeys(axis for p in self.points for axis in p.values))


def load_sweep(path: str | Path, *, trust_remote_code: bool = False) -> Sweep:
    """Read and validate a sweep recipe: every point of a grid, and the corners of a search.

    Code that the file names is refused with a UsageError unless ``trust_remote_code`` is set.

    Raises RecipeError and other UsageErrors with the file, the place and the nearest valid name.
    """
    sweep = make_sweep(read_recipe(path), str(path))
    check_trusted(sweep.base.code(), str(path), trust_remote_code)
    return sweep


def make_sweep(data: Mapping[str, Any], where: str) -> Sweep:
    """A validated sweep from plain values; ``where`` names their origin in errors. Raises UsageError."""
    if "sweep" not in data:
        key = next((k for k in data if k not in Recipe.model_fields and nearest(str(k), ["sweep"])), None)
        hint = f" (there is '{key}')" if key else ""
        raise RecipeError(f"{where} has no key 'sweep', which says what is varied{hint}")
    spec = _validated({"sweep": data["sweep"]}, where)
    rest = {"steps": [{}], **{key: value for key, value in data.items() if key != "sweep"}}
    _check_shape(rest, where)
    try:
        if spec.search is not None:
            return _search(spec, spec.search, rest, where)
        return _grid(spec, rest, where)
    except UsageError as error:
        known = str(error).startswith(where)
        raise error if known else type(error)(f"{where}: {error}") from None


def _validated(document: dict[str, Any], where: str) -> SweepSpec:
    try:
        return _Document.model_validate(document).sweep
    except ValidationError as error:
        problem = error.errors()[0]
        raise RecipeError(f"{where}: {explain(problem, {'sweep': SweepSpec, 'sweep.search': Search})}") from None


def _check_shape(data: Mapping[str, Any], where: str) -> None:
    """Axes are put into mappings, which must be there."""
    steps, calibration = data["steps"], data.get("calibration", {})
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps) or not steps:
        raise RecipeError(f"{where}: steps must be a list of mappings")
    if not isinstance(calibration, dict) or not all(isinstance(step.get("options", {}), dict) for step in steps):
        raise RecipeError(f"{where}: calibration and options must be mappings")


def _grid(spec: SweepSpec, data: dict[str, Any], where: str) -> Sweep:
    points: dict[str, Point] = {}
    for grid in spec.grid or []:
        for axis, values in grid.items():
            _check_values(axis, values)
        check_axes(grid, data)
        for combination in itertools.product(*grid.values()):
            point = make_point(data, dict(zip(grid, combination, strict=True)), where)
            # the grids of a list may overlap
            points.setdefault(point.key, point)
    if not points:
        raise RecipeError("sweep.grid is empty; name at least one axis, as in {sparsity: [0.3, 0.5]}")
    several = tuple(points.values())
    return Sweep(_base(several[0], data, where), data, where, spec.retries, several)


def _search(spec: SweepSpec, search: Search, data: dict[str, Any], where: str) -> Sweep:
    space = {axis: _axis(axis, given) for axis, given in (search.model_extra or {}).items()}
    if not space:
        raise RecipeError("sweep.search has no axis; give at least one, as in {sparsity: [0.2, 0.7]}")
    corners = {axis: domain.corners for axis, domain in space.items()}
    check_axes(corners, data, words=Search.model_fields)
    points = list(itertools.islice(_corner_points(corners, data, where), _MOST_CORNERS))
    base = _base(points[0], data, where)
    from secateur.evaluation import make_task

    # a metric with a colon is named like its task, and is then measured without being asked for twice
    wanted = [name for name in search.objective if ":" in name and " " not in name]
    for name in wanted:
        make_task(name)
    base = base.model_copy(update={"evaluate": list(dict.fromkeys([*base.evaluate, *wanted]))})
    return Sweep(base, data, where, spec.retries, (), search, space)


def _corner_points(corners: Mapping[str, tuple[Scalar, ...]], data: dict[str, Any], where: str) -> Iterator[Point]:
    for combination in itertools.product(*corners.values()):
        yield make_point(data, dict(zip(corners, combination, strict=True)), where)


def _base(point: Point, data: dict[str, Any], where: str) -> Recipe:
    """What all points share: the recipe without what the axes put into its calibration data."""
    base = make_recipe({**data, "steps": [s.model_dump() for s in point.recipe.steps]}, where)
    if base.model is None:
        raise RecipeError("'model' is missing: a hub id, a folder, a .gguf file or smollm2-135m")
    return base


def _check_values(axis: str, values: list[Any]) -> None:
    if not values:
        raise RecipeError(f"axis '{axis}' has no values")
    for value in values:
        if not isinstance(value, (str, int, float)):
            raise RecipeError(f"axis '{axis}': a value is a number, a word, true or false, got {value!r}")


def _axis(axis: str, given: Any) -> Choice | Range:
    """``[0.2, 0.7]`` is a range; any other list is a choice; a mapping says which it is."""
    if isinstance(given, dict) and set(given) == {"choices"}:
        given, numbers = given["choices"], False
    else:
        numbers = isinstance(given, list) and len(given) == 2 and all(type(v) in (int, float) for v in given)
    if isinstance(given, dict) or numbers:
        try:
            return Range.model_validate(given if isinstance(given, dict) else {"low": given[0], "high": given[1]})
        except ValidationError as error:
            raise RecipeError(f"sweep.search.{axis}: {explain(error.errors()[0], {'': Range})}") from None
    values = given if isinstance(given, list) else [given]
    _check_values(axis, values)
    return Choice(tuple(values))
