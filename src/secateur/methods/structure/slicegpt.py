"""SliceGPT: turn the hidden states behind every sub-layer to their principal components, and keep the first of them.

RMSNorm commutes with rotations, RMSNorm(x Q) = RMSNorm(x) Q, once its scale is folded into the weights that read it; so
every sub-layer may have hidden states in a basis of its own, where the last directions carry next to nothing:

    C      = sum over calibration tokens of x^T x           x = what enters the norm of the next sub-layer, before it
    Q      = eigenvectors of C by falling eigenvalue, the first int((1 - sparsity) * hidden) of them, rounded down
    reads  W <- W diag(scale) Q      adds  W <- Q^T W      between  x <- x Q_before^T Q_after

Each basis is found in the model that is sliced up to there. All matrices of the blocks become narrower, and so do the
hidden states; the products between the bases, two per block, are what it costs, so that less leaves than the sparsity
says (`budget=params` counts them in). Norms divide by the dense hidden size. Of layer norms the mean is taken out
first. The last block gives hidden states of the dense basis, and final norm and head stay as they are, unless
slice_head is set: a head that was tied to the embedding gets a table of its own. No stock class has such blocks: the
checkpoint brings its modelling file.

Source: S. Ashkboos, M. Croci, M. Gennari do Nascimento, T. Hoefler and J. Hensman, "SliceGPT", ICLR 2024,
arXiv:2401.15024; official code microsoft/TransformerCompression. As there, the signal is the residual and not the
output of the norm, as the paper has it.
Differs from the official code: the mean is taken out of layer norms only, where that changes nothing; the epsilon is
the model's own; the last basis, of which the code keeps all directions, is left out, since turning all of them is no
change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.methods import Descriptor, RotationMethod, option, register
from secateur.observe import Gram


@register("slicegpt")
@dataclass(frozen=True, kw_only=True)
class SliceGPT(RotationMethod):
    """Options of SliceGPT; defaults from the official code."""

    damping: float = option(0.01, "what is added to the diagonal of C, as a fraction of its mean", ge=0)
    orientation: str = option(
        "random",
        "how the directions that stay are turned among themselves: by a random rotation, or not at all (pca)",
        choices=("random", "pca"),
    )
    seed: int = option(42, "seed of these rotations", ge=0)

    statistics: ClassVar = {"gram": Gram}
    descriptor: ClassVar = Descriptor(
        object="hidden_states",
        granularity="structured_group",
        score="second_order",
        allocation="uniform",
        recovery="none",
        data="unlabelled_calibration",
        speedup="real",
    )

    @property
    def draws(self) -> bool:
        return self.orientation == "random"

    def basis(self, gram: Tensor, width: int, number: int) -> Tensor:
        damped_DD = gram + self.damping * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
        # eigenvalues come ascending
        basis_DW = torch.linalg.eigh(damped_DD).eigenvectors.flip(1)[:, :width]
        return basis_DW if self.orientation == "pca" else basis_DW @ self._turn(width, number).to(basis_DW)

    def _turn(self, width: int, number: int) -> Tensor:
        """A random rotation, [width, width] float64, another one for every basis."""
        generator = torch.Generator().manual_seed(self.seed + number)
        factor, upper = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        # the signs make it uniform over all rotations
        return factor * upper.diagonal().sign()
