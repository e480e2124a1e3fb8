"""Mustafar: remove the smallest elements of every key and value, and keep the others under a bitmap.

For the vector x of one token and key-value head, with D channels and sparsity s:

    threshold = the max(1, int(s D))-th smallest |x|;  keep |x| >= threshold                (``rounding=paper``)

which keeps D - max(1, int(s D)) + 1 elements, one more than asked for, and all that equal the threshold;
``rounding=exact`` keeps round((1 - s) D), of equals those with the lower index. With ``direction=channel`` values are
compared along 32 consecutive tokens of a channel instead (the paper's "Vc_Mag").

The last ``window`` tokens are dense. Whole blocks of ``block`` tokens are pruned as they leave it, at the end of the
prompt and while decoding; ``block=1`` is the paper's accuracy path, 256 its kernel's.

Source: D. Joo, H. Hosseini, R. Hadidi, B. Asgari, "Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in
LLM Inference", NeurIPS 2025, arXiv:2505.22913; official code dhjoo98/mustafar. Differs from it: tiles
hold two steps of 32 lanes instead of one of 64, without padding to 8 elements, which is smaller; any number of tokens,
head dimension and dtype.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import OptionError
from secateur.methods import CacheElementMethod, Descriptor, option, register
from secateur.methods.elements import Largest

_GROUP = 32
"""tokens among which the elements of a channel are compared"""


@register("mustafar")
@dataclass(frozen=True, kw_only=True)
class Mustafar(CacheElementMethod):
    """Options of Mustafar; the paper reports 0.5 and 0.7."""

    sparsity: float = option(0.5, "fraction of the elements removed of keys and of values", ge=0, lt=1)
    k: float | None = option(None, "fraction of the elements of keys removed, where it is another", ge=0, lt=1)
    v: float | None = option(None, "fraction of the elements of values removed, where it is another", ge=0, lt=1)
    rounding: str = option(
        "paper", "how many elements stay: as the paper counts, or exactly", choices=("paper", "exact")
    )
    direction: str = option("token", "along what elements of values are compared", choices=("token", "channel"))

    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="element", when="inference", score="magnitude", allocation="uniform",
        data="none", speedup="real",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction == "channel" and self.block % _GROUP:
            raise OptionError(
                f"mustafar: with direction=channel block must be a multiple of {_GROUP}, got {self.block}"
            )

    @property
    def by_sparsity(self) -> bool:
        return self.k is None or self.v is None

    def side_sparsity(self, side: str) -> float:
        own = self.k if side == "keys" else self.v
        return self.sparsity if own is None else own

    def largest(self, side: str, width: int) -> Largest | None:
        along_tokens = side == "values" and self.direction == "channel"
        return None if along_tokens else self._of(width, self.side_sparsity(side))

    def element_mask(self, x: Tensor, side: str) -> Tensor:
        if self.largest(side, x.shape[-1]) is not None:
            return super().element_mask(x, side)
        groups = [group.mT for group in x.split(_GROUP, dim=-2)]
        masks = [self._of(group.shape[-1], self.side_sparsity(side)).mask(group).mT for group in groups]
        return torch.cat(masks, dim=-2)

    def _of(self, count: int, sparsity: float) -> Largest:
        """What stays of so many elements that are compared."""
        if self.rounding == "paper":
            return Largest(count - max(1, int(sparsity * count)) + 1, ties=True)
        return Largest(round((1 - sparsity) * count), ties=False)
