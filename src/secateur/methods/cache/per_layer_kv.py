"""Per layer: give every layer its own sparsity.

    per_layer_kv(snapkv):sparsities=0.2/0.4/0.6

``sparsities`` lists one fraction per layer of the model, layers with a sliding window included, whose fraction isn't
looked at. Where it is empty, all layers have the same.

Source: ``PerLayerCompressionPress`` of NVIDIA kvpress v0.5.4.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from secateur.errors import OptionError
from secateur.methods import Descriptor, EvictionMethod, Prompt, WrapperMethod, option, register


@register("per_layer_kv")
@dataclass(frozen=True, kw_only=True)
class PerLayerKV(WrapperMethod):
    """Options of sparsities per layer."""

    sparsities: str = option("", "fraction of the tokens removed in every layer, separated by slashes")

    again: ClassVar[bool] = False
    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="attention", allocation="by_layer",
        data="none", speedup="real",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for fraction in self._listed():
            if not 0 <= fraction < 1:
                raise OptionError(f"{self.name}: sparsities must lie in [0, 1), got '{self.sparsities}'")

    def _listed(self) -> list[float]:
        try:
            return [float(piece) for piece in self.sparsities.split("/")] if self.sparsities else []
        except ValueError:
            raise OptionError(
                f"{self.name}: sparsities are numbers separated by slashes (0.2/0.4), got '{self.sparsities}'"
            ) from None

    @property
    def is_identity(self) -> bool:
        listed = self._listed()
        return not any(listed) if listed else self.sparsity == 0

    @property
    def by_sparsity(self) -> bool:
        return not self._listed() and super().by_sparsity

    def _of_layer(self, prompt: Prompt) -> EvictionMethod:
        listed = self._listed()
        if listed and len(listed) != prompt.layers:
            raise OptionError(f"{self.name}: {len(listed)} sparsities for a model of {prompt.layers} layers")
        return replace(self.inner, sparsity=listed[prompt.layer]) if listed else self.inner

    def score(self, prompt: Prompt) -> Tensor:
        return self._of_layer(prompt).score(prompt)

    def kept(self, prompt: Prompt) -> int:
        return self._of_layer(prompt).kept(prompt)

    def keep(self, prompt: Prompt) -> Tensor:
        return self._of_layer(prompt).keep(prompt)
