"""The result of a run as data; ``tables`` and ``html`` only draw it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from secateur.provenance import Coverage

if TYPE_CHECKING:
    from secateur.structure.following import Way

BYTES_ON_DISK = "bytes on disk"
DECODE, DECODE_PRODUCTS, DECODE_BOUND = "decode", "decode, products alone", "decode bound"


@dataclass(frozen=True)
class Metric:
    """One number per model. ``values`` maps the model's name to the value; the first model is the dense baseline.

    ``higher_is_better`` is None for plain facts. ``protocol`` says how it was measured: data set, join, window,
    token count, batch, repeats. ``parts`` are what a value was computed from, by model: the mean loss of every window
    in nats, or the score of every item, in the same order for all models; the value rises with their mean. Empty where
    nothing of the kind is known. ``exponential`` where the value is the exponential of that mean, as a perplexity is.
    ``repeats`` are the values of every repeat, by model, where repeats were interleaved over the models.
    """

    name: str
    unit: str
    values: dict[str, float]
    higher_is_better: bool | None = None
    protocol: str = ""
    parts: dict[str, list[float]] = field(default_factory=dict)
    exponential: bool = False
    repeats: dict[str, list[float]] = field(default_factory=dict)

    def change(self, model: str) -> float | None:
        """Relative change against the first model, as a fraction; None when the baseline is 0 or absent.

        Of interleaved repeats it is the median of the ratios of each: two medians can be those of a repeat that
        another program has slowed down and of one that it hasn't.
        """
        first = next(iter(self.values), None)
        if first is None or not self.values[first] or model not in self.values:
            return None
        mine, theirs = self.repeats.get(model, []), self.repeats.get(first, [])
        if mine and len(mine) == len(theirs) and all(theirs):
            return median(after / before for after, before in zip(mine, theirs, strict=True)) - 1.0
        return self.values[model] / self.values[first] - 1.0


@dataclass(frozen=True)
class LayerCut:
    """What was cut in one decoder block: units before and after by kind, fraction of its linear weights removed."""

    layer: int
    units: dict[str, tuple[int, int]] = field(default_factory=dict)
    """kind (``kv_head``, ``head``, ``neuron``, ``layer``) → (before, after)"""
    sparsity: float = 0.0
    matrices: dict[str, float] = field(default_factory=dict)
    """name of the matrix within the block → fraction of its entries that is zero (weight methods)"""
    masked: float = 0.0
    """fraction of the linear weights that are left and that a mask makes zero"""


@dataclass(frozen=True)
class Sample:
    """One greedy continuation per model."""

    prompt: str
    outputs: dict[str, str]


@dataclass
class Report:
    """What was cut, what it cost and what it gained."""

    model: str
    method: str
    options: dict[str, Any]
    requested: str
    achieved: float
    """fraction of the blocks' parameters (or of their entries) that is gone"""
    masked: float = 0.0
    """fraction of the linear weights that are left and that a mask makes zero"""
    layers: list[LayerCut] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)
    """group name → score of every unit, higher = kept first"""
    keep: dict[str, list[int]] = field(default_factory=dict)
    """group name → kept units"""
    groups: dict[str, int] = field(default_factory=dict)
    """group name → channels before; of traced networks only"""
    ways: list[Way] = field(default_factory=list)
    """how the channels of a group run through a traced network, for the picture"""
    loading: str = ""
    """Python that loads a traced network"""
    metrics: list[Metric] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """wall time of the stages: calibrate, cut, evaluate, save"""
    output: str | None = None
    revision: str = ""
    """commit of a model of the hub"""
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    """trainings after the cut: how, and the loss and held-out perplexity by step"""
    trainings: list[dict[str, Any]] = field(default_factory=list)
    """trainings from a recipe: the recipe, loss, learning rate and sparsity by step, and what was measured"""
    coverage: dict[str, Any] | None = None
    """what of the blocks could be reached, as in the plan's provenance; None where that was all of their weights"""
    of_all: float | None = None
    """``achieved`` as a fraction of all block weights, where not all could be reached"""
    plain: bool | None = None
    """True when stock transformers loads the checkpoint without remote code"""

    @property
    def share(self) -> float:
        """The fraction of the block weights that could be reached."""
        return 1.0 if self.coverage is None else Coverage.model_validate(self.coverage).share

    @property
    def reach(self) -> str:
        """One sentence about what was left alone, with the fraction of all block weights that is gone; or nothing."""
        if self.coverage is None or self.of_all is None:
            return ""
        sentence = Coverage.model_validate(self.coverage).sentence
        gone = f"{100 * self.achieved:.1f} % of what it reaches is gone, {100 * self.of_all:.1f} % of all block weights"
        return f"{self.method} {sentence}; {gone}"

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Report:
        """The report of a decoder that ``to_dict`` gave. Raises TypeError, KeyError or ValueError for anything else."""
        data = {key: value for key, value in found.items() if key not in ("groups", "ways", "loading")}
        data["layers"] = [
            LayerCut(**{**cut, "units": {kind: (before, after) for kind, (before, after) in cut["units"].items()}})
            for cut in found["layers"]
        ]
        data["metrics"] = [
            # JSON has no NaN and no infinity
            Metric(**{**metric, "values": {m: math.nan if v is None else v for m, v in metric["values"].items()}})
            for metric in found["metrics"]
        ]
        data["scores"] = {
            name: [math.nan if score is None else score for score in scores] for name, scores in found["scores"].items()
        }
        data["samples"] = [Sample(**sample) for sample in found["samples"]]
        return cls(**data)
