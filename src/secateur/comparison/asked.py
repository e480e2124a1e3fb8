"""What is asked of a comparison: methods with their options, budgets and seeds, as one sweep that has all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.errors import UsageError
from secateur.healing.recovery import with_training
from secateur.methods import get_method
from secateur.options import option_values, parse_named
from secateur.recipes import CalibrationSpec, Step
from secateur.sweep.axes import Point
from secateur.sweep.spec import Sweep, make_sweep

TOLERANCE = 0.01
"""by how much the fraction that a method removed may differ from the one that was asked for"""

# what is one for all methods, so that the budgets and the data are equal
_COMMON = {"method", "sparsity", "dtype", *CalibrationSpec.model_fields}
_WHERE = "compare"


@dataclass(frozen=True)
class Asked:
    """A comparison that may run: ``points`` are those of every (contender, sparsity), one per seed that counts."""

    sweep: Sweep
    contenders: tuple[str, ...]
    """methods as they were named, with the options that they were given"""
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    points: Mapping[tuple[str, float], tuple[Point, ...]]
    random: frozenset[str]
    """contenders whose results depend on the seed: by its calibration text, by what they draw, or by training"""
    tolerance: float = TOLERANCE


def ask(
    recipe: Mapping[str, Any],
    methods: str | Sequence[str],
    sparsities: Sequence[float],
    seeds: Sequence[int],
    tolerance: float = TOLERANCE,
) -> Asked:
    """A comparison of ``methods`` (``flap``, ``osscar:damping=0.1``) with what else is in ``recipe`` for all of them.

    A method runs with every one of the ``seeds`` when the seed may change its result, and with the first otherwise.
    Raises UsageError, in one sentence, for whatever can be known to be wrong without the model.
    """
    names = split(methods)
    twice = next((name for name in names if names.count(name) > 1), None)
    if len(names) < 2 or twice is not None:
        few = f"name two methods or more to compare, got '{', '.join(names)}'"
        raise UsageError(f"method {twice} is named twice" if twice else few)
    budgets = _budgets(sparsities)
    drawn = tuple(dict.fromkeys(seeds))
    if not drawn or min(drawn) < 0:
        raise UsageError("seeds are whole numbers of at least 0, at least one of them")
    if not 0 <= tolerance < 1:
        raise UsageError(f"tolerance must lie in [0, 1), got {tolerance:g} (it is a fraction of the blocks' weights)")
    grids, random, points = [], [], {}
    common = recipe["steps"][0].get("heal")
    for name in names:
        fixed = {key: [value] for key, value in _chosen(name, common).items()}
        (first,) = _sweep(recipe, [{**fixed, "sparsity": budgets[:1], "seed": [drawn[0]]}]).points
        several = first.recipe.is_random(first.recipe.steps[0])
        grid = {**fixed, "sparsity": list(budgets), "seed": list(drawn if several else drawn[:1])}
        random += [name] if several else []
        grids.append(grid)
        for point in _sweep(recipe, [grid]).points:
            points.setdefault((name, float(point.values["sparsity"])), []).append(point)
    found = {key: tuple(several) for key, several in points.items()}
    return Asked(_sweep(recipe, grids), tuple(names), tuple(budgets), drawn, found, frozenset(random), tolerance)


def split(text: str | Sequence[str]) -> list[str]:
    """``flap,osscar:damping=0.1,fill=false,wanda_sp`` → three words; an option goes on with the word before it.

    Several words are taken as they are. Raises UsageError for an empty one.
    """
    if not isinstance(text, str):
        return list(text)
    words: list[str] = []
    for piece in text.split(","):
        piece = piece.strip()
        if not piece:
            raise UsageError(f"there is an empty word in '{text}'")
        if words and "=" in piece and ":" not in piece.partition("=")[0]:
            words[-1] += f",{piece}"
        else:
            words.append(piece)
    return words


def _budgets(sparsities: Sequence[float]) -> list[float]:
    found = sorted({float(one) for one in sparsities})
    if not found or not all(0 < one < 1 for one in found):
        shown = ", ".join(f"{one:g}" for one in sparsities)
        raise UsageError(f"sparsities must lie in (0, 1), got '{shown}' (they are the fractions removed)")
    return found


def _chosen(text: str, heal: str | None) -> dict[str, Any]:
    """Method and options of a contender as values of axes; ``heal`` is that of all. Raises UsageError."""
    name, options = parse_named(text, "a method")
    cls = get_method(name)
    common = next((key for key in options if key in _COMMON), None)
    if common is not None:
        raise UsageError(f"{text}: {common} is the same for all methods of a comparison")
    own = {key: value for key, value in options.items() if key not in Step.model_fields}
    option_values(name, cls, own, f"'secateur describe {name}' lists them")
    if "heal" in options:
        # a repair of its own doesn't spare it the training of all
        options["heal"] = with_training(str(options["heal"]), heal)
    return {"method": name, **options}


def _sweep(recipe: Mapping[str, Any], grids: Sequence[Mapping[str, Any]]) -> Sweep:
    return make_sweep({**recipe, "sweep": {"grid": list(grids)}}, _WHERE)
