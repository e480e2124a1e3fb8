"""What llama.cpp computes from a GGUF file, written down a second time in the plainest way: logits of one sequence.

It follows ``src/models/`` of llama.cpp and shares nothing with the package, so that names, arrays, permutations and
biases of a file are held against a reader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

INTERLEAVED = ("llama", "deci")


class File:
    """Entries and tensors of a GGUF file; ``left`` are the tensors that nobody has asked for yet."""

    def __init__(self, path: Path) -> None:
        gguf = pytest.importorskip("gguf")
        reader = gguf.GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {t.name: t.tensor_type.name for t in reader.tensors}
        self.tensors = {
            t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)).reshape([int(n) for n in reversed(t.shape)])
            for t in reader.tensors
        }
        self.left = set(self.tensors)
        self.graph = self.fields["general.architecture"]

    def entry(self, key: str, default: Any = None) -> Any:
        return self.fields.get(f"{self.graph}.{key}", default)

    def of_layer(self, key: str, layer: int) -> int:
        value = self.entry(key)
        return value[layer] if isinstance(value, list) else value

    def get(self, name: str) -> Tensor | None:
        self.left.discard(name)
        return self.tensors.get(name)


def logits(file: File, ids: list[int]) -> Tensor:
    """[tokens, vocabulary] float32; every tensor of the file must have been used."""
    hidden = file.entry("embedding_length")
    x_TD = file.tensors["token_embd.weight"][ids]
    if file.graph == "gemma3":
        x_TD = x_TD * hidden**0.5
    for layer in range(file.entry("block_count")):
        x_TD = _block(file, layer, x_TD)
    x_TD = _norm(file, "output_norm", x_TD)
    head = file.get("output.weight")
    file.get("token_embd.weight")
    used = file.tensors["token_embd.weight"] if head is None else head
    assert not file.left, f"nobody reads {sorted(file.left)}"
    return x_TD @ used.T


def _block(file: File, layer: int, x_TD: Tensor) -> Tensor:
    heads, width = file.of_layer("attention.head_count", layer), file.of_layer("feed_forward_length", layer)
    at = f"blk.{layer}"
    attended = None
    if heads:
        attended = _attention(file, layer, _norm(file, f"{at}.attn_norm", x_TD))
        if file.graph == "gemma3":
            attended = _norm(file, f"{at}.post_attention_norm", attended)
    if not width:
        return x_TD  # the graph deci leaves out the attention too
    if file.graph == "gptneox" and file.entry("use_parallel_residual"):
        return x_TD + attended + _ffn(file, at, _norm(file, f"{at}.ffn_norm", x_TD))
    x_TD = x_TD if attended is None else x_TD + attended
    added = _ffn(file, at, _norm(file, f"{at}.ffn_norm", x_TD))
    return x_TD + (_norm(file, f"{at}.post_ffw_norm", added) if file.graph == "gemma3" else added)


def _linear(file: File, name: str, x_TI: Tensor) -> Tensor:
    weight, bias = file.get(f"{name}.weight"), file.get(f"{name}.bias")
    assert weight is not None, name
    out = x_TI @ weight.T
    return out if bias is None else out + bias


def _norm(file: File, name: str, x: Tensor) -> Tensor:
    weight, bias = file.get(f"{name}.weight"), file.get(f"{name}.bias")
    if file.graph == "gptneox":
        return F.layer_norm(x, x.shape[-1:], weight, bias, file.entry("attention.layer_norm_epsilon"))
    return F.rms_norm(x, x.shape[-1:], weight, file.entry("attention.layer_norm_rms_epsilon"))


def _ffn(file: File, at: str, x_TD: Tensor) -> Tensor:
    up = _linear(file, f"{at}.ffn_up", x_TD)
    if file.graph == "gptneox":
        inner = F.gelu(up)
    elif file.graph == "phi3":
        gate, up = up.chunk(2, dim=-1)
        inner = F.silu(gate) * up
    else:
        gate = _linear(file, f"{at}.ffn_gate", x_TD)
        inner = (F.gelu(gate, approximate="tanh") if file.graph == "gemma3" else F.silu(gate)) * up
    return _linear(file, f"{at}.ffn_down", inner)


def _attention(file: File, layer: int, x_TD: Tensor) -> Tensor:
    at, size = f"blk.{layer}", file.entry("attention.key_length")
    heads, kv = (file.of_layer(f"attention.{key}", layer) for key in ("head_count", "head_count_kv"))
    if f"{at}.attn_qkv.weight" in file.tensors:
        q, k, v = _linear(file, f"{at}.attn_qkv", x_TD).split([heads * size, kv * size, kv * size], dim=-1)
    else:
        q, k, v = (_linear(file, f"{at}.attn_{part}", x_TD) for part in "qkv")
    q_THE, k_TKE, v_TKE = (t.unflatten(-1, (-1, size)) for t in (q, k, v))
    if file.graph in ("qwen3", "gemma3"):
        q_THE, k_TKE = _norm(file, f"{at}.attn_q_norm", q_THE), _norm(file, f"{at}.attn_k_norm", k_TKE)
    windowed = file.graph == "gemma3" and (layer + 1) % 6 != 0
    q_THE, k_TKE = (_rotated(file, t, windowed) for t in (q_THE, k_TKE))
    k_THE, v_THE = (t.repeat_interleave(heads // kv, dim=1) for t in (k_TKE, v_TKE))
    scores_HTS = torch.einsum("the,she->hts", q_THE, k_THE) / size**0.5
    distance_TS = torch.arange(len(x_TD))[:, None] - torch.arange(len(x_TD))
    seen_TS = distance_TS >= 0
    if windowed:
        seen_TS &= distance_TS < file.entry("attention.sliding_window")
    shares_HTS = scores_HTS.masked_fill(~seen_TS, float("-inf")).softmax(dim=-1)
    return _linear(file, f"{at}.attn_output", torch.einsum("hts,she->the", shares_HTS, v_THE).flatten(1))


def _rotated(file: File, x_THE: Tensor, windowed: bool) -> Tensor:
    dims, base = file.entry("rope.dimension_count"), 10_000.0 if windowed else file.entry("rope.freq_base")
    factors = file.get("rope_freqs.weight")
    if file.entry("rope.scaling.type") == "linear" and not windowed:
        factors = torch.tensor(file.entry("rope.scaling.factor"))
    frequencies = base ** -(torch.arange(0, dims, 2) / dims) / (1.0 if factors is None else factors)
    angle_T1P = torch.arange(len(x_THE))[:, None, None] * frequencies
    rotated = x_THE.clone()
    part = torch.arange(dims)
    first, second = (part[::2], part[1::2]) if file.graph in INTERLEAVED else part.chunk(2)
    a, b = x_THE[..., first], x_THE[..., second]
    rotated[..., first] = a * angle_T1P.cos() - b * angle_T1P.sin()
    rotated[..., second] = a * angle_T1P.sin() + b * angle_T1P.cos()
    return rotated
