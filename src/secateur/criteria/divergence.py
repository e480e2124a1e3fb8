"""How far predictions are from those of another model, and from the text."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.pieces import by_rows


class Divergence:
    """KL divergence of predictions from those of a dense model, whose part is worked out once.

        KL = sum over tokens v of  p_v * (a_v - b_v)  -  logsumexp(a)  +  logsumexp(b)

    a are the logits of the dense model, [sequences, length, vocabulary] of any dtype, b those of the other, and p the
    probabilities of the dense one. Differences are taken first, so that a small divergence keeps its digits.
    """

    def __init__(self, dense_BTV: Tensor) -> None:
        self._rows = [rows_TV.float() for (rows_TV,) in by_rows(dense_BTV.flatten(0, -2))]
        self._sums = [rows_TV.logsumexp(dim=-1) for rows_TV in self._rows]
        self._probabilities = [
            (rows_TV - sums_T[:, None]).exp_() for rows_TV, sums_T in zip(self._rows, self._sums, strict=True)
        ]

    def of(self, other_BTV: Tensor) -> float:
        """Mean over positions of KL(dense || other) in nats; 0 where predictions are the same, however shifted."""
        total = torch.zeros((), dtype=torch.float64, device=other_BTV.device)
        others = by_rows(other_BTV.flatten(0, -2))
        for dense_TV, p_TV, sums_T, (rows_TV,) in zip(self._rows, self._probabilities, self._sums, others, strict=True):
            theirs_TV = rows_TV.float()
            apart_T = ((dense_TV - theirs_TV) * p_TV).sum(dim=-1)
            total += (apart_T.double() - sums_T.double() + theirs_TV.logsumexp(dim=-1).double()).sum()
        return float(total) / other_BTV[..., 0].numel()


def text_loss(logits_BTV: Tensor, ids_BT: Tensor) -> float:
    """Mean cross-entropy of the next token, in nats per prediction; every window but its first token is predicted."""
    rows = by_rows(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    losses = [F.cross_entropy(rows_TV.float(), wanted_T, reduction="sum").double() for rows_TV, wanted_T in rows]
    return float(torch.stack(losses).sum()) / ids_BT[:, 1:].numel()


def kl_divergence(dense_BTV: Tensor, other_BTV: Tensor) -> float:
    """``Divergence`` of one model, in nats per position."""
    return Divergence(dense_BTV).of(other_BTV)
