"""GGUF files for llama.cpp: one tensor in memory at a time, under the names and in the order that its graphs read.

Sizes that differ from layer to layer go into the arrays ``attention.head_count``, ``attention.head_count_kv`` and
``feed_forward_length`` of the graph ``deci``; zero is a sub-layer that isn't there.

Source: llama.cpp, ``conversion/``, at the commits named in ``graphs``. Differs: fused projections are split where a
graph wants parts, biases that are zero throughout are left out where they are optional, and a missing FFN beside an
attention or in the last layer gets 32 neurons that do nothing: ``deci`` skips the rest of a layer without an FFN, its
attention and, in the last layer, the choice of outputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import ModelLoadError, NonFiniteError, UnsupportedModelError, require_extra
from secateur.finite import all_finite
from secateur.models.decoders import qkv_rows
from secateur.models.sources import stored_names
from secateur.runtimes.graphs import Graph, graph_for
from secateur.runtimes.sizes import Sizes, sizes_of
from secateur.runtimes.vocabulary import read_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from secateur.models.sources import Source

# dtype option → type of the matrices in the file
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
# neurons that stand in for an FFN that isn't there; rows of 32 can be quantised
_IDLE_NEURONS = 32


@dataclass(frozen=True)
class Piece:
    """One tensor of the file, made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_gguf(source: Source, tokenizer: PreTrainedTokenizerBase | None, path: Path, dtype: str) -> None:
    """Write a model and its tokenizer to one ``.gguf`` file.

    ``dtype`` is that of the matrices: one of ``TYPES``, or ``auto`` for the model's own; norms and biases are float32.
    Rows that don't divide into blocks of 32 are float16 where q8_0 is asked for, as llama.cpp does it.
    Raises UnsupportedModelError where llama.cpp has no graph or no tokenizer for the model, ModelLoadError for a model
    without a tokenizer, NonFiniteError or MissingExtraError.
    """
    gguf: Any = require_extra("gguf", "gguf", "writing a GGUF file")
    model: Any = source.model
    sizes = sizes_of(source)
    graph = graph_for(model.config, sizes)
    if tokenizer is None:
        raise ModelLoadError("the model has no tokenizer, which a GGUF file must hold")
    vocabulary = read_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    wanted = TYPES[_own_dtype(source) if dtype == "auto" else dtype]
    pieces = list(_pieces(source, graph, sizes))
    kinds = [_kind(gguf, piece, wanted) for piece in pieces]
    writer = gguf.GGUFWriter(path, graph.name)
    try:
        writer.add_type("model")
        writer.add_name(str(getattr(model, "secateur_name", "") or path.stem))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[wanted]])
        _add_sizes(writer, graph, model.config, sizes, len(vocabulary.tokens))
        vocabulary.write(writer)
        for piece, kind in zip(pieces, kinds, strict=True):
            block, size = gguf.GGML_QUANT_SIZES[kind]
            stored_bytes = math.prod(piece.shape) // block * size
            writer.add_tensor_info(piece.name, piece.shape, np.dtype(np.float32), stored_bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for piece, kind in zip(pieces, kinds, strict=True):
            writer.write_tensor_data(_stored(gguf, piece, kind))
    finally:
        writer.close()


def _own_dtype(source: Source) -> str:
    """The dtype of most of the parameters."""
    counts: Counter[str] = Counter()
    for name in stored_names(source.model):
        origin = source.origin(name)
        counts[str(origin.dtype).removeprefix("torch.")] += math.prod(origin.shape)
    own = counts.most_common(1)[0][0]
    return own if own in TYPES else "float32"


def _kind(gguf: Any, piece: Piece, wanted: str) -> Any:
    """The type in which a tensor is stored."""
    if len(piece.shape) < 2:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[wanted]]
    return gguf.GGMLQuantizationType["F16" if piece.shape[-1] % block else wanted]


def _stored(gguf: Any, piece: Piece, kind: Any) -> np.ndarray:
    tensor = piece.make().float()
    if not all_finite(tensor):
        raise NonFiniteError(f"{piece.name}: weights are NaN or inf")
    with np.errstate(over="ignore"):
        array = gguf.quants.quantize(np.ascontiguousarray(tensor.numpy()), kind)
    if array.dtype == np.float16 and not np.isfinite(array).all():
        raise NonFiniteError(f"{piece.name}: weights are larger than float16 holds; take --dtype bfloat16 or float32")
    return array


def _add_sizes(writer: Any, graph: Graph, config: Any, sizes: Sizes, tokens: int) -> None:
    def whole_or_array(values: list[int]) -> Any:
        return values if graph.per_layer else values[0]

    rotary = sizes.rotary
    assert rotary is not None  # graphs without one are refused
    writer.add_vocab_size(tokens)
    # the graphs know no window but Gemma's: up to its size all is the same
    window = None if config.model_type == "gemma3_text" else getattr(config, "sliding_window", None)
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(sizes.hidden)
    writer.add_block_count(len(sizes.blocks))
    writer.add_feed_forward_length(whole_or_array(_widths(sizes)))
    writer.add_head_count(whole_or_array(sizes.heads))
    writer.add_head_count_kv(whole_or_array(sizes.kv_heads))
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_rope_dimension_count(rotary.dims)
    writer.add_rope_freq_base(rotary.theta)
    epsilon = getattr(config, graph.epsilon)
    if graph.epsilon == "layer_norm_eps":
        writer.add_layer_norm_eps(epsilon)
    else:
        writer.add_layer_norm_rms_eps(epsilon)
    graph.metadata(writer, config, sizes)


def _widths(sizes: Sizes) -> list[int]:
    """FFN widths as the file has them: never zero beside an attention, or in the last layer."""
    last = len(sizes.blocks) - 1
    both = enumerate(zip(sizes.heads, sizes.neurons, strict=True))
    return [neurons or (_IDLE_NEURONS if heads or i == last else 0) for i, (heads, neurons) in both]


def _pieces(source: Source, graph: Graph, sizes: Sizes) -> Iterator[Piece]:
    import gguf

    model: Any = source.model
    architectures = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[graph.name], len(sizes.blocks))

    def gguf_name(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UnsupportedModelError(f"no graph of llama.cpp holds this model: {graph.name} has no place for {name}")
        return found

    gone = [f"blk.{i}.attn" for i, heads in enumerate(sizes.heads) if not heads]
    gone += [f"blk.{i}.ffn" for i, width in enumerate(_widths(sizes)) if not width]
    for name in stored_names(model):
        for part, rows in _parts(name, graph, sizes):
            found = gguf_name(part)
            if not found.startswith(tuple(f"{place}_" for place in gone)):
                yield _piece(source, found, name, rows, graph.norm_offset if name.endswith("norm.weight") else 0.0)
    for block, width in zip(sizes.blocks, _widths(sizes), strict=True):
        if width and not block.has_mlp:
            # as the graph has them, which splits what is fused
            reads, writes = (width, sizes.hidden), (sizes.hidden, width)
            for part, shape in (("gate_proj", reads), ("up_proj", reads), ("down_proj", writes)):
                yield Piece(gguf_name(block.path("mlp", part, "weight")), shape, partial(torch.zeros, shape))
    if graph.own_head and model.config.tie_word_embeddings:
        tied = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
        yield _piece(source, "output.weight", tied, None, 0.0)
    if graph.factors and sizes.rotary and not torch.allclose(sizes.rotary.factors, torch.ones(1), rtol=1e-6):
        factors = sizes.rotary.factors
        yield Piece("rope_freqs.weight", tuple(factors.shape), lambda: factors)


def _piece(source: Source, name: str, stored: str, rows: Tensor | None, offset: float) -> Piece:
    shape = tuple(source.origin(stored).shape)
    if name.startswith("blk.") and 0 in shape:  # of an FFN that has no neurons
        shape = tuple(size or _IDLE_NEURONS for size in shape)
        return Piece(name, shape, partial(torch.zeros, shape))

    def make() -> Tensor:
        tensor = source.tensor(stored).cpu()
        tensor = tensor if rows is None else tensor[rows]
        return tensor.float() + offset if offset else tensor

    return Piece(name, shape if rows is None else (len(rows), *shape[1:]), make)


def _parts(name: str, graph: Graph, sizes: Sizes) -> Iterator[tuple[str, Tensor | None]]:
    """(name as a Llama has it, its rows in the order of the graph) of each tensor that one of the model becomes."""
    path, _, leaf = name.rpartition(".")
    role, block = sizes.roles.get(path), sizes.block_of(name)
    if name in sizes.zero_biases and role not in graph.required:
        return
    if block is None or role not in ("q", "k", "qkv", "gate_up"):
        yield name, None
        return
    if role == "gate_up":
        if not graph.split:
            yield name, None
            return
        gate, up = torch.arange(2 * block.neurons).chunk(2)
        yield block.path("mlp", f"gate_proj.{leaf}"), gate
        yield block.path("mlp", f"up_proj.{leaf}"), up
        return
    q, k, v = qkv_rows(block.family.qkv_layout, block.heads, block.kv_heads, block.head_dim)
    if role == "qkv" and graph.split:
        yield block.path("self_attn", f"q_proj.{leaf}"), _paired(q, graph)
        yield block.path("self_attn", f"k_proj.{leaf}"), _paired(k, graph)
        yield block.path("self_attn", f"v_proj.{leaf}"), v.flatten()
    elif role == "qkv":
        yield name, torch.cat([q.flatten(), k.flatten(), v.flatten()])
    else:
        yield name, _paired({"q": q, "k": k}[role], graph) if graph.interleaved else None


def _paired(rows_HE: Tensor, graph: Graph) -> Tensor:
    """Rows of heads one after the other, with the two halves that a rotation joins side by side."""
    if not graph.interleaved:
        return rows_HE.flatten()
    return rows_HE.unflatten(1, (2, -1)).transpose(1, 2).flatten()
