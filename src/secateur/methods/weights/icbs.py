"""iCBS: search the mask on a quadratic model of the loss, a block of doubtful weights at a time.

For n weights of one matrix, w0 their original and w their current values, d = w - w0, x_i = 1 prunes weight i:

    dL(x) = gm * g'delta + 1/2 delta' H delta + lam ||delta||^2,   delta = -(d + w0 * x)
          = x'Qx + c
    Q     = 1/2 diag(w0) H diag(w0) + diag(w0 * (H d - gm * g + lam * (2 d + w0)))
    H     = (1/S) * sum over the S windows of a batch of g_s g_s',   g their mean

Every step takes one batch and one matrix, whose share of the steps goes by the logarithm of its size. Its block are the
n/2 pruned weights of the highest and the n/2 kept ones of the lowest |w0 * g|; x'Qx is made small with as many pruned
as before. A block then rests in a queue. The 42 % of the pruned that ranked lowest in the first mask stay pruned, the
35 % of the kept that ranked highest stay kept. The loss is that of the next token. Weights that stay are never
changed, but by `heal=refit`.

The whole model is in memory, twice. Published for 7 billion parameters are 3000 steps, at least 10 per matrix, batches
of 16 and the solver `annealing`. By default there is one step per matrix, with batches of 8 and the solver `swap`, to
take less time; what that costs beside `annealing` is not measured.

`solver` is `exhaustive`, `swap` (exchanges, then tabu search), `annealing` (the published schedule), or a name that
you gave to an object with a method solve(Q, k) of your own: `secateur.solver.binary.add_solver("mine", MySolver())`.

Source: G. Rosenberg et al., "Scalable iterative pruning of large language and vision models using block coordinate
descent", 2024, arXiv:2411.17796; official code amazon-science/icbs. Differs from the official code: entries of Q that
are nothing vanish, there all negative ones do (`cutoff=official`); the constant c is the exact one; weights that no
window's loss depends on count as free whatever the ridge says (`remove_zero_rows`).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from secateur.allocate import MaskRule, mask_rule
from secateur.criteria import random_scores, weighted_magnitude
from secateur.errors import OptionError, UsageError
from secateur.methods import Descriptor, SearchMethod, Seen, Target, option, register
from secateur.observe import SumSquares
from secateur.search import CURVATURES, CUTOFFS, SELECTIONS, Descent
from secateur.solver.binary import binary_solver


@register("icbs")
@dataclass(frozen=True, kw_only=True)
class ICBS(SearchMethod):
    """Options of iCBS; defaults from the official code, but for steps, batch (16) and solver (annealing)."""

    start: str = option(
        "wanda",
        "the score that gives the first mask; Wanda's in every row, the others in every matrix",
        choices=("wanda", "magnitude", "gradient", "random"),
    )
    block: int = option(4096, "weights that are decided together, half of them pruned ones", unit="weights", ge=2)
    steps: int = option(0, "steps of an epoch; 0 = one per matrix, or min_steps", unit="steps", ge=0)
    min_steps: int = option(1, "steps that every matrix has in an epoch at least", unit="steps", ge=0)
    epochs: int = option(1, "how often the steps are made, in another order each time", ge=1)
    batch: int = option(8, "windows that a step looks at", unit="windows", ge=1)
    together: int = option(
        1, "matrices that a batch is for, all stepped from the same gradients; published: 1", unit="matrices", ge=1
    )
    selection: str = option("gradient", "the score by which blocks are chosen", choices=SELECTIONS)
    hessian: str = option("gradient_per_sample", "H; exact takes n gradients of a gradient", choices=CURVATURES)
    gradient_multiplier: float = option(0.75, "gm; 1 is the exact expansion", ge=0)
    ridge: float = option(0.001, "lam", ge=0)
    tabu: float = option(0.40, "length of the queue, as a fraction of the weights that may change", ge=0, lt=1)
    fix_pruned: float = option(0.42, "fraction of the pruned weights that stay pruned", ge=0, le=1)
    fix_kept: float = option(0.35, "fraction of the kept weights that stay kept", ge=0, le=1)
    remove_zero_rows: bool = option(False, "prune weights that no window's loss depends on before all others")
    cutoff: str = option(
        "abs", "entries of Q that vanish: the tiny, or (official) the tiny and negative", choices=CUTOFFS
    )
    solver: str = option("swap", "exhaustive, swap, annealing, or the name of your own")
    checks: int = option(10, "steps after which the loss is measured again, to compare with what was predicted", ge=0)
    seed: int = option(0, "seed of the order of batches and matrices", ge=0)

    statistics: ClassVar = {"squares": SumSquares}
    costly: ClassVar = True
    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        score="second_order",
        allocation="uniform",
        data="unlabelled_calibration",
        speedup="memory_only",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hessian == "exact" and self.together > 1:
            raise OptionError("icbs: hessian=exact is taken at one matrix at a time: leave together at 1")
        try:
            binary_solver(self.solver)
        except UsageError as error:
            raise OptionError(f"icbs: solver: {error}") from None

    @property
    def needs_gradient(self) -> bool:
        return self.start == "gradient"

    def needed_statistics(self) -> dict[str, Any]:
        return dict(self.statistics) if self.start == "wanda" else {}

    def score(self, target: Target, seen: Seen) -> Tensor:
        if self.start == "wanda":
            return weighted_magnitude(target.weight, seen["squares"].total_C.to(target.weight.device))
        if self.start == "random":
            return random_scores(target.name, self.seed, target.weight.shape).to(target.weight.device)
        size = target.weight.abs()
        return size * seen["gradient"].abs() if self.start == "gradient" else size

    def rule(self) -> MaskRule:
        return mask_rule("", self.sparsity, "row" if self.start == "wanda" else "layer")

    def descent(self) -> Descent:
        shared = {f.name for f in dataclasses.fields(Descent)} - {"solver"}
        settings = {name: value for name, value in self.options().items() if name in shared}
        return Descent(solver=binary_solver(self.solver), **settings)
