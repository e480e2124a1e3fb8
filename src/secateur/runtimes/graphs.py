"""The graphs of llama.cpp: which models each of them computes, and what a GGUF file for it must hold.

llama.cpp has one graph per architecture, with a fixed set of tensors: one that the graph doesn't know makes it refuse
the file, and sizes are those of layer 0 unless the graph reads them per layer. So a model is written for the first
graph that holds all of it. Which tensors are optional, and which sizes are free, is read off llama.cpp itself:
``conversion/`` at 2bbcf7f (deci), 0274f0f (llama), 051139f (phi) and 061b8c5 (gemma), ``src/models/`` at 75dc8f6. Build
b11739 was tried with all graphs; earlier ones want a bias of queries to be as wide as the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from secateur.errors import UnsupportedModelError
from secateur.runtimes.sizes import Sizes

_QKV = frozenset({"q", "k", "v"})
_PROJECTIONS = _QKV | {"o", "gate", "up", "down"}
_NEOX_BIASES = frozenset({"qkv", "o", "up", "down"})
_LLAMA_TYPES = ("llama", "mistral", "qwen2", "phi3")
# what the Llama-like graphs lack of the others
_LACKS = {
    "qwen3": "norms of queries and keys",
    "gemma3_text": "norms of queries, keys and the outputs of each sub-layer, and a GELU",
    "gpt_neox": "layer norms with biases, and an FFN without a gate",
}
_PLACES = {
    "q": "queries",
    "k": "keys",
    "v": "values",
    "qkv": "queries, keys and values",
    "o": "the attention output",
    "gate": "the FFN gate",
    "up": "the FFN input",
    "gate_up": "the FFN input",
    "down": "the FFN output",
}


def _nothing(config: Any, sizes: Sizes) -> Iterable[str]:
    return ()


def _no_metadata(writer: Any, config: Any, sizes: Sizes) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One architecture of llama.cpp. ``lacks`` says what it would need to compute models of other types.

    ``biases`` are the roles of projections that may have one, ``required`` those that must. ``per_layer`` graphs read
    head counts and FFN widths per layer; in those with ``free_heads`` the heads needn't fill the hidden size.
    ``split`` ones want q, k, v, gate and up as tensors of their own. With ``interleaved`` rotary pairs are
    neighbours, which transformers has half a head apart. ``rotary`` are the types of rotary embeddings; graphs with
    ``factors`` divide the frequencies by those in the file. ``norm_offset`` is added to the weights of norms.
    ``own_head`` ones have no tied head.
    """

    name: str
    model_types: tuple[str, ...]
    lacks: Mapping[str, str] = field(default_factory=dict)
    biases: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    per_layer: bool = False
    free_heads: bool = False
    split: bool = False
    interleaved: bool = False
    rotary: tuple[str, ...] = ("default",)
    factors: bool = False
    norm_offset: float = 0.0
    own_head: bool = False
    activation: str = "silu"
    epsilon: str = "rms_norm_eps"
    also: Callable[[Any, Sizes], Iterable[str]] = _nothing
    """what else the graph would need for this model"""
    metadata: Callable[[Any, Any, Sizes], None] = _no_metadata
    """writes entries that only this graph reads"""

    def needs(self, config: Any, sizes: Sizes) -> list[str]:
        """What the graph would need to hold this model, in words; empty when it does hold it."""
        if config.model_type in self.lacks:
            return [self.lacks[config.model_type]]
        found = []
        if not self.per_layer and not sizes.uniform:
            found.append("head counts and FFN widths per layer")
        if not self.free_heads and not sizes.square:
            found.append("heads that don't fill the hidden size")
        if extra := sorted(_split(sizes.biases, self.split) - self.biases):
            found.append(f"a bias for {' and '.join(_PLACES[role] for role in extra)}")
        kind = sizes.rotary.kind if sizes.rotary else "none"
        if kind not in self.rotary:
            found.append(f"rotary embeddings of type {kind}")
        # Gemma has a name of its own for it
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        if activation != self.activation:
            found.append(f"the activation {activation}")
        return [*found, *self.also(config, sizes)]


def _split(roles: frozenset[str], split: bool) -> frozenset[str]:
    parts = {"qkv": {"q", "k", "v"}, "gate_up": {"gate", "up"}} if split else {}
    return frozenset(part for role in roles for part in parts.get(role, {role}))


def _llama_needs(config: Any, sizes: Sizes) -> Iterable[str]:
    if sizes.rotary and sizes.rotary.dims != sizes.head_dim:
        yield "rotary embeddings of a part of each head"
    if sizes.stray_biases:
        yield "a bias where there is no attention or FFN"
    if sizes.heads[0] == 0:
        yield "a first layer without attention, from which it takes the size of a head"


def _gemma3_needs(config: Any, sizes: Sizes) -> Iterable[str]:
    layers = range(len(sizes.blocks))
    if list(config.layer_types) != ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in layers]:
        yield "another order of layers with a window than five of six"
    if config.rope_parameters["sliding_attention"]["rope_theta"] != 10_000:
        yield "another base of rotary frequencies in layers with a window than 10000"
    # the 27B model is known by its 62 layers, and scales by the hidden size
    scale = sizes.hidden / sizes.heads[0] if len(layers) == 62 else sizes.head_dim
    if config.query_pre_attn_scalar != scale:
        yield f"attention scaled by {config.query_pre_attn_scalar} instead of {scale:g}"
    if config.attn_logit_softcapping:
        yield "a soft cap of the logits of attention"


def _gemma3_metadata(writer: Any, config: Any, sizes: Sizes) -> None:
    import gguf

    writer.add_sliding_window(config.sliding_window)
    if sizes.rotary and sizes.rotary.kind == "linear":
        # of the layers that see everything
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["full_attention"]["factor"])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _gpt_neox_needs(config: Any, sizes: Sizes) -> Iterable[str]:
    if not config.attention_bias:
        yield "attention without biases"


_LLAMA = Graph(
    name="llama",
    model_types=_LLAMA_TYPES,
    lacks=_LACKS,
    biases=_PROJECTIONS,
    free_heads=True,
    split=True,
    interleaved=True,
    rotary=("default", "linear", "llama3"),
    factors=True,
    also=_llama_needs,
)

GRAPHS = (
    Graph(name="qwen2", model_types=("qwen2",), biases=_QKV, required=_QKV),
    Graph(name="qwen3", model_types=("qwen3",), free_heads=True),
    Graph(
        name="gemma3",
        model_types=("gemma3_text",),
        free_heads=True,
        rotary=("default", "linear"),
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
        also=_gemma3_needs,
        metadata=_gemma3_metadata,
    ),
    # zero tells Phi-3 models without a window from older files
    Graph(name="phi3", model_types=("phi3",), metadata=lambda writer, config, sizes: writer.add_sliding_window(0)),
    Graph(
        name="gptneox",
        model_types=("gpt_neox",),
        biases=_NEOX_BIASES,
        required=_NEOX_BIASES,
        own_head=True,
        activation="gelu",
        epsilon="layer_norm_eps",
        also=_gpt_neox_needs,
        metadata=lambda writer, config, sizes: writer.add_parallel_residual(config.use_parallel_residual),
    ),
    _LLAMA,
    replace(_LLAMA, name="deci", per_layer=True),
)


def graph_for(config: Any, sizes: Sizes) -> Graph:
    """The first graph that holds the model. Raises UnsupportedModelError, which says what each would need."""
    model_type = config.model_type
    own = [graph for graph in GRAPHS if model_type in graph.model_types]
    if not own:
        known = ", ".join(sorted({name for graph in GRAPHS for name in graph.model_types}))
        raise UnsupportedModelError(f"secateur writes GGUF for {known}, not for {model_type}")
    needs = {}
    for graph in (*own, *(graph for graph in GRAPHS if model_type in graph.lacks)):
        needs[graph.name] = graph.needs(config, sizes)
        if not needs[graph.name]:
            return graph
    reasons = "; ".join(f"{name} would need {', and '.join(what)}" for name, what in needs.items())
    raise UnsupportedModelError(f"no graph of llama.cpp holds this {model_type} model: {reasons}")
