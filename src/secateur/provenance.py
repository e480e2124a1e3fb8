"""How a plan came to be: method, options, model, calibration and versions; enough to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer


class Fingerprint(BaseModel):
    """Which model a plan was made for: ``shapes`` must match, ``weights`` should."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    shapes: str
    weights: str
    num_layers: int
    name: str = ""
    revision: str = ""
    """The commit of a model of the hub."""

    @model_serializer(mode="wrap")
    def _without_empty_revision(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # plans for local models keep the bytes that they had before there were revisions
        return {key: value for key, value in handler(self).items() if key != "revision" or value}

    @property
    def label(self) -> str:
        """Name for people, with the first digits of the commit: ``owner/name@0123456789ab``."""
        return f"{self.name}@{self.revision[:12]}" if self.revision else self.name


class CalibrationInfo(BaseModel):
    """Which data the statistics were taken from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    samples: int
    length: int
    tokens: int
    seed: int
    sha256: str
    random_windows: bool = False
    """Whether the seed drew where the windows start; they are the first consecutive ones otherwise."""

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # plans of consecutive windows keep the bytes that they had before there were others
        return {key: value for key, value in handler(self).items() if key != "random_windows" or value}


class ExampleInputs(BaseModel):
    """The example inputs that a module was traced with: shapes and types, enough to trace it again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: str
    """How the leaves make (args, kwargs): a tree of torch.utils._pytree as JSON."""
    leaves: tuple[dict[str, Any], ...]
    """``{"shape", "dtype"}`` of a tensor, and ``free`` dimensions of any size; ``{"value"}`` of anything else."""


class Allocation(BaseModel):
    """How the sparsity was spread: the allocator, its options, and the fraction that every matrix lost, by module.

    Where heads and neurons left, ``sparsities`` are the fractions of them that blocks were to lose, by ``layers.3``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    allocator: str
    options: dict[str, Any] = Field(default_factory=dict)
    sparsities: dict[str, float] = Field(default_factory=dict)

    @property
    def label(self) -> str:
        """For people: ``owl:lam=0.08,m=5.0``."""
        options = ",".join(f"{key}={value}" for key, value in sorted(self.options.items()) if value is not None)
        return f"{self.allocator}:{options}" if options else self.allocator


class BudgetAccount(BaseModel):
    """A budget and what came of it: ``asked`` is the fraction of the dense cost that may stay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    asked: float
    dense: float
    pruned: float
    """Counted, or expected from measurements."""
    unit: str = ""


class LeftAlone(BaseModel):
    """Weights of the blocks that no method for matrices reaches: ``count`` tensors with ``params`` entries in all.

    ``pattern`` is their name, with ``*`` for the number of the block; ``kind`` is a plural for people.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str
    kind: str
    count: int
    params: int


class Coverage(BaseModel):
    """How much of the blocks a method can reach: ``reached`` of ``weights`` entries; the rest is ``left_alone``.

    Vectors (norms, biases) are counted on neither side, as they are in no published ratio.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: int
    reached: int
    left_alone: tuple[LeftAlone, ...]

    @property
    def share(self) -> float:
        """The fraction of the block weights that is reached."""
        return self.reached / self.weights if self.weights else 1.0

    @property
    def sentence(self) -> str:
        """For people: ``reaches 11 % of the block weights; left alone: 24 fused expert tensors (layers.*.mlp...)``."""
        return f"reaches {_percent(self.share)} of the block weights; left alone: {self.names}"

    @property
    def names(self) -> str:
        """What is left alone, by kind, the largest first: count, plural and patterns of names."""
        kinds: dict[str, list[LeftAlone]] = {}
        for item in sorted(self.left_alone, key=lambda item: -item.params):
            kinds.setdefault(item.kind, []).append(item)
        return ", ".join(_kind_named(kind, items) for kind, items in kinds.items())


# patterns of one kind in a sentence; a model has a handful in all
_PATTERNS_SHOWN = 4


def _kind_named(kind: str, items: list[LeftAlone]) -> str:
    count = sum(item.count for item in items)
    patterns = [item.pattern for item in items]
    more = ", ..." if len(patterns) > _PATTERNS_SHOWN else ""
    return f"{count:,} {kind} ({', '.join(patterns[:_PATTERNS_SHOWN])}{more})"


def _percent(share: float) -> str:
    """Whole percent; with decimals where these would be all or nothing."""
    whole = f"{100 * share:.0f}"
    return f"{whole} %" if whole not in ("0", "100") or share in (0.0, 1.0) else f"{100 * share:.4g} %"


class Recovery(BaseModel):
    """Training after the cut: what was trained, how, on what and towards whom; the plan doesn't hold the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str
    options: dict[str, Any] = Field(default_factory=dict)
    data: CalibrationInfo
    teacher: str = ""
    tokens: int
    """How many tokens were trained on."""
    before: float
    """Perplexity of the text that was held out, before training and after it."""
    after: float
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """For people: ``lora, loss kl, 300 steps, 307,200 tokens``."""
        options = self.options
        return f"{self.train}, loss {options['loss']}, {options['steps']} steps, {self.tokens:,} tokens"


class Provenance(BaseModel):
    """How a plan came to be; enough to make it again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    model: Fingerprint
    calibration: CalibrationInfo | None = None
    seed: int = 0
    dtype: str = "float32"
    versions: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What the user should know: damping that had to be raised, rows that tied, layers left alone."""
    inputs: ExampleInputs | None = None
    """Of a traced module; None for decoders, whose groups come from their architecture."""
    initialised: str = Field(default="", pattern="^(fresh|first)?$")
    """How layers start that change: with what they keep (empty), drawn anew (``fresh``), or with what they keep
    at the scale of a new draw (``first``)."""
    allocation: Allocation | None = None
    """Where the sparsity went, when an allocator said so."""

    def allocated(self, sparsities: Mapping[str, float] | None) -> Provenance:
        """The same with the sparsities that its allocator has chosen."""
        if self.allocation is None:
            return self
        chosen = self.allocation.model_copy(update={"sparsities": dict(sparsities or {})})
        return self.model_copy(update={"allocation": chosen})

    budgets: dict[str, BudgetAccount] = Field(default_factory=dict)
    """Budgets that were met together, by name; empty where the method spread one by itself."""
    recoveries: tuple[Recovery, ...] = ()
    """How the model was trained after it was cut, in order."""
    coverage: Coverage | None = None
    """What of the blocks the method could reach; None where that is all of their weights."""

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # plans keep the bytes that they had before there were these
        optional = ("inputs", "initialised", "allocation", "budgets", "recoveries", "coverage")
        return {key: value for key, value in handler(self).items() if key not in optional or value}
