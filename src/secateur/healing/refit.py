"""Refit: what stays is solved for by least squares, once it is known what leaves, whatever chose it.

    W_K = (H_KK)^-1 G_K,   H = X^T X of what the cut blocks before give;   G: see ``secateur.solver.problem``

For single weights row by row on the kept inputs; for heads and neurons on the kept columns of the weight that reads
them, all rows together. Where the method makes up for removed columns by a bias, weights and bias are fitted together:
then X and the wanted outputs are taken around their means, and b = mean(Y) - W_K mean(X_K).

Source: for heads and neurons H. Hu et al., FASP, arXiv:2501.09412; for single weights the last step of ALPS,
arXiv:2406.07831.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from secateur.observe import Cross, Gram, Lost, Moments, Statistic
from secateur.solver import Curvature, Problem, damping_notes, refit, refit_columns
from secateur.solver.masked import RTOL, STEPS

Seen = Mapping[str, Any]
Kind = TypeVar("Kind")

TARGETS = ("current", "stream", "dense")
ABOUT_TARGET = (
    "what least squares aim at: outputs of the dense weight on the inputs as they are now, those and a quarter of what "
    "the hidden states have lost so far, or outputs of the dense model"
)
_BESIDE: dict[str, tuple[type[Statistic], ...]] = {"current": (), "stream": (Lost,), "dense": (Cross,)}
# of what the hidden states have lost; all of it would follow the noise of the calibration text
STREAM_SHARE = 0.25
# up to so many inputs whole columns are judged and solved for in float64, which then costs little
EXACT_INPUTS = 4096
# with fewer tokens for every input that stays, a fit follows the noise of the calibration text
ENOUGH_TOKENS = 4


@dataclass(frozen=True)
class Refit:
    """``damping`` is relative to the mean of the diagonal of H; ``steps`` and ``rtol`` are those of the gradients."""

    damping: float = 0.01
    steps: int = STEPS
    rtol: float = RTOL

    def weights(
        self, name: str, dense_OI: Tensor, keep_OI: Tensor, seen: Seen, start_OI: Tensor | None = None
    ) -> tuple[Tensor, tuple[str, ...]]:
        """(weight [outputs, inputs] refitted on ``keep_OI``, notes); ``start_OI`` is a weight to begin with."""
        problem, notes = problem_of(name, dense_OI, seen, self.damping)
        return refit(problem, keep_OI, start_OI, steps=self.steps, rtol=self.rtol).to(dense_OI.dtype), notes

    def columns(
        self, name: str, dense_OI: Tensor, gone_I: Tensor, seen: Seen, *, bias: bool = False
    ) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
        """(weight [outputs, inputs] with zeros in ``gone_I``, addition to the bias [outputs] or None, notes)."""
        gram, cross, lost = find(seen, Gram), find(seen, Cross, missing=True), find(seen, Lost, missing=True)
        exact = len(gone_I) <= EXACT_INPUTS
        h_II, c_II = (None if s is None else s.total_CC.double() if exact else s.total_CC for s in (gram, cross))
        assert h_II is not None
        added_OI = None if lost is None else STREAM_SHARE * lost.total_OC.to(h_II.dtype)
        mean_I = wanted_I = torch.zeros((), dtype=h_II.dtype)
        more_O = torch.zeros((), dtype=h_II.dtype)
        if bias:
            moments = find(seen, Moments)
            mean_I = wanted_I = moments.mean_C.to(h_II.dtype)
            if cross is not None and c_II is not None:
                wanted_I = (cross.sum_C / cross.tokens).to(h_II.dtype)
                c_II = c_II - moments.count * torch.outer(mean_I, wanted_I)
            h_II = h_II - moments.count * torch.outer(mean_I, mean_I)
            if lost is not None and added_OI is not None:
                more_O = STREAM_SHARE * (lost.sum_C / lost.tokens).to(h_II.dtype)
                added_OI = added_OI - moments.count * torch.outer(more_O, mean_I)
        curvature = Curvature.of(h_II, self.damping)
        w_OI = refit_columns(curvature.problem(dense_OI, c_II, added_OI), gone_I)
        added_O = dense_OI.to(h_II.dtype) @ wanted_I + more_O - w_OI @ mean_I if bias else None
        notes = damping_notes(name, self.damping, curvature.damping)
        return w_OI.to(dense_OI.dtype), added_O, notes


def problem_of(
    name: str, dense_OI: Tensor, seen: Seen, damping: float, on: str = "inputs", *, exact: bool = False
) -> tuple[Problem, tuple[str, ...]]:
    """(the problem of a weight, notes) from the statistics of its input; weights with one input share its curvature.

    It is float64 where ``exact`` says so, and otherwise of the dtype of the statistics.
    The outputs that are wanted are those of the dense network where a ``Cross`` was taken, and otherwise those of the
    dense weight on the inputs as they are now, with a quarter of what the block has lost where there is a ``Lost``.
    """
    gram, cross, lost = find(seen, Gram), find(seen, Cross, missing=True), find(seen, Lost, missing=True)

    def curved(gram: Gram) -> Curvature:
        return Curvature.of(gram.total_CC.double() if exact else gram.total_CC, damping, on)

    curvature = gram.cached(f"curvature on {on}{', exact' if exact else ''}", damping, curved)
    added_OI = None if lost is None else STREAM_SHARE * lost.total_OC
    problem = curvature.problem(dense_OI, None if cross is None else cross.total_CC, added_OI)
    return problem, damping_notes(name, damping, curvature.damping)


def find(seen: Seen, kind: type[Kind], *, missing: bool = False) -> Any:
    """The statistic of that kind, under whatever name; None where it may be ``missing`` and is."""
    found = next((statistic for statistic in seen.values() if isinstance(statistic, kind)), None)
    if found is None and not missing:
        raise LookupError(f"no {kind.__name__} was taken of this input")
    return found


def with_statistics(own: Mapping[str, type[Statistic]], *more: type[Statistic]) -> dict[str, type[Statistic]]:
    """The statistics ``own`` and those kinds of ``more`` that aren't among them, by name."""
    return {**own, **{f"heal.{kind.__name__.lower()}": kind for kind in more if kind not in own.values()}}


def aimed(target: str) -> tuple[type[Statistic], ...]:
    """The statistics that a target takes beside the Gram matrix."""
    return _BESIDE[target]


def few_tokens(tokens: int, kept: int) -> tuple[str, ...]:
    """What a plan says when there is little data for the ``kept`` weights of an output that are fitted to it."""
    if tokens >= ENOUGH_TOKENS * kept:
        return ()
    return (
        f"refit: {tokens} calibration tokens for {kept} weights of an output; "
        f"with less than {ENOUGH_TOKENS} times as many tokens a fit follows their noise",
    )
