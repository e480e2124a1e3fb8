"""GGUF files: what llama.cpp's graphs compute from them is what the model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur as sc
from families import make_tiny, tiny_ids
from gguf_graphs import File, logits
from hand_cut import ragged, tiny, without_sub_layers
from runs import plan_for
from secateur.errors import (
    ModelLoadError,
    NonFiniteError,
    OutputError,
    SecateurError,
    UnsupportedModelError,
    UsageError,
)
from secateur.models.sources import Source
from secateur.runtimes.deci import write_deci
from secateur.runtimes.gguf import write_gguf
from sublayers import plan_without

IDS = [3, 41, 5, 92, 65, 35, 8, 97, 93, 2, 38, 46]


def converted(model, tokenizer, folder: Path, **options) -> File:
    """The GGUF file of a model that was saved before, so that its tensors are streamed."""
    saved = sc.save(model, tokenizer, folder / "model")
    return File(sc.convert(saved, folder / "model.gguf", to="gguf", **options))


def agree(model, file: File, ids: list[int] = IDS) -> None:
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(file, ids), wanted, atol=1e-4, rtol=1e-4)


def cut(family: str, **options):
    """A model whose layers have been cut by FLAP, by default each to its own sizes, and got biases."""
    model = make_tiny(family, vocab_size=512)
    return sc.apply(plan_for("flap", model, tiny_ids(), **{"sparsity": 0.4, **options}), model)


@pytest.mark.parametrize(
    ("family", "graph"),
    [
        ("llama", "llama"),
        ("llama-tied-bias", "llama"),
        ("mistral", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("gemma3", "gemma3"),
        ("phi3", "phi3"),
        ("gpt_neox", "gptneox"),
    ],
)
def test_dense_models(family: str, graph: str, tmp_path: Path, tiny_tokenizer) -> None:
    # transformers gives a Qwen2 tokenizer a token more
    model = make_tiny(family, vocab_size=520)
    file = converted(model, tiny_tokenizer, tmp_path)
    assert file.graph == graph
    if family == "mistral":  # whose window the graph doesn't know: until it is full, all is the same
        assert file.entry("context_length") == model.config.sliding_window == 8
        agree(model, file, IDS[:8])
    else:
        agree(model, file, IDS)


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "phi3"])
def test_sizes_and_biases_that_differ_per_layer(family: str, tmp_path: Path, tiny_tokenizer) -> None:
    model = cut(family)
    file = converted(model, tiny_tokenizer, tmp_path)
    blocks = model.model.layers
    size = model.model.layers[0].self_attn.head_dim
    assert file.graph == "deci"
    assert file.entry("feed_forward_length") == [b.mlp.down_proj.in_features for b in blocks]
    assert file.entry("attention.head_count") == [b.self_attn.o_proj.in_features // size for b in blocks]
    assert len(set(file.entry("feed_forward_length"))) > 1
    assert any(name.endswith("ffn_down.bias") for name in file.tensors)
    agree(model, file)


def test_a_uniform_cut_keeps_the_plain_graph(tmp_path: Path, tiny_tokenizer) -> None:
    model = cut("qwen3", sparsity=0.5, structure="UL-UM", bias=False)
    file = converted(model, tiny_tokenizer, tmp_path)
    assert (file.graph, file.entry("attention.head_count"), file.entry("attention.head_count_kv")) == ("qwen3", 2, 1)
    assert file.entry("feed_forward_length") == 20
    agree(model, file)


def test_heads_cut_by_hand(tmp_path: Path, tiny_tokenizer) -> None:
    model = ragged("llama", vocab_size=512)
    file = converted(model, tiny_tokenizer, tmp_path)
    assert file.entry("attention.head_count") == [4, 2, 6] and file.entry("attention.head_count_kv") == [2, 1, 3]
    agree(model, file)


def test_sub_layers_that_are_gone(tmp_path: Path, tiny_tokenizer) -> None:
    model, silenced = without_sub_layers(vocab_size=512)
    write_gguf(Source(model), tiny_tokenizer, tmp_path / "model.gguf", "float32")
    file = File(tmp_path / "model.gguf")
    assert file.entry("attention.head_count") == [6, 0, 6, 0, 6, 0]
    # the graph skips the rest of a layer without neurons, so that some get neurons that do nothing
    assert file.entry("feed_forward_length") == [40, 40, 32, 0, 40, 32]
    agree(silenced, file)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_sub_layers_that_a_plan_removes(family: str, tmp_path: Path, tiny_tokenizer) -> None:
    model = make_tiny(family, vocab_size=512)
    # beside an attention, without one, and in the last layer, where the graph wants an FFN
    cut = sc.apply(plan_without(model, ["layers.0.mlp", "layers.1.attention", "layers.2.mlp"]), model)
    file = converted(cut, tiny_tokenizer, tmp_path)
    assert file.entry("attention.head_count") == [4, 0, 4] and file.entry("feed_forward_length") == [32, 40, 32]
    agree(cut, file)


def test_a_sub_layer_that_leaves_a_bias_is_refused(tmp_path: Path, tiny_tokenizer) -> None:
    model, _ = without_sub_layers(vocab_size=512)
    model.model.layers[1].self_attn.o_proj.bias = torch.nn.Parameter(torch.ones(model.config.hidden_size))
    for write in (write_gguf, write_deci):
        with pytest.raises(UnsupportedModelError, match="a bias where there is no attention or FFN"):
            write(Source(model), tiny_tokenizer, tmp_path / "model.gguf", "auto")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 500.0,
        },
    ],
    ids=["linear", "llama3"],
)
def test_scaled_rotary_frequencies(rope: dict, tmp_path: Path, tiny_tokenizer) -> None:
    model = make_tiny("llama", vocab_size=512, rope_parameters=rope)
    file = converted(model, tiny_tokenizer, tmp_path)
    assert "rope_freqs.weight" in file.tensors
    agree(model, file)


def test_gemma_scales_the_frequencies_of_layers_that_see_everything(tmp_path: Path, tiny_tokenizer) -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    model = make_tiny("gemma3", vocab_size=512, num_hidden_layers=7, rope_parameters=rope)
    file = converted(model, tiny_tokenizer, tmp_path)
    assert file.entry("rope.scaling.factor") == 8 and file.entry("attention.sliding_window") == 8
    agree(model, file)


@pytest.mark.parametrize(
    ("dtype", "kind", "tolerance"),
    [("float32", "F32", 0), ("float16", "F16", 1e-3), ("bfloat16", "BF16", 1e-2), ("q8_0", "Q8_0", 2e-2)],
)
def test_dtypes(dtype: str, kind: str, tolerance: float, tmp_path: Path, tiny_tokenizer) -> None:
    model = tiny("llama", vocab_size=512, hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1)
    file = converted(model, tiny_tokenizer, tmp_path, dtype=dtype)
    assert file.types["blk.0.attn_v.weight"] == kind
    # 40 neurons don't divide into blocks of 32
    assert file.types["blk.0.ffn_down.weight"] == ("F16" if kind == "Q8_0" else kind)
    assert file.types["blk.0.attn_norm.weight"] == "F32"
    weight = model.model.layers[0].self_attn.v_proj.weight.detach()
    torch.testing.assert_close(file.tensors["blk.0.attn_v.weight"], weight, atol=tolerance, rtol=tolerance)


def test_auto_is_the_dtype_of_the_model(tmp_path: Path, tiny_tokenizer) -> None:
    file = converted(tiny("llama", vocab_size=512).bfloat16(), tiny_tokenizer, tmp_path)
    assert file.types["blk.0.attn_q.weight"] == "BF16" and file.fields["general.file_type"] == 32


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: cut("qwen3"),
            "qwen3 would need head counts and FFN widths per layer.*deci would need norms of q",
        ),
        (lambda: cut("gemma3"), "no graph of llama.cpp holds this gemma3_text model: gemma3 would need head counts"),
        (lambda: cut("gpt_neox"), "gptneox would need head counts and FFN widths per layer, and heads that don't fill"),
        (
            lambda: make_tiny("llama", vocab_size=512, rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
            "llama would need rotary embeddings of type dynamic",
        ),
        (lambda: make_tiny("gemma3", vocab_size=512, query_pre_attn_scalar=16), "attention scaled by 16 instead of 8"),
        (lambda: make_tiny("llama", vocab_size=512, hidden_act="relu"), "llama would need the activation relu"),
        (lambda: make_tiny("qwen3", vocab_size=512, hidden_act="gelu"), "qwen3 would need the activation gelu"),
        (lambda: make_tiny("gemma3", vocab_size=512, attn_logit_softcapping=30.0), "a soft cap of the logits of att"),
        (lambda: make_tiny("gpt2", vocab_size=512), "secateur writes GGUF for .*qwen3, not for gpt2"),
    ],
    ids=["qwen3", "gemma3", "gpt_neox", "rope", "scale", "activation", "other activation", "soft cap", "family"],
)
def test_what_llama_cpp_lacks_is_said(make, sentence: str, tmp_path: Path, tiny_tokenizer) -> None:
    saved = sc.save(make(), tiny_tokenizer, tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=sentence):
        sc.convert(saved, tmp_path / "out" / "model.gguf", to="gguf")
    assert list(tmp_path.glob("out/*")) == []


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {"to": "ggfu"},
            UsageError,
            "one of safetensors, gguf, deci, onnx, got 'ggfu'; did you mean 'gguf'",
        ),
        ({"to": "gguf", "dtype": "q4_0"}, UsageError, "dtype of gguf must be one of auto, float32.*got 'q4_0'"),
        ({"to": "gguf", "format": "packed"}, UsageError, "format packed is for safetensors, not for gguf"),
        ({"dtype": "float16"}, UsageError, "dtype float16 is for gguf"),
    ],
)
def test_wrong_requests(options: dict, error: type[SecateurError], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=sentence):
        sc.convert("nowhere", tmp_path / "out", **options)


def test_nothing_half_written(tmp_path: Path, tiny_tokenizer) -> None:
    model = tiny("llama", vocab_size=512)
    saved = sc.save(model, None, tmp_path / "bare")
    with pytest.raises(ModelLoadError, match="has no tokenizer, which a GGUF file must hold"):
        sc.convert(saved, tmp_path / "model.gguf", to="gguf")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = 1e6
    saved = sc.save(model, tiny_tokenizer, tmp_path / "large")
    with pytest.raises(NonFiniteError, match=r"blk.2.ffn_up.weight: weights are larger than float16 holds"):
        sc.convert(saved, tmp_path / "model.gguf", to="gguf", dtype="float16")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = 0
    saved = sc.save(model, tiny_tokenizer, tmp_path / "large", overwrite=True)
    _spoil(saved / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"token_embd\.weight: weights are NaN or inf"):
        sc.convert(saved, tmp_path / "model.gguf", to="gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "large"]
    with pytest.raises(UsageError, match="gguf is written to a file of this machine, not to memory://x"):
        sc.convert(saved, "memory://x", to="gguf")
    saved = sc.save(model, tiny_tokenizer, tmp_path / "large", overwrite=True)
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(OutputError, match="exists: choose another name, or pass --overwrite"):
        sc.convert(saved, tmp_path / "model.gguf", to="gguf")
    sc.convert(saved, tmp_path / "model.gguf", to="gguf", overwrite=True)
    assert File(tmp_path / "model.gguf").graph == "llama"


def _spoil(file: Path) -> None:
    """Let an embedding be NaN in a file that secateur would not have written."""
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][5, 3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


def test_command(cli, tmp_path: Path, tiny_checkpoint: Path) -> None:
    out = tmp_path / "tiny.gguf"
    run = cli("convert", tiny_checkpoint, "--to", "gguf", "--out", out, "--dtype", "q8_0")
    assert run.code == 0 and f"saved to {out}; run it with llama.cpp:\n  llama-cli -m {out}" in run.out
    run = cli("convert", tiny_checkpoint, "--to", "gguf", "--out", out)
    assert run.code == 1 and run.err.count("\n") == 1 and "pass --overwrite" in run.err


def test_transformers_reads_the_file_back(tmp_path: Path, tiny_checkpoint: Path) -> None:
    out = sc.convert(tiny_checkpoint, tmp_path / "tiny.gguf", to="gguf")
    (model, tokenizer), (again, read) = sc.load(tiny_checkpoint), sc.load(out)
    with torch.no_grad():
        ids = torch.tensor([IDS])
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
    text = "def convert(model):\n    return 12345  # it's a test"
    assert read.decode(read(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
