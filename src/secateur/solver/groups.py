"""Groups of columns that leave a weight together, judged by what all others can make up for; and swaps of groups.

    increase of the loss when group g leaves    1/2 * sum over outputs r of  W[r,g] ([H^-1]_gg)^-1 W[r,g]^T
    joint removal of P     W    <- W - W[:,P] ([H^-1]_PP)^-1 [H^-1]_P,:
                           H^-1 <- H^-1 - [H^-1]_:,P ([H^-1]_PP)^-1 [H^-1]_P,:

O outputs, I inputs, U groups, W columns of one group.

Source: X. Meng et al., "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with Combinatorial
Optimization", ICML 2024, arXiv:2403.12983; official code mazumder-lab/OSSCAR. Rounds with a first-order term: G. Li et
al., "Tyr-the-Pruner", 2025, arXiv:2503.09657; official code AMD-AGI/Tyr-the-Pruner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from secateur.solver.columns import losses_of_groups
from secateur.solver.problem import Problem


def elimination(problem: Problem, columns_UW: Tensor, *, at_once: int = 1) -> Tensor:
    """Rank of every group, [groups] float64, higher = leaves later: rounds of the ``at_once`` cheapest ones together.

    Within a round those that cost less come first, so that the groups of lowest rank are those which the rounds remove
    for any number of them.
    """
    units = len(columns_UW)
    counts = [min(at_once, units - first) for first in range(0, units, at_once)]
    order = torch.cat(list(_rounds(problem, columns_UW, counts)))
    return torch.empty(units, dtype=torch.float64, device=order.device).index_copy_(
        0, order, torch.arange(units, dtype=torch.float64, device=order.device)
    )


FIRST_ORDER: dict[str, Callable[[Tensor], Tensor]] = {
    "signed": lambda products_I: products_I,
    "abs": torch.abs,
    "off": torch.zeros_like,
}
"""What a round adds to the loss of a column, of the product <W_p, G_p> over its outputs."""


def in_rounds(
    problem: Problem, columns_UW: Tensor, removed: int, *, rounds: int, first_order: str = "off", balance: int = 1
) -> Tensor:
    """``removed`` groups that leave together in so many rounds, bool [groups]; see ``FIRST_ORDER``.

        score of group g    1/2 * sum over outputs of  W[:,g] ([H^-1]_gg)^-1 W[:,g]^T  +  sum over p in g of <W_p, G_p>

    W and H^-1 are those of the columns that are left, G stays that of all. Rounds take as many groups each, the first
    ones one more where they don't divide. With ``balance`` the groups are so many equal parts, one after the other,
    which lose the same number each, and ``removed`` is a multiple of it. Columns of no group stay.
    """
    left = removed // balance
    base, extra = divmod(left, max(1, min(rounds, left)))
    counts = [base + (number < extra) for number in range(min(rounds, left))]
    gone_U = torch.zeros(len(columns_UW), dtype=torch.bool, device=problem.start_OI.device)
    for gone in _rounds(problem, columns_UW, counts, first_order, balance):
        gone_U[gone] = True
    return gone_U


def _rounds(
    problem: Problem, columns_UW: Tensor, counts: Sequence[int], first_order: str = "off", balance: int = 1
) -> Iterator[Tensor]:
    """The groups that leave in every round, the cheapest first; of every part as many as ``counts`` says."""
    units, width = columns_UW.shape
    # L: the columns that are left, those of a unit side by side, so that the problem shrinks from round to round
    order = columns_UW.flatten().to(problem.start_OI.device)
    w_OL, g_OL = problem.start_OI[:, order], problem.g_OI[:, order]
    inverse_LL = problem.curvature.inverse()[order][:, order]
    gone_U = torch.zeros(units, dtype=torch.bool, device=order.device)
    live = torch.arange(units, device=order.device)
    silent_U = ~(w_OL != 0).any(dim=0).reshape(units, width).any(dim=1)
    starts_P = units // balance * torch.arange(balance, device=order.device)
    for number, count in enumerate(counts, start=1):
        places_UW = torch.arange(len(live) * width, device=order.device).reshape(-1, width)
        added_L = FIRST_ORDER[first_order]((w_OL * g_OL).sum(dim=0))
        scores_U = w_OL.new_full((units,), torch.inf)
        scores_U[live] = losses_of_groups(w_OL, inverse_LL, places_UW) + added_L.reshape(-1, width).sum(dim=1)
        # what gives nothing leaves before anything else, also where scores are negative
        scores_U[silent_U & ~gone_U] = -torch.inf
        gone = scores_U.reshape(balance, -1).argsort(dim=1, stable=True)[:, :count] + starts_P[:, None]
        yield gone.flatten()
        if number == len(counts):
            return
        gone_U[gone.flatten()] = True
        gone_L = gone_U[live].repeat_interleave(width)
        w_OL, inverse_LL = _without(w_OL, inverse_LL, gone_L)
        g_OL, live = g_OL[:, ~gone_L], live[~gone_U[live]]


def _without(w_OI: Tensor, inverse_II: Tensor, gone_I: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and inverse of the columns that stay once those of ``gone_I`` have left jointly."""
    gone, kept = gone_I.nonzero().flatten(), (~gone_I).nonzero().flatten()
    rows_PI = inverse_II[gone]
    across_PK = rows_PI[:, kept]
    solved_PK = torch.cholesky_solve(across_PK, torch.linalg.cholesky(rows_PI[:, gone]))
    w_OK = w_OI[:, kept].addmm_(w_OI[:, gone], solved_PK, alpha=-1)
    return w_OK, inverse_II[kept][:, kept].addmm_(across_PK.T, solved_PK, alpha=-1)


def swaps(problem: Problem, columns_UW: Tensor, removed_U: Tensor, *, at_once: int, most: int = 30) -> Tensor:
    """The removed groups (bool [groups], as many as before) after swaps that lower the loss of the refit.

    A round takes the ``at_once`` cheapest groups out as well, then puts as many of all removed ones back, those with
    the largest gain

        1/2 * r^T C^-1 r,   r = G_j - H_jK H_KK^-1 G_K,   C = H_jj - H_jK H_KK^-1 H_Kj

    It stops when the loss doesn't fall, or after ``most`` rounds.
    """
    columns_UW, removed_U = columns_UW.to(problem.g_OI.device), removed_U.clone()
    best = _loss(problem, columns_UW, removed_U)
    for _ in range(most):
        tried_U = _swapped(problem, columns_UW, removed_U, min(at_once, int((~removed_U).sum()) - 1))
        loss = _loss(problem, columns_UW, tried_U)
        # rounding is no progress
        if not loss < best - 1e-9 * abs(best):
            break
        removed_U, best = tried_U, loss
    return removed_U


def _swapped(problem: Problem, columns_UW: Tensor, removed_U: Tensor, count: int) -> Tensor:
    if count < 1 or not bool(removed_U.any()):
        return removed_U
    tried_U = removed_U.clone()
    kept_groups = (~removed_U).nonzero().flatten()
    kept = columns_UW[kept_groups].flatten()
    inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(problem.h_II[kept][:, kept]))
    w_OK = problem.g_OI[:, kept] @ inverse_KK
    places = torch.arange(len(kept), device=kept.device).reshape(len(kept_groups), -1)
    losses = losses_of_groups(w_OK, inverse_KK, places)
    tried_U[kept_groups[losses.argsort(stable=True)[:count]]] = True
    out = tried_U.nonzero().flatten()
    back = out[gains(problem, columns_UW, tried_U).argsort(descending=True, stable=True)[:count]]
    tried_U[back] = False
    return tried_U


def gains(problem: Problem, columns_UW: Tensor, removed_U: Tensor) -> Tensor:
    """What the loss of the refit falls by when one removed group comes back, [removed groups] float64."""
    kept = columns_UW[~removed_U].flatten()
    lower_KK = torch.linalg.cholesky(problem.h_II[kept][:, kept])
    w_OK = torch.cholesky_solve(problem.g_OI[:, kept].T, lower_KK).T
    found = []
    for columns in columns_UW[removed_U]:
        across_KW = problem.h_II[kept][:, columns]
        residual_OW = problem.g_OI[:, columns] - w_OK @ across_KW
        schur_WW = problem.h_II[columns][:, columns] - across_KW.T @ torch.cholesky_solve(across_KW, lower_KK)
        solved_WO = torch.cholesky_solve(residual_OW.T, torch.linalg.cholesky(schur_WW))
        found.append(0.5 * (residual_OW.T * solved_WO).sum().double())
    return torch.stack(found)


def _loss(problem: Problem, columns_UW: Tensor, removed_U: Tensor) -> float:
    """Of the refit on the groups that stay, up to a constant: -1/2 * sum of W * G."""
    kept = columns_UW[~removed_U].flatten()
    g_OK = problem.g_OI[:, kept]
    w_KO = torch.cholesky_solve(g_OK.T, torch.linalg.cholesky(problem.h_II[kept][:, kept]))
    return -0.5 * float((w_KO.double() * g_OK.T.double()).sum())


def elimination_flops(outputs: int, inputs: int) -> int:
    """Operations of one inverse and of the downdates of all rounds."""
    return 2 * inputs**3 + 2 * (outputs + inputs) * inputs * inputs
