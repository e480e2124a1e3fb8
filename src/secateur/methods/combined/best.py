"""Best: the combination of method, allocator and repair that measured best, for what is cut and the time there is.

    cut                            effort           combination
    weights, up to 65 %            seconds          wanda, heal=refit
    weights, up to 65 %            minutes, hour    alps, target=stream, true_sequential
    weights, more                  seconds          wanda, heal=refit
    weights, more                  minutes, hour    alps, target=stream, true_sequential, allocate=progression
    weights in a pattern (2:4)     seconds          wanda, heal=refit
    weights in a pattern (2:4)     minutes, hour    alps, target=stream, true_sequential
    neurons, up to 45 %            seconds          cfsp
    neurons, up to 45 %            minutes, hour    cfsp, heal=refit, target=stream
    heads and neurons              seconds          flap
    heads and neurons              minutes, hour    osscar

ALPS whose matrices are decided one after the other, with the last of a block making up for a quarter of what is lost
by then, was 5, 13 and 25 % ahead of ALPS as published at 50, 60 and 70 %, there with unequal sparsities, and 14 % at
2:4; on a text of another kind as much or more; and on Gemma 3 270M 5, 13, 24 and 14 %. A budget that counts weights,
MACs or bytes takes neurons alone, as long as there are enough: CFSP's neurons were ahead of FLAP's heads and neurons
at 20 and 40 %, and with a refit and that target 4, 7 and 16 % ahead of OSSCAR's at 20, 30 and 40 %, on Gemma 3 6,
4 and 6 %. More, and budgets of the KV cache, of latency or of several things, take heads too. Wanda whose
kept weights are fitted anew was ahead of SparseGPT at 50, 60 and 70 % and at 2:4, for a tenth more time.
Unequal sparsities were measured at 50 %, where they cost, and at 70 %, where they gain: the border lies between.
`cut=auto` takes heads and neurons where a budget is asked for, which single weights can't meet, and weights else. The
plan names what was taken, with all options, so that the same can be asked for without this name. Efforts are what a
model of some hundred million parameters takes on two cores; nothing that takes an hour has been measured ahead of
what takes minutes yet. An allocator or a target that is asked for replaces the one in the table.

Source: the studies benchmarks/second_order.py, docs/results/second-order-smollm2-135m.md, in part on a second model,
docs/results/second-order-gemma3-270m.md, and benchmarks/structured.py, docs/results/compare-smollm2-135m.md.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from secateur.allocate.asked import OF_WEIGHTS, parse_budgets
from secateur.errors import OptionError
from secateur.methods import Combination, Descriptor, Preset, get_method, option, register

_QUICK = Combination(method="wanda", options={"heal": "refit"})
_REPAIRING = {"target": "stream", "true_sequential": True}
_EVEN = Combination(method="alps", options=_REPAIRING)
_SPREAD = Combination(method="alps", allocate="progression", options=_REPAIRING)
_NEURONS = Combination(method="cfsp", options={"heal": "refit", "target": "stream"})
_UNITS = Combination(method="osscar")
_CHOICES = {
    "weights": {"seconds": _QUICK, "minutes": _EVEN, "hour": _EVEN},
    "most weights": {"seconds": _QUICK, "minutes": _SPREAD, "hour": _SPREAD},
    "pattern": {"seconds": _QUICK, "minutes": _EVEN, "hour": _EVEN},
    "neurons": {"seconds": Combination(method="cfsp"), "minutes": _NEURONS, "hour": _NEURONS},
    "heads_and_neurons": {"seconds": Combination(method="flap"), "minutes": _UNITS, "hour": _UNITS},
}
# above it an early block should stay denser than a late one
_MOST = 0.65
# beyond it so many neurons would leave that nobody has measured whether heads shouldn't
_MOST_NEURONS = 0.45


@register("best")
@dataclass(frozen=True, kw_only=True)
class Best(Preset):
    """Options of the choice; what is chosen has its own defaults."""

    sparsity: float = option(0.5, "fraction that is removed", ge=0, lt=1)
    pattern: str = option("", "N:M pattern of single weights (2:4); overrides sparsity")
    budget: str = option("", "of heads and neurons: what the sparsity is a fraction of, or fractions that may stay")
    cut: str = option("auto", "what is removed", choices=("auto", "weights", "heads_and_neurons"))
    effort: str = option("minutes", "what planning may take on a small model", choices=tuple(_CHOICES["weights"]))
    target: str = option(
        "auto", "what least squares aim at; auto: what measured best", choices=("auto", "current", "stream")
    )
    seed: int = option(0, "seed of searches", ge=0)

    costly: ClassVar[bool] = True
    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        score="second_order",
        allocation="by_layer",
        recovery="least_squares",
        data="unlabelled_calibration",
        speedup="memory_only",
    )

    def combination(self) -> Combination:
        units = self.cut == "heads_and_neurons" or (self.cut == "auto" and bool(self.budget))
        if units and self.pattern:
            raise OptionError(f"best: pattern {self.pattern} is for single weights, not for heads and neurons")
        if not units and self.budget:
            raise OptionError(f"best: single weights meet no budget of {self.budget}: leave cut=weights out")
        chosen = _CHOICES[self._units() if units else self._weights()][self.effort]
        known = get_method(chosen.method).option_fields()
        budget, sparsity = self._asked
        values = {"budget": budget, "pattern": self.pattern, "target": self.target, "seed": self.seed}
        given = {name: value for name, value in values.items() if name in known and value not in ("", "auto")}
        return replace(chosen, options={**chosen.options, "sparsity": sparsity, **given})

    @property
    def _asked(self) -> tuple[str, float]:
        """Budget and sparsity; what may stay of one thing, as in params=0.7, is what a sparsity says of it."""
        parts = parse_budgets(self.budget, self.sparsity) if "=" in self.budget else {}
        if len(parts) == 1 and parts.keys() <= set(OF_WEIGHTS):
            [(name, left)] = parts.items()
            return name, round(1 - left, 9)
        return self.budget, self.sparsity

    def _units(self) -> str:
        budget, sparsity = self._asked
        few = sparsity <= _MOST_NEURONS and budget in {"", *OF_WEIGHTS}
        return "neurons" if few or "neurons" in budget else "heads_and_neurons"

    def _weights(self) -> str:
        return "pattern" if self.pattern else "most weights" if self.sparsity > _MOST else "weights"
