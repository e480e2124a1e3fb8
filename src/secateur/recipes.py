"""Recipes: a pruning run as a YAML file, with one or several steps.

    model: smollm2-135m
    calibration: {source: builtin, samples: 64, length: 512, seed: 0}
    steps:
      - method: flap
        sparsity: 0.2
      - method: wanda
        pattern: 2:4
        options: {use_variant: false}
    evaluate: [perplexity:builtin, size]
    out: pruned/
    format: dense

Steps run one after the other; each plans on the result of the step before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from secateur.allocate.asked import contradiction
from secateur.errors import RecipeError, UsageError, nearest
from secateur.kinds import is_task_file
from secateur.reading import read_bytes, shown
from secateur.usercode import check_trusted

if TYPE_CHECKING:
    from secateur.allocators import Measuring
    from secateur.methods import Method
    from secateur.report import LayerCut, Report
    from secateur.structure import Anatomy

Progress = Callable[[str, int, int], None]

MAX_RECIPE_BYTES = 1_000_000
# steps, a step, its options, an option's list; a recipe needs no more
_MAX_DEPTH = 16


class Section(BaseModel):
    """A part of a recipe, whose keys are all known, and where true is not the number 1."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _switches_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        kinds = set(get_args(kind)) or {kind}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError(f"must be a number, not {str(value).lower()}")
        return value


class CalibrationSpec(Section):
    """Which data the statistics are taken from: ``samples`` windows of ``length`` tokens.

    They are the first ones of the text; with ``random_windows`` the seed draws where they start.
    """

    source: str = "builtin"
    samples: int = Field(default=64, ge=1)
    length: int = Field(default=512, ge=1)
    seed: int = Field(default=0, ge=0)
    text_field: str | None = None
    random_windows: bool = False

    @property
    def drawn(self) -> bool:
        """Whether the seed decides what the text is: it draws the windows, or the model writes them."""
        return self.random_windows or self.source == "self"

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # journals and keys of points stay as they were before windows could be drawn
        return {key: value for key, value in handler(self).items() if key != "random_windows" or value}


class Step(Section):
    """One method and how much it removes; ``options`` are the method's own, ``allocate`` says where it is removed.

    ``heal`` is a repair (``refit``), a training (``lora:steps=300``), or both (``refit+lora``). With ``stages`` that
    many steps stand for this one: each removes a part, and ``growth`` says which share of the training it has.
    ``partial`` allows models of whose blocks the method reaches less than half.
    """

    method: str
    sparsity: float | None = None
    pattern: str | None = None
    budget: str | dict[str, float] | None = None
    allocate: str | None = None
    heal: str | None = None
    target: str | None = None
    stages: int | None = Field(default=None, ge=1)
    growth: Literal["linear", "constant", "cosine"] | None = None
    partial: bool = False
    options: dict[str, Any] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # runs and points that were begun before there was this keep their settings
        return {key: value for key, value in handler(self).items() if key != "partial" or value}

    @model_validator(mode="after")
    def _agree(self) -> Step:
        for key in ("sparsity", "pattern", "budget", "heal", "target"):
            if getattr(self, key) is not None and key in self.options:
                raise ValueError(f"{key} is given twice, once among the options")
        if why := contradiction(self.sparsity, self.pattern):
            raise ValueError(why)
        return self


class Recipe(Section):
    """A whole run: model, calibration data, steps, what to measure and where to write."""

    model: str | None = None
    revision: str | None = None
    calibration: CalibrationSpec = Field(default_factory=lambda: CalibrationSpec())
    steps: list[Step] = Field(min_length=1)
    evaluate: list[str] = Field(default_factory=list)
    windows: int = Field(default=40, ge=1)
    out: str | None = None
    format: Literal["dense", "packed"] = "dense"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "cpu"
    devices: list[str] = Field(default_factory=list)
    max_shard_size: str = "5GB"
    activation_memory: str | None = None
    latency_table: str | None = None

    @model_validator(mode="after")
    def _one_or_several(self) -> Recipe:
        if self.devices and self.device not in ("cpu", self.devices[0]):
            raise ValueError("give device or devices, not both")
        # whatever takes one device takes the first
        self.device = self.devices[0] if self.devices else self.device
        return self

    def method_options(self, step: Step) -> dict[str, Any]:
        """The options of a step's method, the general arguments among them."""
        from secateur import api
        from secateur.healing.recovery import split_heal

        wanted = (step.sparsity, step.pattern, step.budget)
        seed = self.calibration.seed
        repair, _ = split_heal(step.heal)
        return api.method_options(step.method, step.options, *wanted, seed, heal=repair, target=step.target)

    def staged(self) -> Recipe:
        """The same with a step for every stage. Raises UsageError for stages that a method can't have."""
        if all(step.stages is None and step.growth is None for step in self.steps):
            return self
        return self.model_copy(update={"steps": [one for step in self.steps for one in self._stages(step)]})

    def _stages(self, step: Step) -> list[Step]:
        from secateur.healing.recovery import stages_of
        from secateur.methods import StructuredMethod, make_method, settled

        if step.stages is None:
            if step.growth is not None:
                raise UsageError("growth says how stages share the training: give their number with --stages (stages)")
            return [step]
        chosen = make_method(step.method, self.method_options(step))
        method, allocate = settled(chosen, step.allocate)
        if not isinstance(method, StructuredMethod) or "=" in method.budget or method.budget in ("kv_bytes", "latency"):
            what = "has another" if isinstance(method, StructuredMethod) else "removes something else"
            raise UsageError(
                "stages are for methods that remove heads and neurons, with one budget that is counted, and"
                f" {step.method} {what}"
            )
        left = [1 - method.sparsity * stage / step.stages for stage in range(step.stages + 1)]
        heals = stages_of(step.heal, growing(step.stages, step.growth or "linear")) if step.heal else None
        options, known = step.options, {}
        if method is not chosen:
            # a preset chooses once, by what all stages remove together
            options = method.options()
            known = {"method": method.name, "allocate": allocate, "budget": None, "target": None}
        known["options"] = {key: value for key, value in options.items() if key != "sparsity"}
        return [
            step.model_copy(
                update={
                    **known,
                    "sparsity": 1 - left[stage + 1] / left[stage],
                    "heal": heals[stage] if heals else None,
                    "stages": None,
                    "growth": None,
                }
            )
            for stage in range(step.stages)
        ]

    def code(self) -> list[str]:
        """Code that would run because this recipe names it: task files of lm-eval may name functions of their own."""
        return [task for task in self.evaluate if is_task_file(task)]

    def words(self, step: Step) -> tuple[Method, Measuring | None]:
        """The method of a step with its options, and its allocator. Raises UsageError."""
        from secateur.allocators import chosen_allocation
        from secateur.methods import make_method, settled

        method, allocate = settled(make_method(step.method, self.method_options(step)), step.allocate)
        return method, chosen_allocation(allocate, method)

    def check_reach(self, anatomy: Anatomy) -> None:
        """Refuse steps that reach too little of a model of this ``anatomy``. Raises UsageError."""
        from secateur.methods import check_reach

        for number, step in enumerate(self.steps, start=1):
            try:
                check_reach(self.words(step)[0], anatomy, partial=step.partial)
            except UsageError as error:
                raise UsageError(f"step {number}: {error}" if len(self.steps) > 1 else str(error)) from None

    def is_random(self, step: Step) -> bool:
        """Whether another seed may lead to another result: by the method, by text that is drawn, or by training."""
        from secateur.healing.recovery import split_heal

        method, allocation = self.words(step)
        reads = method.uses_data or (allocation is not None and allocation.needs_text)
        trains = split_heal(step.heal)[1] is not None
        return trains or (method.draws and "seed" not in step.options) or (self.calibration.drawn and reads)

    def check_methods(self) -> None:
        """Look every method, allocator and option up, before anything is loaded. Raises UsageError."""
        from secateur.allocate import parse_pattern
        from secateur.healing.recovery import check_guided, split_heal
        from secateur.methods import UnitMethod, check_for_decoders

        for number, step in enumerate(self.steps, start=1):
            try:
                method, allocation = self.words(step)
                check_for_decoders(method)
                training = split_heal(step.heal)[1]
                if training is not None and training.ranks == "importance":
                    follows = allocation is not None and isinstance(method, UnitMethod)
                    check_guided(follows=follows)
                if pattern := getattr(method, "pattern", ""):
                    parse_pattern(pattern)
            except UsageError as error:
                if len(self.steps) == 1:
                    raise
                raise type(error)(f"step {number}: {error}") from None

    def check_installed(self) -> None:
        """Look for the libraries that train what a step leaves, before hours of planning. Raises MissingExtraError."""
        from secateur.healing.recovery import split_heal
        from secateur.healing.recovery.trained import check_installed

        for step in self.steps:
            training = split_heal(step.heal)[1]
            if training is not None:
                check_installed(training.train)

    def plan_arguments(self, step: Step) -> dict[str, Any]:
        """What ``secateur.plan`` takes for one step."""
        return {
            "method": step.method,
            "sparsity": step.sparsity,
            "pattern": step.pattern,
            "budget": step.budget,
            "allocate": step.allocate,
            "heal": step.heal,
            "target": step.target,
            "partial": step.partial,
            "options": step.options,
            "latency_table": self.latency_table,
            "calibration": self.calibration.source,
            "samples": self.calibration.samples,
            "length": self.calibration.length,
            "seed": self.calibration.seed,
            "text_field": self.calibration.text_field,
            "random_windows": self.calibration.random_windows,
            "dtype": self.dtype,
        }


def load_recipe(path: str | Path, *, trust_remote_code: bool = False) -> Recipe:
    """Read and validate a recipe. Raises RecipeError with the file, the place and the nearest valid key.

    Code that the file names is refused with a UsageError unless ``trust_remote_code`` is set.
    """
    recipe = make_recipe(read_recipe(path), str(path))
    check_trusted(recipe.code(), str(path), trust_remote_code)
    return recipe


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping that a recipe file holds, not validated yet. Raises RecipeError."""
    try:
        text = read_bytes(path, MAX_RECIPE_BYTES, RecipeError).decode("utf8")
    except UnicodeDecodeError:
        raise RecipeError(f"recipe {path} is not a text file") from None
    except OSError as error:
        raise RecipeError(f"can't read recipe {path}: {error.strerror or error}") from None
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} is not valid YAML: {_yaml_problem(error)}") from None
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        # what the constructors of PyYAML let through: dates that don't exist, numbers of thousands of digits
        raise RecipeError(f"recipe {path} holds a value that can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {path} must be a mapping with the key 'steps', not {_kind(data)}")
    return data


def make_recipe(data: Mapping[str, Any], where: str) -> Recipe:
    """A validated recipe from plain values; ``where`` names their origin in errors. Raises RecipeError."""
    if "sweep" in data:
        raise RecipeError(f"{where} describes a sweep: run it with 'secateur sweep'")
    try:
        return Recipe.model_validate(data).staged()
    except ValidationError as error:
        raise RecipeError(f"{where}: {explain(error.errors()[0], _MODELS)}") from None


def growing(stages: int, growth: str) -> list[float]:
    """The fraction of all training that each stage has: more and more, ``linear`` or as a ``cosine``, or ``constant``.

    Source: Adapt-Pruner, arXiv:2502.03460, and its official code.
    """
    if growth == "linear":
        return [2 * k / (stages * (stages + 1)) for k in range(1, stages + 1)]
    if growth == "cosine":
        ends = [1 - math.cos(k * math.pi / (2 * stages)) for k in range(stages + 1)]
        return [after - before for before, after in pairwise(ends)]
    return [1 / stages] * stages


def merge_reports(reports: Sequence[Report]) -> Report:
    """One report of steps that followed each other; layers are numbered as in the dense model.

    The fraction removed is that of the whole: 20 % and then half of the rest is 60 %. A mask of half and then one of
    60 % are 60 %, as what is zero already is what a second mask takes first. One by chance, or that compares other
    entries, doesn't: whoever has the cut model counts its zeros (``report.build.with_zeros_counted``).
    """
    whole = reports[0]
    for report in reports[1:]:
        whole = _followed_by(whole, report)
    if len(reports) > 1:
        whole.options = {f"step {number}: {one.method}": one.options for number, one in enumerate(reports, start=1)}
    return whole


def _followed_by(first: Report, second: Report) -> Report:
    gone = [cut.layer for cut in first.layers if cut.units.get("layer") == (1, 0)]
    left = [cut.layer for cut in first.layers if cut.layer not in gone]
    # a step after a removal of layers counts the layers that are left
    renumbered = {cut.layer: left[cut.layer] if cut.layer < len(left) else cut.layer for cut in second.layers}
    later = {renumbered[cut.layer]: cut for cut in second.layers}
    masked = max(first.masked, second.masked)
    return replace(
        second,
        method=first.method if first.method.endswith(second.method) else f"{first.method}+{second.method}",
        requested=f"{first.requested}, then {second.requested}",
        achieved=_compose(_cut_alone(first.achieved, first.masked), _cut_alone(second.achieved, second.masked), masked),
        masked=masked,
        layers=[_cut_again(cut, later.get(cut.layer)) for cut in first.layers] or second.layers,
        scores={**first.scores, **_named_as_before(second.scores, renumbered)},
        keep={**first.keep, **_named_as_before(second.keep, renumbered)},
        coverage=first.coverage or second.coverage,
        of_all=_of_all(first, second),
        recoveries=[*first.recoveries, *second.recoveries],
        notes=[*first.notes, *second.notes],
        seconds={
            stage: first.seconds.get(stage, 0.0) + second.seconds.get(stage, 0.0)
            for stage in {**first.seconds, **second.seconds}
        },
        calibration=second.calibration or first.calibration,
    )


def _cut_again(first: LayerCut, second: LayerCut | None) -> LayerCut:
    if second is None:
        return first
    units = dict(first.units)
    for kind, (before, after) in second.units.items():
        units[kind] = (first.units.get(kind, (before, before))[0], after)
    masked = max(first.masked, second.masked)
    cuts = [_cut_alone(cut.sparsity, cut.masked) for cut in (first, second)]
    matrices = {**first.matrices, **second.matrices}
    return replace(first, units=units, sparsity=_compose(*cuts, masked), matrices=matrices, masked=masked)


def _of_all(first: Report, second: Report) -> float | None:
    """What both remove of all block weights, where one of them couldn't reach all."""
    steps = (first, second)
    if all(step.of_all is None for step in steps):
        return None
    masked = [step.masked * step.share for step in steps]
    gone = [step.achieved if step.of_all is None else step.of_all for step in steps]
    return _compose(*map(_cut_alone, gone, masked), max(masked))


def _compose(*fractions: float) -> float:
    """What is removed by several steps, each of which removes a fraction of what the others leave."""
    return 1.0 - math.prod(1.0 - fraction for fraction in fractions)


def _cut_alone(removed: float, masked: float) -> float:
    """What is cut, where zeros are counted by themselves: a second mask begins with the zeros of the first."""
    return 1.0 - (1.0 - removed) / (1.0 - masked) if masked < 1 else 0.0


def _named_as_before(values: Mapping[str, Any], renumbered: Mapping[int, int]) -> dict[str, Any]:
    """Values by group, under the numbers that layers had before some of them left."""
    named = {}
    for name, value in values.items():
        room, _, rest = name.partition(".")
        layer, _, part = rest.partition(".")
        here = int(layer) if layer.isdecimal() else -1
        named[f"{room}.{renumbered[here]}.{part}" if here in renumbered else name] = value
    return named


_MODELS: dict[str, type[BaseModel]] = {"": Recipe, "calibration": CalibrationSpec, "steps": Step}


def explain(problem: Mapping[str, Any], models: Mapping[str, type[BaseModel]]) -> str:
    """One of pydantic's errors in our words; ``models`` maps places (``steps``) to what may stand there."""
    place, key = problem["loc"][:-1], str(problem["loc"][-1]) if problem["loc"] else ""
    inside = f" in {_place(place)}" if place else ""
    if problem["type"] == "extra_forbidden":
        known = models[".".join(str(part) for part in place if not isinstance(part, int))].model_fields
        return f"unknown key {shown(key)}{inside}{nearest(key, known) or '; valid are ' + ', '.join(known)}"
    if problem["type"] == "missing":
        return f"'{key}' is missing{inside}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if problem["type"] == "value_error":
        return f"{_place(problem['loc'])}: {message}" if problem["loc"] else message
    return f"{_place(problem['loc'])}: {message}, got {shown(problem['input'])}"


def _place(location: Sequence[str | int]) -> str:
    parts = list(location)
    if len(parts) >= 2 and parts[0] == "steps":
        parts[:2] = [f"step {int(parts[1]) + 1}"]
    return ".".join(str(part) for part in parts)


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem or error.context}"
    return " ".join(str(error).split())


def _kind(value: Any) -> str:
    return "an empty file" if value is None else f"a {'list' if isinstance(value, list) else 'single value'}"


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that refuses a key given twice and reads 2:4 as text and 1e-3 as a number.

    (YAML 1.1 takes 2:4 for a number to the base 60, and 1e-3 for text.) Aliases are refused, since a few lines of them
    unfold to more than any memory holds, and so is nesting beyond what a recipe can mean.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="recipes have no aliases (*name)", problem_mark=event.start_mark)
        if self._depth >= _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="it is nested too deeply", problem_mark=event.start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key_node, yaml.ScalarNode) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key}' is given twice", problem_mark=key_node.start_mark)
            seen.add(key if isinstance(key_node, yaml.ScalarNode) else id(key_node))
        return super().construct_mapping(node, deep=deep)


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_NUMBERS[0], re.compile(r"[-+]?(?:0|[1-9]\d*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _NUMBERS[1],
    re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|[-+]?\.inf$|\.nan$"),
    list("-+.0123456789"),
)
