"""DSnoT: exchange weights of a mask until every output has its mean back; no weight is changed.

    c_ij  = W_ij * a_j,   a_j = mean over the calibration sequences of sum over tokens of x_j (signed)
    eps_i = sum of c_ij over the pruned j of row i                       what the row's mean output has lost
    eps_i > 0:  regrow the pruned j with the largest c_ij / var_j;
                prune the kept j with c_ij < 0 of the lowest |W_ij| * sqrt(mean over sequences of ||x_j||^2)
    eps_i < 0:  the smallest c_ij / var_j, and c_ij > 0
    eps_i <- eps_i + c_pruned - c_regrown, up to 50 times while |eps_i| > 0.1; no weight moves twice

The mask that is edited is Wanda's or that of magnitudes, row by row, so that every row keeps its number of weights.
With an N:M pattern the pruned weight is the one that ranked lowest for the first mask among the M of the regrown one,
whatever its sign.
var_j is the mean over sequences of the variance within one; `variance=full` adds what lies between them.

Source: Y. Zhang et al., "Dynamic Sparse No Training", ICLR 2024, arXiv:2310.08915; official code zyxxmu/DSnoT.
Differs from the official code: a row stops before an exchange that would not make |eps_i| smaller; there, exchanges
that make it worse are made too (`accept=always`), since its rule of signs (`accept=same_sign`) can't be switched on,
nor off with a pattern.
All matrices are edited; there, by default, only those of the attention.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocate import MaskRule, mask_rule, parse_pattern
from secateur.criteria import weighted_magnitude
from secateur.methods import Descriptor, Seen, Target, WeightMethod, option, register
from secateur.observe import SequenceMoments, SumSquares

# Shapes: O outputs (rows), I inputs, R rows that are still being edited.


@register("dsnot")
@dataclass(frozen=True, kw_only=True)
class DSnoT(WeightMethod):
    """Options of DSnoT; defaults from the official code."""

    start: str = option("wanda", "the score that gives the first mask", choices=("wanda", "magnitude"))
    cycles: int = option(50, "exchanges in a row at most", ge=0)
    threshold: float = option(0.1, "a row is left alone when its |eps| is no more than this", ge=0)
    accept: str = option(
        "smaller",
        "an exchange is made if |eps| gets smaller, if eps keeps its first sign, or always",
        choices=("smaller", "same_sign", "always"),
    )
    variance: str = option("within", "variance within sequences, or over all tokens", choices=("within", "full"))

    statistics: ClassVar = {"squares": SumSquares, "moments": SequenceMoments}
    sequential: ClassVar[bool] = True
    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        score="activation",
        allocation="uniform",
        data="unlabelled_calibration",
        speedup="memory_only",
    )

    def score(self, target: Target, seen: Seen) -> Tensor:
        return target.weight.abs() if self.start == "magnitude" else _wanda(target, seen)

    def rule(self) -> MaskRule:
        return mask_rule(self.pattern, self.sparsity, "row")

    def prune(self, target: Target, seen: Seen) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
        score_OI = self.score(target, seen)
        keep_OI = self.rule().keep(score_OI)
        mean_I, variance_I = self._moments(seen["moments"])
        c_OI = target.weight.double() * mean_I.to(target.weight.device)
        # an input that never varies comes first, on the side of its sign
        growth_OI = (c_OI / variance_I.to(c_OI.device)).nan_to_num(nan=0.0)
        return self.edit(keep_OI, c_OI, growth_OI, score_OI if self.pattern else _wanda(target, seen)), None, ()

    def _moments(self, moments: SequenceMoments) -> tuple[Tensor, Tensor]:
        """(a_j, var_j), float64 [inputs] each."""
        sums_NI, squares_NI = moments.sums_NC, moments.squares_NC
        tokens_N = torch.tensor(moments.tokens_per_sequence, dtype=torch.float64, device=sums_NI.device)[:, None]
        if self.variance == "full":
            variance_I = squares_NI.sum(0) / tokens_N.sum() - (sums_NI.sum(0) / tokens_N.sum()).square()
        else:
            # of every token of a sequence the variance of that sequence
            variance_I = (squares_NI - sums_NI.square() / tokens_N).sum(0) / tokens_N.sum()
        return sums_NI.mean(0), variance_I.clamp_min(0)

    def edit(self, keep_OI: Tensor, c_OI: Tensor, growth_OI: Tensor, score_OI: Tensor) -> Tensor:
        """The mask after all exchanges; ``growth_OI`` orders what is regrown, ``score_OI`` what is pruned.

        Bool, float64, float64 and any float, all [outputs, inputs]; every row keeps its number of weights.
        """
        keep_OI, group = keep_OI.clone(), parse_pattern(self.pattern).m if self.pattern else None
        rows, gone_O = torch.arange(len(keep_OI), device=keep_OI.device), (~keep_OI).sum(1)
        # kept weights rank behind all pruned ones, in an order that is read from both ends
        regrow_OI = growth_OI.nan_to_num().masked_fill(keep_OI, torch.inf).sort(dim=1, stable=True).indices
        prune = {s: _ordered(score_OI, keep_OI & (c_OI * s > 0)) for s in (1, -1)} if group is None else {}
        # what may be pruned among the M of a regrown weight: the first mask without those that have left since
        left_OI = score_OI.double().masked_fill(~keep_OI, torch.inf) if group else score_OI
        eps_O = (c_OI * ~keep_OI).sum(1)
        first_sign_O = eps_O.sign()
        taken = {s: torch.zeros_like(gone_O) for s in (1, -1)}
        active_O = torch.ones_like(gone_O, dtype=torch.bool)
        for _ in range(self.cycles):
            active_O &= (eps_O.abs() > self.threshold) & (taken[1] + taken[-1] < gone_O)
            sign_O = eps_O.sign()
            for sign in (1, -1):
                row = rows[active_O & (sign_O == sign)]
                place_R = gone_O[row] - 1 - taken[1][row] if sign > 0 else taken[-1][row]
                grown_R = regrow_OI[row, place_R]
                if group is None:
                    order_OI, count_O = prune[-sign]
                    # as many have been pruned from this side as were regrown from the other
                    there_R = taken[sign][row] < count_O[row]
                    pruned_R = order_OI[row, taken[sign][row].clamp_max(keep_OI.shape[1] - 1)]
                else:
                    places_RM = (grown_R // group * group)[:, None] + torch.arange(group, device=row.device)
                    lowest_R, index_R = left_OI[row[:, None], places_RM].min(dim=1)
                    there_R, pruned_R = lowest_R.isfinite(), places_RM.gather(1, index_R[:, None])[:, 0]
                after_R = eps_O[row] + c_OI[row, pruned_R] - c_OI[row, grown_R]
                made_R = there_R & self._accepts(eps_O[row], after_R, first_sign_O[row])
                active_O[row[~made_R]] = False
                row, grown_R, pruned_R = row[made_R], grown_R[made_R], pruned_R[made_R]
                keep_OI[row, grown_R], keep_OI[row, pruned_R] = True, False
                if group is not None:
                    left_OI[row, pruned_R] = torch.inf
                eps_O[row] = after_R[made_R]
                taken[sign][row] += 1
        return keep_OI

    def _accepts(self, before_R: Tensor, after_R: Tensor, first_sign_R: Tensor) -> Tensor:
        if self.accept == "smaller":
            return after_R.abs() < before_R.abs()
        return after_R.sign() == first_sign_R if self.accept == "same_sign" else torch.ones_like(after_R).bool()


def _wanda(target: Target, seen: Seen) -> Tensor:
    return weighted_magnitude(target.weight, seen["squares"].mean_per_sequence().to(target.weight.device))


def _ordered(score_OI: Tensor, among_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(columns from the lowest score on, those of ``among_OI`` first; how many these are in every row)."""
    order_OI = score_OI.masked_fill(~among_OI, torch.inf).sort(dim=1, stable=True).indices
    return order_OI, among_OI.sum(1)
