"""Tiny random models of every decoder family; each a real transformers class with its real quirks."""

from __future__ import annotations

import copy
from typing import Any

import torch

COMMON = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GQA = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 40, "head_dim": 8, "max_position_embeddings": 64}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# name → (config class, arguments)
FAMILY_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GQA),
    "llama-tied-bias": ("LlamaConfig", {**GQA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {**GQA, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", {k: v for k, v in GQA.items() if k != "head_dim"}),
    "qwen3": ("Qwen3Config", GQA),
    "gemma2": ("Gemma2Config", {**GQA, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {**GQA, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", {k: v for k, v in GQA.items() if k != "head_dim"}),
    "olmo2": ("Olmo2Config", {k: v for k, v in GQA.items() if k != "head_dim"}),
    "smollm3": ("SmolLM3Config", GQA),
    "granite": ("GraniteConfig", {k: v for k, v in GQA.items() if k != "head_dim"}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {**COMMON, "intermediate_size": 40, "max_position_embeddings": 64},
    ),
    "opt": (
        "OPTConfig",
        {**COMMON, "ffn_dim": 40, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    ),
    "falcon": ("FalconConfig", {**COMMON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-mqa": ("FalconConfig", {**COMMON, "multi_query": True, "new_decoder_architecture": False}),
    "falcon-mha": ("FalconConfig", {**COMMON, "multi_query": False, "new_decoder_architecture": False, "bias": True}),
    "falcon-alibi": (
        "FalconConfig",
        {**COMMON, "multi_query": False, "new_decoder_architecture": False, "alibi": True},
    ),
}
# one of every layout: matrices as they are, with biases, with norms in many places, fused, transposed, and both in
# turns by head; the others are made like one of these
LAYOUTS = ("llama", "llama-tied-bias", "qwen3", "gemma3", "phi3", "gpt2", "gpt_neox", "opt", "falcon")


def make_tiny(family: str, seed: int = 0, **changes: Any):
    """A random model of that family in eval mode; weights are large enough that every part shows in the logits."""
    import transformers

    name, arguments = FAMILY_CONFIGS[family]
    config = getattr(transformers, name)(**{**SPECIAL, **copy.deepcopy(arguments), **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.dim() > 1 else 0.1
            offset = parameter.mean().round() if parameter.dim() == 1 else 0.0
            parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))
    model.generation_config.pad_token_id = 0
    return model


def tiny_ids(windows: int = 6, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Random token ids, [windows, length] int64."""
    return torch.randint(3, 96, (windows, length), generator=torch.Generator().manual_seed(seed))
