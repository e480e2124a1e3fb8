"""The contract between the engine and a method.

The engine owns the sentence (observe, score, allocate, plan, cut) and a method supplies the words: which statistics
it needs, how a target is scored, how a budget is spread. A method never sees a model, a device, a file or a loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, get_args, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.allocate import CHANNEL_SCOPES, Allocator, MaskRule
from secateur.allocate.asked import parse_budgets
from secateur.criteria.groups import NORMALIZERS, REDUCTIONS, reduce_slices
from secateur.errors import OptionError, UsageError, nearest
from secateur.heal.refit import TARGETS, with_statistics
from secateur.observe import Cross, Gram, Moments, Statistic
from secateur.search import Descent
from secateur.structure.groups import TracedAnatomy
from secateur.structure.layers import Layer, layers_of
from secateur.structure.streams import residual_streams
from secateur.timing import Workload

DESCRIPTOR_VALUES: dict[str, tuple[str, ...]] = {
    "object": ("weights", "heads_and_neurons", "layers", "channels"),
    "granularity": ("element", "structured_group", "layer"),
    "when": ("post", "before_training"),
    "score": (
        "magnitude",
        "activation",
        "gradient",
        "second_order",
        "similarity",
        "random",
        "synaptic_flow",
        "density",
    ),
    "allocation": ("uniform", "global"),
    "recovery": ("none", "bias", "least_squares", "fresh_weights"),
    "data": ("none", "unlabelled_calibration", "labelled_calibration"),
    "supervision": ("none", "labels"),
    "speedup": ("none", "memory_only", "real"),
}


@dataclass(frozen=True, kw_only=True)
class Descriptor:
    """What a method is, in the words of the survey's taxonomy; other code reads this instead of asking for names.

    Raises ValueError when a field has a value outside ``DESCRIPTOR_VALUES``.
    """

    object: str
    granularity: str
    when: str = "post"
    score: str
    allocation: str
    recovery: str = "none"
    data: str
    supervision: str = "none"
    speedup: str

    def __post_init__(self) -> None:
        for name, allowed in DESCRIPTOR_VALUES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"descriptor.{name} must be one of {allowed}, got {getattr(self, name)!r}")


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A method option: its published default, meaning, unit and range. Feeds CLI, recipes, docs and range checks."""
    metadata = {"help": help, "unit": unit, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Target:
    """What a score looks at: the weight of a matrix, or of the module that reads the units of a group.

    ``weight`` is [outputs, inputs] (whatever the storage layout), float32 on the compute device; ``columns`` is
    [units, width], the input columns of each unit (empty for a matrix); a ``layer`` target has an empty weight.
    """

    name: str
    kind: str
    layer: int
    weight: Tensor
    columns: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))

    @property
    def units(self) -> int:
        """Number of units that are scored."""
        return self.columns.shape[0]


@dataclass(frozen=True)
class Part:
    """The slices of one parameter that belong to the units of a coupled group.

    ``weight`` is the whole parameter, ``index`` [units, width] the positions along ``dim`` of each unit. ``role`` is
    ``weight`` (two dimensions or more), ``scale`` (the weight of a norm) or ``bias``. ``gradient`` is that of the
    loss, ``curvature`` the product of its Hessian with the gradient, ``diagonal`` an estimate of the Hessian's
    diagonal, all shaped like the weight, and empty for methods whose ``needs`` don't name them.
    """

    tensor: str
    dim: int
    index: Tensor
    role: str
    weight: Tensor
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    curvature: Tensor = field(default_factory=lambda: torch.empty(0))
    diagonal: Tensor = field(default_factory=lambda: torch.empty(0))

    def per_unit(self, scores: Tensor) -> Tensor:
        """Scores of all entries of the parameter, as rows of the units, [units, entries of one unit]."""
        gathered = scores.movedim(self.dim, 0)[self.index.to(scores.device)]
        return gathered.flatten(1)


@dataclass(frozen=True)
class Consumer:
    """A matrix that reads channels, and what data told of its inputs.

    ``weight`` is [outputs, columns] float64; a column is a channel, in a convolution a channel at one position of the
    kernel. ``gram`` is that of the rows to which it is applied. ``columns`` are those of every unit of a group, int64,
    none where it doesn't read the unit.
    """

    name: str
    weight: Tensor
    gram: Gram
    columns: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Coupled:
    """A group of coupled channels as a criterion sees it; ``consumers`` for methods that need ``inputs``."""

    name: str
    units: int
    parts: tuple[Part, ...]
    consumers: tuple[Consumer, ...] = ()


@dataclass(frozen=True)
class Noise:
    """Uniform noise in [low, high) that stands in for data: ``samples`` inputs, drawn from ``seed``."""

    low: float
    high: float
    samples: int
    seed: int


@dataclass(frozen=True)
class Fitting:
    """How the weights that stay are fitted to inputs once it is known what leaves.

    ``noise`` stands in for data. With ``sequential`` a weight is fitted to what the fitted weights before it give,
    without, to the inputs of the dense network. ``norms`` says which statistics batch norms work with:

    - ``stored``: those that they have;
    - ``refit``: behind a change those of the inputs, which the network then keeps;
    - ``shift``: behind a change the stored ones moved by what the change did to those of the inputs;
    - ``own``: those of the inputs while these are looked at, after which the network has its stored ones again.
    """

    noise: Noise | None = None
    sequential: bool = True
    norms: str = "stored"


Flow = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Masks of weights by name, True = kept → synaptic flow through every parameter, shaped like it, float64."""


@dataclass(frozen=True)
class Whole:
    """A whole traced network, for methods that weigh its parts against each other.

    ``parameters`` are tensors by name; ``learned`` what the data told about them (``gradient``, ``curvature``,
    ``diagonal``), by name too; ``flow`` gives the synaptic flow of the network with masked weights.
    """

    groups: tuple[Coupled, ...]
    parameters: Mapping[str, Tensor]
    learned: Mapping[str, Mapping[str, Tensor]]
    flow: Flow
    anatomy: TracedAnatomy

    @cached_property
    def layers(self) -> list[Layer]:
        """Weights, with what they cost and the groups along which they lie."""
        return layers_of(self.anatomy)

    @cached_property
    def streams(self) -> frozenset[str]:
        """Names of the groups that residual connections carry."""
        return residual_streams(self.anatomy)


Seen = Mapping[str, Any]
"""What calibration told about the input of a target: statistic name → Statistic."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base class of all methods; the fields of a subclass are its options.

    ``statistics`` maps a name to the Statistic class that observes the input of every target. ``sequential`` asks
    for block-by-block calibration: later blocks see what the cut ones give. Raises OptionError for bad options.
    """

    name: ClassVar[str] = ""
    descriptor: ClassVar[Descriptor]
    statistics: ClassVar[Mapping[str, type[Statistic]]] = {}
    sequential: ClassVar[bool] = False
    costly: ClassVar[bool] = False
    """Whether even a small language model takes a minute or more, whatever the data."""

    def __post_init__(self) -> None:
        check_options(self, self.name or type(self).__name__)

    @classmethod
    def option_fields(cls) -> dict[str, dataclasses.Field[Any]]:
        """The options by name; metadata holds help, unit and range."""
        return {f.name: f for f in dataclasses.fields(cls)}

    def options(self) -> dict[str, Any]:
        """The options as plain values, for provenance."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def needed_statistics(self) -> Mapping[str, type[Statistic]]:
        """The statistics that these options need; by default all of the class."""
        return self.statistics

    @property
    def refits(self) -> bool:
        """Whether the engine solves for what stays, on top of what the method decides."""
        return False

    @property
    def refits_later(self) -> bool:
        """Whether it does so in a walk of its own, since everything is decided on the dense model first."""
        return False

    @property
    def in_sequence(self) -> bool:
        """Whether later blocks see what the cut ones give, in the walk that decides."""
        return self.sequential

    def observed_statistics(self) -> Mapping[str, type[Statistic]]:
        """All that is observed in the walk that decides: what the method needs, and what heals on the way."""
        return self.needed_statistics()

    @property
    def uses_data(self) -> bool:
        """Whether calibration data is needed."""
        return self.refits or bool(self.observed_statistics())


@dataclass(frozen=True, kw_only=True)
class WeightMethod(Method):
    """Zeroes single weights. Subclasses give ``score``; the engine masks by ``rule`` and keeps what ranks highest."""

    sparsity: float = option(0.5, "fraction of the weights of every matrix that is removed", ge=0, lt=1)
    pattern: str = option("", "N:M pattern, N zeros in every M consecutive inputs (2:4); overrides sparsity")
    heal: str = option(
        "none",
        "refit: solve for the weights that stay by least squares, whatever chose them",
        choices=("none", "refit"),
    )
    target: str = option(
        "current",
        "what least squares aim at: outputs of the dense weight on the inputs as they are now, or of the dense model",
        choices=TARGETS,
    )

    fits: ClassVar[bool] = False
    """Whether the method itself solves for weights by the ``target``."""
    rounds_up: ClassVar[bool] = False
    """Whether a fraction of a weight is one that leaves."""
    sweeps: ClassVar[bool] = False
    """Whether it goes through a matrix column by column."""

    @property
    def decides_globally(self) -> bool:
        """Whether all weights of the model compete, so that their scores are kept until the end."""
        return getattr(self, "scope", "") == "global" and not self.pattern

    @property
    def refits(self) -> bool:
        return self.heal == "refit"

    @property
    def refits_later(self) -> bool:
        return self.refits and (self.decides_globally or bool(self.statistics and not self.sequential))

    @property
    def in_sequence(self) -> bool:
        return not self.decides_globally and (self.sequential or (self.refits and not self.refits_later))

    def observed_statistics(self) -> Mapping[str, type[Statistic]]:
        more: list[type[Statistic]] = [Gram] if self.refits and not self.refits_later else []
        if self.target == "dense" and (more or self.fits):
            more.append(Cross)
        return with_statistics(self.needed_statistics(), *more)

    def refit_statistics(self) -> Mapping[str, type[Statistic]]:
        """What is observed in a walk that only refits."""
        return with_statistics({}, Gram, *([Cross] if self.target == "dense" else []))

    def solve_flops(self, outputs: int, inputs: int) -> int:
        """Operations of the products by which the method itself finds new weights for one matrix; for estimates."""
        return 0

    def input_flops(self, inputs: int) -> int:
        """Operations of what is computed once for all matrices that read one input; for estimates."""
        return 0

    def solve_bytes(self, outputs: int, inputs: int) -> int:
        """Bytes that this takes on top of the matrix; for estimates."""
        return 0

    def score(self, target: Target, seen: Seen) -> Tensor:
        """Score of every weight, [outputs, inputs], higher = keep."""
        raise NotImplementedError(f"{type(self).__name__} must define score() or prune()")

    def rule(self) -> MaskRule:
        """Who competes with whom, and how many stay."""
        raise NotImplementedError(f"{type(self).__name__} must define rule()")

    def step(self, shape: tuple[int, int]) -> int:
        """By how many weights the loss of a matrix of this shape, (outputs, inputs), grows at a time.

        An allocator gives every matrix a multiple of it, so that what it asks for is what leaves.
        """
        # a method that prunes in its own way, and rules of others, take any number of weights
        rule = self.rule() if type(self).rule is not WeightMethod.rule else None
        return rule.step(shape) if hasattr(rule, "step") else 1  # type: ignore[union-attr]

    def prune(self, target: Target, seen: Seen) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
        """(mask [outputs, inputs] bool with True = kept, new weight or None, notes for the plan)."""
        return self.rule().keep(self.score(target, seen)), None, ()


@dataclass(frozen=True, kw_only=True)
class SearchMethod(Method):
    """Searches masks of single weights on the whole model, which lies in memory, by its loss; no weight is changed.

    ``score`` and ``rule`` give the first mask of every matrix, from the dense model, and ``descent`` says how the
    engine goes on from there. The number of weights that a matrix keeps is that of its first mask.
    """

    sparsity: float = option(0.5, "fraction of the weights of every matrix that is removed", ge=0, lt=1)

    @property
    def uses_data(self) -> bool:
        return True

    @property
    def needs_gradient(self) -> bool:
        """Whether ``score`` looks at the gradient of the dense model's loss, ``seen["gradient"]``."""
        return False

    def score(self, target: Target, seen: Seen) -> Tensor:
        """Score of every weight, [outputs, inputs], higher = keep; those that rank lowest and highest stay so."""
        raise NotImplementedError(f"{type(self).__name__} must define score()")

    def rule(self) -> MaskRule:
        """Who competes with whom for the first mask, and how many stay."""
        raise NotImplementedError(f"{type(self).__name__} must define rule()")

    def descent(self) -> Descent:
        """How the masks are searched."""
        raise NotImplementedError(f"{type(self).__name__} must define descent()")


@dataclass(frozen=True, kw_only=True)
class UnitMethod(Method):
    """Removes whole heads and FFN neurons."""

    sparsity: float = option(0.2, "fraction of the budget (by default of the blocks' parameters) removed", ge=0, lt=1)
    budget: str = option(
        "params",
        "what the sparsity is a fraction of (params, macs, bytes, kv_bytes, latency), or fractions of the dense model"
        " that may stay, all of them together (latency=0.7,kv_bytes=0.5)",
    )
    uniform: bool = option(False, "the best widths that are equal in every layer, so that the checkpoint stays plain")
    variants: str = option(
        "measured",
        "with uniform, kv_bytes, latency or fractions, what a group with fewer units loses: the KL divergence measured"
        " with all other groups whole, or the sum of the scores of what leaves",
        choices=("measured", "scores"),
    )
    variant_tokens: int = option(512, "calibration tokens on which variants are measured", unit="tokens", ge=1)
    workload: str = option("batch=1,prompt=256,new=32", "the request whose latency is a budget", unit="tokens")
    heads: str = option(
        "kv", "attention unit: a key-value head with its queries, or one query head of each", choices=("kv", "query")
    )
    min_keep: int = option(1, "units that every group keeps at least", unit="units", ge=1)
    round_to: int = option(1, "kept FFN neurons are a multiple of this", unit="neurons", ge=1)
    heal: str = option(
        "none",
        "bias: put the mean of what leaves into a bias; refit: solve for the columns that stay by least squares",
        choices=("none", "bias", "refit"),
    )
    target: str = option(
        "current",
        "what least squares aim at: outputs of the dense weight on the inputs as they are now, or of the dense model",
        choices=TARGETS,
    )

    kinds: ClassVar[tuple[str, ...]] = ("kv_head", "head", "neuron")
    asking: ClassVar[tuple[str, ...]] = (
        "sparsity", "budget", "uniform", "variants", "variant_tokens", "workload", "min_keep", "round_to",
    )  # fmt: skip
    """Options that say how much may stay, and not what is worth keeping."""
    fits: ClassVar[bool] = False
    """Whether the method itself judges units by the ``target``."""

    @property
    def refits(self) -> bool:
        return self.heal == "refit"

    @property
    def refits_later(self) -> bool:
        return self.refits and not self.in_sequence

    @property
    def compensates(self) -> bool:
        """Whether a bias may make up for what leaves."""
        return self.heal == "bias" or type(self).compensate is not UnitMethod.compensate

    def observed_statistics(self) -> Mapping[str, type[Statistic]]:
        more: list[type[Statistic]] = [Moments] if self.heal == "bias" else []
        if self.refits and not self.refits_later:
            more = list(self.refit_statistics().values())
        elif self.fits:
            more += [Cross] if self.target == "dense" else []
        return with_statistics(self.needed_statistics(), *more)

    def refit_statistics(self) -> Mapping[str, type[Statistic]]:
        """What is observed to refit columns, and the bias with them."""
        more = [Moments] if self.compensates else []
        return with_statistics({}, Gram, *more, *([Cross] if self.target == "dense" else []))

    def revise(self, target: Target, seen: Seen, removed: Tensor) -> Tensor:
        """The units that leave, ascending int64 [removed], once their number is known; by default as allocated."""
        return removed

    def solve_flops(self, outputs: int, inputs: int) -> int:
        """Operations of the products by which the method judges the units of one weight; for estimates."""
        return 0

    def __post_init__(self) -> None:
        super().__post_init__()
        Workload.parse(self.workload)
        if "kv_bytes" in self.asked and self.heads == "query":
            raise OptionError("budget kv_bytes needs heads=kv: single query heads leave the KV cache as it is")

    @cached_property
    def asked(self) -> Mapping[str, float]:
        """Budget → fraction of the dense model that may stay."""
        return parse_budgets(self.budget, self.sparsity)

    @property
    def programmed(self) -> bool:
        """Whether an integer programme decides how many units stay, in place of the method's own allocator."""
        return self.uniform or "=" in self.budget or self.budget in ("kv_bytes", "latency")

    @property
    def uses_data(self) -> bool:
        return super().uses_data or (self.programmed and self.variants == "measured")

    @property
    def in_sequence(self) -> bool:
        # how many units stay of a block depends on all others, so all are scored in the dense model
        return super().in_sequence and not self.programmed

    def options(self) -> dict[str, Any]:
        # where the budget says what stays, nothing asks for the sparsity, and nobody should read its default
        found = super().options()
        if "=" in self.budget:
            del found["sparsity"]
        return found

    def score(self, target: Target, seen: Seen) -> Tensor:
        """Score of every unit, [units], higher = keep."""
        raise NotImplementedError(f"{type(self).__name__} must define score()")

    def allocator(self) -> Allocator:
        """How the budget is spread over groups."""
        raise NotImplementedError(f"{type(self).__name__} must define allocator()")

    def compensate(self, target: Target, seen: Seen, removed: Tensor) -> Tensor | None:
        """Addition to the reader's bias, [outputs] float32, for the removed units; None = no compensation."""
        return None


@dataclass(frozen=True, kw_only=True)
class LayerMethod(Method):
    """Removes whole decoder blocks. Statistics see (block input, block output)."""

    sparsity: float = option(0.2, "fraction of the decoder blocks removed, rounded down", ge=0, lt=1)
    layers: int = option(0, "number of blocks to remove; 0 = by sparsity", unit="blocks", ge=0)

    def score(self, target: Target, seen: Seen) -> float:
        """Score of one block, higher = keep."""
        raise NotImplementedError(f"{type(self).__name__} must define score()")


@dataclass(frozen=True, kw_only=True)
class ChannelMethod(Method):
    """Removes coupled channels of any network, found by tracing it.

    ``importance`` scores single parameters; what is coupled is put together by ``reduction`` and brought to one
    scale by ``normalizer`` (SPA, arXiv:2403.18955, §4). ``needs`` names what it wants beside the weights:
    ``gradient``, ``curvature``, ``diagonal``, or ``inputs``, what the weights that read the channels are applied to.
    With ``per_batch`` scores of single batches are averaged, without, gradients are.
    """

    sparsity: float = option(0.3, "fraction of the budget that is removed", ge=0, lt=1)
    budget: str = option(
        "params", "what the sparsity is a fraction of", choices=("params", "macs", "bytes", "channels", "latency")
    )
    scope: str = option(
        "global", "all channels are ranked together, or every group loses the same share", choices=CHANNEL_SCOPES
    )
    reduction: str = option(
        "sum", "how scores of coupled slices and their entries are put together", choices=tuple(REDUCTIONS)
    )
    normalizer: str = option("mean", "what the scores of a group are divided by", choices=tuple(NORMALIZERS))
    heads: str = option(
        "outer",
        "what leaves of attention: whole heads, the same lane of every head, or both",
        choices=("outer", "inner", "both"),
    )
    min_keep: int = option(1, "channels that every group keeps at least", unit="channels", ge=1)
    round_to: int = option(1, "kept channels are a multiple of this", unit="channels", ge=1)

    needs: ClassVar[tuple[str, ...]] = ()
    per_batch: ClassVar[bool] = False
    only_modules: ClassVar[str] = ""
    """Why an ONNX model won't do, for methods that must run the network or build it anew."""

    def needed(self) -> tuple[str, ...]:
        """What these options need of data; by default all that the class does."""
        return self.needs

    def schedule(self) -> tuple[float, ...]:
        """The sparsities that are reached one after the other; scores are taken anew before each."""
        return (self.sparsity,)

    def budgets(self, sparsity: float) -> Mapping[str, float]:
        """Budget → fraction of it that leaves at least; the first is met within a unit."""
        return {self.budget: sparsity}

    def initialisation(self) -> str:
        """How the cut layers start, see ``Provenance.initialised``; empty when they keep their weights."""
        return ""

    def importance(self, part: Part) -> Tensor | None:
        """Score of every entry of a parameter, shaped like it, higher = keep; None leaves the parameter out."""
        raise NotImplementedError(f"{type(self).__name__} must define importance(), score() or scores()")

    def reduced(self, group: Coupled, importance: Callable[[Part], Tensor | None]) -> Tensor | None:
        """Scores of entries put together for every unit of a group, [units] float64; None when there are none."""
        rows = []
        for part in group.parts:
            scores = importance(part)
            if scores is not None:
                rows.append(reduce_slices(scores, part.dim, part.index, self.reduction))
        return REDUCTIONS[self.reduction](torch.stack(rows, dim=1)) if rows else None

    def score(self, group: Coupled) -> Tensor | None:
        """Score of every unit of a group, [units] float64, higher = keep; None keeps the whole group."""
        return self.reduced(group, self.importance)

    def layer_densities(self, whole: Whole) -> NDArray[np.float64] | None:
        """The fraction of its weights that each of ``whole.layers`` should keep; None for methods that don't say."""
        return None

    def scores(self, whole: Whole) -> Mapping[str, Tensor | None]:
        """``score`` of every group by name, for methods that look at more than one group at a time.

        Scores of more units than a group has are those of copies, round by round: entry units + u is a second unit u.
        """
        return {group.name: self.score(group) for group in whole.groups}

    def fitting(self) -> Fitting | None:
        """How weights are fitted to inputs after the choice; None leaves them as they are."""
        return None

    def compensate(self, consumer: Consumer, gone: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """(new weight [outputs, columns] with zeros in ``gone``, notes for the plan); ``gone`` is bool [columns]."""
        raise NotImplementedError(f"{type(self).__name__} must define compensate() where it has a fitting()")

    def normalized(self, scores_U: Tensor) -> Tensor:
        """The scores of one group on the scale on which groups compete."""
        return NORMALIZERS[self.normalizer](scores_U)


def check_for_decoders(method: Method) -> None:
    """Raises UsageError for a method that removes channels of traced modules, for which a decoder has other words."""
    if method.descriptor.object == "channels":
        raise UsageError(
            f"{method.name} removes coupled channels of a traced module: call secateur.prune with example_inputs, or"
            " take a method for language models ('secateur methods' shows them all)"
        )


def check_options(options: Any, name: str) -> None:
    """Raises OptionError when a field of this dataclass has a value of the wrong type or out of its range."""
    hints = get_type_hints(type(options))
    for spec in dataclasses.fields(options):
        _check_option(name, spec, getattr(options, spec.name), hints[spec.name])


def _check_option(method: str, spec: dataclasses.Field[Any], value: Any, hint: Any) -> None:
    meta, name = spec.metadata, spec.name
    kinds = get_args(hint) or (hint,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(k.__name__ for k in kinds)
        raise OptionError(f"{method}: {name} must be of type {wanted}, got {value!r}")
    if meta.get("choices") and value not in meta["choices"]:
        choices = ", ".join(meta["choices"])
        raise OptionError(
            f"{method}: {name} must be one of {choices}, got {value!r}{nearest(str(value), meta['choices'])}"
        )
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not _in_range(meta, value):
        raise OptionError(f"{method}: {name} must lie in {interval(meta)}, got {value!r} ({meta.get('help', '')})")


def _in_range(meta: Mapping[str, Any], value: float) -> bool:
    # written so that NaN is refused wherever there is a bound
    return (
        (meta.get("ge") is None or value >= meta["ge"])
        and (meta.get("gt") is None or value > meta["gt"])
        and (meta.get("le") is None or value <= meta["le"])
        and (meta.get("lt") is None or value < meta["lt"])
    )


def interval(meta: Mapping[str, Any]) -> str:
    """The range of an option as text: ``[0, 1)``; an empty string when it has none."""
    low, high = (meta.get("ge"), meta.get("gt")), (meta.get("le"), meta.get("lt"))
    if low == high == (None, None):
        return ""
    left = f"[{low[0]:g}" if low[0] is not None else f"({low[1]:g}" if low[1] is not None else "(-inf"
    right = f"{high[0]:g}]" if high[0] is not None else f"{high[1]:g})" if high[1] is not None else "inf)"
    return f"{left}, {right}"
