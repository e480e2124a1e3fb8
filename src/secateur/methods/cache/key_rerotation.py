"""Key re-rotation: give the tokens that stay positions without gaps.

Keys are stored behind the rotary embedding, at their position in the text. Of n tokens that another method (``of``)
keeps, the m-th one, from position p, is turned to the n - m-th position before the text that follows:

    k <- rotation by (S - n + m - p) k

Attention depends on distances alone, so that this is the cache of the shortened text, whose keys were computed in the
whole one. It is what StreamingLLM does, and what keeps distances within those that a model was trained on.

Where tokens leave while the model decodes (``key_rerotation(streaming_llm:budget=1024)``), keys are stored as they were
and turned whenever they are attended to, as in the official code: turning what was turned would add up rounding.

Source: G. Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024, arXiv:2309.17453;
``KeyRerotationPress`` of NVIDIA kvpress v0.5.4, which moves keys to 0 .. n - 1, and the text that follows to n.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.errors import OptionError
from secateur.methods import Descriptor, Prompt, WrapperMethod, option, register


@register("key_rerotation")
@dataclass(frozen=True, kw_only=True)
class KeyRerotation(WrapperMethod):
    """Options of key re-rotation."""

    of: str = option("streaming_llm", "method that chooses the tokens, with its options")

    again: ClassVar[bool] = False
    of_budgets: ClassVar[bool] = True
    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="position", allocation="uniform", data="none",
        speedup="real",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner.settles:
            raise OptionError(
                f"{self.name}: of must be a method whose heads keep equally many tokens while decoding, got '{self.of}'"
            )

    @property
    def needs_rope(self) -> bool:
        return True

    @property
    def every(self) -> int:
        return self.inner.every

    @property
    def remembered(self) -> int:
        return self.inner.remembered

    @property
    def closes_gaps(self) -> bool:
        return self.every > 0

    def keep(self, prompt: Prompt) -> Tensor:
        return self.inner.keep(prompt)

    def keep_again(self, left: Prompt) -> Tensor:
        return self.inner.keep_again(left)

    def moved_keys(self, prompt: Prompt, keep: Tensor) -> Tensor:
        if prompt.rope is None or self.closes_gaps:
            return prompt.keys
        from_end = keep.flip(-1).cumsum(dim=-1).flip(-1)
        place = prompt.positions[:, -1:, None] + 1 - from_end
        return prompt.rope.turned(prompt.keys, place - prompt.positions[:, None])
