"""OBSPA: remove the coupled channels that the weights reading them can do without, and refit what stays; no training.

A weight W [outputs, columns] that reads a channel has the inputs X, and H = 2 X^T X with lambda * mean(diag H) added to
its diagonal. A channel has one column in a linear layer and one for every position of the kernel in a convolution.
Without the columns S the best refit of all others raises the squared error of the outputs by

    E_S  = 1/2 * sum over outputs r of  W[r,S] ([H^-1]_SS)^-1 W[r,S]^T
    I_k  = sum of E_S over all weights that read channel k;   I_k <- I_k / mean over the channels of the group
    W   <- W - W[:,S] ([H^-1]_SS)^-1 [H^-1]_S,:               S: all columns of W that leave, at once

The channels with the smallest I leave. Then the weights are refitted in the order of the network, each to what the
refitted ones before it give (`inputs=dense`: to the inputs in the dense network), and batch norms behind a change get
the mean and variance of their new inputs (`norms=refit`). Layers that only produce a channel lose rows, and nothing
else in them changes. Images that look other than those of training, transforms included, give other statistics even
where nothing has changed; with `norms=shift` that drops out:

    mean <- mean + (mean after - mean before),   var <- var * var after / var before

`calibration=data` takes batches of inputs, from the training data or from another data set; labels aren't looked at.
`calibration=noise` takes none: inputs are uniform noise between `low` and `high`, which should be the range of the
network's inputs. The network keeps the statistics of its batch norms, since those of noise would be wrong; but while
noise goes through it, each norm works with what it sees (`norms=own`), or inputs further on would be nothing like what
the weights were trained for.

Source: X. Wang et al., "Structurally Prune Anything: Any Architecture, Any Framework, Any Time", 2024,
arXiv:2403.18955, section 5. No official code is public; the uniform noise, the damping and the mean as normaliser are
the choices of our reconstruction. Ours as well: norms with statistics of their own while noise goes through, and
shifted ones; a weight that is applied several times is fitted to its dense inputs; batch norms that see what they saw
in the dense network keep their statistics.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.methods import ChannelMethod, Consumer, Coupled, Descriptor, Fitting, Noise, option, register
from secateur.observe import Gram
from secateur.solver import damping_notes, inverse_hessian, refit_without, removal_losses


@register("obspa")
@dataclass(frozen=True, kw_only=True)
class OBSPA(ChannelMethod):
    """Options of OBSPA."""

    damping: float = option(0.01, "lambda, added to the diagonal of H, relative to its mean", ge=0)
    calibration: str = option("data", "batches of inputs, or uniform noise instead", choices=("data", "noise"))
    inputs: str = option(
        "pruned",
        "what a weight is refitted to: inputs behind refitted weights, or dense ones",
        choices=("pruned", "dense"),
    )
    norms: str = option(
        "auto",
        "statistics of batch norms: the stored ones, fitted behind a change, moved by what the change did, or the"
        " noise's own while it is looked at; auto is refit for data and own for noise",
        choices=("auto", "stored", "refit", "shift", "own"),
    )
    low: float = option(-1.0, "smallest value of the noise")
    high: float = option(1.0, "largest value of the noise")
    samples: int = option(256, "number of noise inputs", unit="inputs", ge=1)
    seed: int = option(0, "seed of the noise", ge=0)

    needs: ClassVar = ("inputs",)
    sequential: ClassVar[bool] = True
    descriptor: ClassVar = Descriptor(
        object="channels",
        granularity="structured_group",
        score="second_order",
        allocation="global",
        recovery="least_squares",
        data="unlabelled_calibration",
        speedup="real",
    )

    def score(self, group: Coupled) -> Tensor | None:
        # what reads an input that was never active loses nothing with it, whatever its unit diagonal says
        losses = [
            removal_losses(c.weight.masked_fill(c.gram.dead, 0), self._inverse(c.gram)[0], c.columns)
            for c in group.consumers
        ]
        return torch.stack(losses).sum(dim=0) if losses else None

    def fitting(self) -> Fitting:
        noise = Noise(self.low, self.high, self.samples, self.seed) if self.calibration == "noise" else None
        norms = {"auto": "own" if noise else "refit"}.get(self.norms, self.norms)
        return Fitting(noise, sequential=self.inputs == "pruned", norms=norms)

    def compensate(self, consumer: Consumer, gone: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        inverse, used = self._inverse(consumer.gram)
        return refit_without(consumer.weight, inverse, gone), damping_notes(consumer.name, self.damping, used)

    def _inverse(self, gram: Gram) -> tuple[Tensor, float]:
        return gram.cached("inverse", self.damping, lambda g: inverse_hessian(2.0 * g.total_CC.double(), self.damping))
