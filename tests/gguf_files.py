"""GGUF files to read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest


def write_gguf(path: Path, model, tokenizer) -> None:
    """A float32 GGUF file of a tiny Llama, with its heads permuted the way llama.cpp wants them."""
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(state["vocab"], key=state["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = array.shape[0] // config.head_dim
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shorten(source: Path, target: Path, layers: int, vocabulary: int, neurons: int) -> None:
    """The first blocks, neurons and tokens of a GGUF file, as a file of its own; weights stay quantised.

    Tokens of a byte-level BPE stand in the order of the merges that make them, so the first ones are a tokenizer too.
    """
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tokens = fields["tokenizer.ggml.tokens"][:vocabulary]
    known, architecture = set(tokens), fields["general.architecture"]
    fields |= {
        f"{architecture}.block_count": layers,
        f"{architecture}.feed_forward_length": neurons,
        f"{architecture}.vocab_size": vocabulary,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": fields["tokenizer.ggml.token_type"][:vocabulary],
        "tokenizer.ggml.merges": [m for m in fields["tokenizer.ggml.merges"] if m.replace(" ", "") in known],
    }
    width = int(reader.fields[f"{architecture}.feed_forward_length"].contents())
    rows = {"token_embd": vocabulary, "output": vocabulary, "ffn_gate": neurons, "ffn_up": neurons}
    # the writer says the architecture by itself
    writer = gguf.GGUFWriter(target, fields.pop("general.architecture"))
    for name, value in fields.items():
        types = reader.fields[name].types
        writer.add_key_value(name, value, types[0], sub_type=types[1] if len(types) > 1 else None)
    for tensor in reader.tensors:
        _, _, block = tensor.name.partition("blk.")
        if not block or int(block.partition(".")[0]) < layers:
            kind = tensor.name.removesuffix(".weight").rpartition(".")[2]
            data = tensor.data[: rows.get(kind)]
            if kind == "ffn_down":
                # a row is bytes, where it is quantised: of blocks of inputs, one after the other
                data = data[:, : data.shape[1] * neurons // width]
            writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
