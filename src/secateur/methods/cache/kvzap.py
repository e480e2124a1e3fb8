"""KVzap: predict from the input of the attention what KVzip would find by reading the prompt again.

    score_j = surrogate(h_j)_k              log of KVzip+'s score of token j in key-value head k, h_j [D] the input
    leaves:   score_j < ``threshold``, once j isn't one of the last ``window`` tokens

The surrogate of a layer is linear, or has one hidden layer with GELU; ``secateur cache fit`` trains it on any text in
minutes. A threshold removes as much as the text allows, of every head its own number, and with ``decoding`` goes on
while the model writes: a token leaves when it leaves the window. ``sparsity`` instead removes that fraction of every
head, and ``adakv(kvzap)`` that of a layer.

Source: S. Jegou and M. Jeblick, "KVzap: Fast, Adaptive, and Faithful KV Cache Pruning", 2026, arXiv:2601.07891;
``KVzapPress`` within ``DMSPress`` of NVIDIA kvpress, whose files of surrogates are read and written. Differs from it:
what is evicted is removed, where kvpress hides it; surrogates compute in float32.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import OptionError, UnsupportedModelError, UsageError
from secateur.methods import Descriptor, EvictionMethod, Prompt, option, register
from secateur.methods.caching import protect
from secateur.methods.surrogates import read_surrogate


@register("kvzap")
@dataclass(frozen=True, kw_only=True)
class KVzap(EvictionMethod):
    """Options of KVzap; defaults of kvpress."""

    surrogate: str = option("", "folder that 'secateur cache fit' wrote")
    threshold: float | None = option(None, "log score below which a token leaves, instead of a sparsity (-4)")
    window: int = option(128, "last tokens that stay", unit="tokens", ge=1)
    decoding: bool = option(False, "whether tokens leave while decoding too; with a threshold")

    replaces_sparsity: ClassVar[str] = "threshold"
    again: ClassVar[bool] = False
    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="policy", allocation="by_head",
        data="unlabelled_calibration", speedup="memory_only",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoding and self.threshold is None:
            raise OptionError(f"{self.name}: decoding needs a threshold, since a sparsity is that of the prompt")

    @property
    def by_sparsity(self) -> bool:
        return self.threshold is None

    @property
    def is_identity(self) -> bool:
        return self.threshold is None and self.sparsity == 0

    @property
    def protected(self) -> int:
        return self.window

    @property
    def every(self) -> int:
        return 1 if self.decoding else 0

    @property
    def settles(self) -> bool:
        return self.decoding

    @property
    def uses_data(self) -> bool:
        return True  # the text that the surrogate is fitted to

    def carry(self, read: Prompt) -> Tensor:
        if not self.surrogate:
            raise UsageError(
                f"{self.name} needs a surrogate of this model: fit one with 'secateur cache fit MODEL --out FOLDER',"
                f" and say {self.name}:surrogate=FOLDER"
            )
        if read.hidden is None:
            raise UnsupportedModelError(f"{self.name} needs the input of the attention of layer {read.layer}")
        scores = read_surrogate(self.surrogate).scores(read.layer, read.layers, read.hidden, read.keys.shape[1])
        return scores if read.carried is None else torch.cat([read.carried, scores], dim=-1)

    def score(self, prompt: Prompt) -> Tensor:
        score_BKS = self.carry(prompt) if prompt.carried is None else prompt.carried
        return protect(score_BKS[..., : -self.window], last=self.window)

    def keep(self, prompt: Prompt) -> Tensor:
        if self.threshold is None:
            return super().keep(prompt)
        keep = (self.carry(prompt) if prompt.carried is None else prompt.carried) >= self.threshold
        keep[..., -self.window :] = True
        return keep
