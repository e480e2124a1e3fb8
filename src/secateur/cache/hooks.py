"""How a compressed cache gets into a model: attention modules that are called with one ask it for their attention.

A hook in front of every attention module looks for a compressed cache among what the module is called with. Where there
is one, the module finds ``secateur_cache`` as its attention implementation until it returns; masks were made before,
for the implementation that the model is set to, and that one still computes what is dense. The hooks leave with the
last cache of the model.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.cache.attention import base_attention
from secateur.cache.layer import CompressedLayer
from secateur.errors import UnsupportedModelError, UsageError
from secateur.methods.prompts import Rope

if TYPE_CHECKING:
    from secateur.cache.compressed import CompressedCache

IMPLEMENTATION = "secateur_cache"
_READERS = ("o_proj", "out_proj", "dense", "c_proj")
"""names under which attention modules keep the layer that reads their heads"""
_TURNING_WINDOWS = ("afmoe", "cohere2", "cohere2_moe")
"""models whose layers with a window turn, and no others; nothing but their code says so"""


@dataclass
class Call:
    """One call of one attention module with a compressed cache."""

    module: nn.Module
    layer: CompressedLayer
    implementation: str
    arguments: dict[str, Any]
    rotary: list[nn.Module]
    warned: set[str]
    used: bool = False
    _base: Callable[..., Any] | None = None

    def base(self, *arguments: Any, **keywords: Any) -> Any:
        """What the module would have called."""
        self._base = self._base or base_attention(self.module, self.implementation)
        return self._base(*arguments, **keywords)

    @property
    def is_flash(self) -> bool:
        return self.implementation.startswith("flash")

    def hidden(self) -> Tensor | None:
        """The input of the attention, [B, T, hidden]; None where the module isn't called with one of that name."""
        return self.arguments.get("hidden_states")

    def positions(self, batch: int, tokens: int, device: torch.device) -> Tensor:
        """Positions of the rotary embedding of the last ``tokens`` of the text, [B, T] int64."""
        given = self.arguments.get("position_ids")
        if given is None or given.dim() != 2:
            given = torch.arange(self.layer.seen - tokens, self.layer.seen, device=device)[None]
        return given.to(device).expand(batch, -1)

    def reader(self) -> Tensor | None:
        """The weight that reads the heads, [hidden, H * E]."""
        for name in _READERS:
            found = getattr(self.module, name, None)
            if isinstance(found, nn.Module) and isinstance(weight := getattr(found, "weight", None), Tensor):
                return weight.mT if type(found).__name__ == "Conv1D" else weight
        return None

    def rope(self) -> Rope | None:
        """The rotary embedding of this layer, None for a layer without. Raises UnsupportedModelError if unknown."""
        given = self.arguments.get("position_embeddings")
        if given is None and not self.rotary:
            return None
        if not _turns(self.module):
            return None
        if given is not None:
            cos, sin = given
            positions = self.positions(cos.shape[0], cos.shape[1], cos.device)
            for frequencies in self._frequencies():
                rope = Rope(
                    frequencies.to(cos.device), float((cos.float()[0, -1, 0] ** 2 + sin.float()[0, -1, 0] ** 2) ** 0.5)
                )
                if _explains(rope, positions, cos, sin):
                    return rope
        raise UnsupportedModelError(
            f"the rotary embedding of layer {self.layer.index} is of a kind that isn't known, and this method needs it:"
            " take one that only looks at keys and attention, such as snapkv"
        )

    def _frequencies(self) -> Iterator[Tensor]:
        kind = getattr(self.module, "layer_type", None) or getattr(self.module, "attention_type", None)
        for rotary in self.rotary:
            names = [f"{kind}_inv_freq", "inv_freq"] if kind else ["inv_freq"]
            for name in names:
                if isinstance(found := getattr(rotary, name, None), Tensor):
                    yield found.float()


def _turns(module: nn.Module) -> bool:
    """Whether an attention turns by the embedding that it is given; some don't where they see the whole text."""
    if not getattr(module, "use_rope", True):
        return False
    window = getattr(module, "sliding_window", None)
    if getattr(module.config, "model_type", "") in _TURNING_WINDOWS:
        # Cohere 2 with experts has layers that turn in front of them, too
        return window is not None or bool(getattr(module, "force_rope", False))
    # EXAONE 4 gives every layer the window of the model, and says beside it whether it is that of the layer
    return window is None or getattr(module, "is_sliding", True)


def _explains(rope: Rope, positions: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether cosines and sines are those of this embedding: one half of the channels turns with the other."""
    if cos.shape[-1] != 2 * len(rope.frequencies):
        return False
    angle = positions[..., None].float() * rope.frequencies
    expected = [torch.cat([wave] * 2, dim=-1) * rope.scale for wave in (angle.cos(), angle.sin())]
    # cosines may have been rounded to bfloat16
    return all(bool(((a - b.float()).abs() < 0.02).all()) for a, b in zip(expected, (cos, sin), strict=True))


_active: dict[nn.Module, Call] = {}
"""calls under way; a module is in one at a time, whatever other threads do with other models"""


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, Tensor | None]:
    """What is registered as ``secateur_cache`` in the attention interface of transformers."""
    call = _active[module]
    call.used = True
    return call.layer.attend(query, attention_mask, call, **arguments)


@dataclass(eq=False)
class Attachment:
    """The hooks of one model; caches hold it, and the hooks leave when nobody does any more."""

    model: weakref.ref[nn.Module]
    handles: list[Any] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        return self  # a copied cache works in the same model


_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attachment]] = weakref.WeakKeyDictionary()


def attach(model: nn.Module) -> Attachment:
    """The hooks of the model, which are put in place where there are none."""
    known = _attached.get(model)
    found = known() if known is not None else None
    if found is not None:
        return found
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attention)
    made = Attachment(weakref.ref(model))
    rotary = [m for m in model.modules() if "Rotary" in type(m).__name__]
    for module in attention_modules(model):
        before, after = _hooks(weakref.ref(made), rotary)
        made.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        made.handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
    made.handles.append(decoder_of(model).register_forward_hook(_after_the_prompt, with_kwargs=True))
    weakref.finalize(made, _detach, made.handles)
    _attached[model] = weakref.ref(made)
    return made


def _after_the_prompt(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """A method that decides on all layers together does so when the decoder has read the prompt."""
    cache = _cache_of(args, kwargs)
    if cache is None or not cache.pending:
        return
    from secateur.cache.rereading import evict_by_rereading

    evict_by_rereading(cache, module, kwargs.get("input_ids", args[0] if args else None))


def _cache_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> CompressedCache | None:
    from secateur.cache.compressed import CompressedCache

    return next((a for a in (*kwargs.values(), *args) if isinstance(a, CompressedCache)), None)


def _detach(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attentions of a decoder: they know the number of their layer and the configuration."""
    return [
        module
        for module in model.modules()
        if "Attention" in type(module).__name__
        and isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "config")
        and not getattr(module, "is_cross_attention", False)
    ]


def decoder_of(model: nn.Module) -> nn.Module:
    """The innermost module that holds all attentions and takes tokens and a cache: the model without its head."""
    found, wanted = model, set(attention_modules(model))
    for module in model.modules():
        names = inspect.signature(module.forward).parameters if any(True for _ in module.children()) else {}
        if "input_ids" in names and {"cache", "past_key_values"} & set(names) and wanted <= set(module.modules()):
            found = module
    return found


def check_interface(module: nn.Module) -> None:
    """Raises UnsupportedModelError for an attention that is written out, as Falcon's was before transformers 5.25, and
    for ALiBi.

    There is no place in it at which something else could attend to what is left, short of a second copy of its code;
    and its attention would go on over rows that it takes for the whole text.
    """
    files = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
    if not any(hasattr(file, "ALL_ATTENTION_FUNCTIONS") for file in files):
        raise UnsupportedModelError(_by_itself(module))
    if getattr(module.config, "alibi", False):
        raise UnsupportedModelError(
            f"{type(module).__name__} adds the bias of ALiBi to its mask, by the distance of every token, which isn't"
            " followed when tokens leave: use a model with rotary or learned positions"
        )


def _by_itself(module: nn.Module) -> str:
    return (
        f"{type(module).__name__} computes its attention by itself and doesn't ask transformers' AttentionInterface for"
        " it, so that nothing can attend to a compressed cache in its place"
    )


def _hooks(
    attachment: weakref.ref[Attachment], rotary: list[nn.Module]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = _cache_of(args, kwargs)
        if cache is None:
            return
        if cache.attachment is not attachment():
            raise UsageError(
                "this compressed cache was made for another model: make one with compressed_cache(spec, model)"
            )
        layer = cache.layers[module.layer_idx]  # type: ignore[index]
        if not isinstance(layer, CompressedLayer):
            return
        config: Any = module.config
        arguments = kwargs if "hidden_states" in kwargs or not args else {**kwargs, "hidden_states": args[0]}
        call = Call(module, layer, config._attn_implementation, arguments, rotary, cache.warned)
        base_attention(module, call.implementation)
        layer.call = call
        config._attn_implementation_internal = IMPLEMENTATION
        _active[module] = call

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        call = _active.pop(module, None)
        if call is None:
            return
        call.layer.call = None
        module.config._attn_implementation_internal = call.implementation  # type: ignore[union-attr]
        if result is not None and not call.used:
            raise UnsupportedModelError(_by_itself(module))

    return before, after


def cache_argument(forward: Callable[..., Any]) -> str:
    """What this version of transformers calls the argument: ``cache``, before it was ``past_key_values``."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
