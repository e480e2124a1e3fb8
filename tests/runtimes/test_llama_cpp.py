"""llama.cpp itself reads the GGUF files, splits text as the tokenizer does, and computes what the model computes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

import secateur as sc
from families import make_tiny, tiny_ids
from gguf_graphs import File
from hand_cut import without_sub_layers
from runs import plan_for
from secateur.models.sources import Source
from secateur.runtimes.gguf import write_gguf

pytest.importorskip("llama_cpp_py_sync")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TEXT = "def f(x):\n    return 12345  # it's a test, don't"


@pytest.fixture
def llama_cpp(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("llamacpp").LlamaCpp


def cut(family: str, **options):
    model = make_tiny(family, vocab_size=520)
    return sc.apply(plan_for("flap", model, tiny_ids(), **{"sparsity": 0.4, **options}), model)


UNIFORM = {"structure": "UL-UM", "sparsity": 0.5}
CASES = {
    "llama": ("llama", lambda: make_tiny("llama", vocab_size=520)),
    "biases": ("llama", lambda: make_tiny("llama-tied-bias", vocab_size=520)),
    "qwen2": ("qwen2", lambda: make_tiny("qwen2", vocab_size=520)),
    "qwen3": ("qwen3", lambda: make_tiny("qwen3", vocab_size=520)),
    "gemma3": ("gemma3", lambda: make_tiny("gemma3", vocab_size=520, num_hidden_layers=7)),
    "phi3": ("phi3", lambda: make_tiny("phi3", vocab_size=520)),
    "gpt_neox": ("gptneox", lambda: make_tiny("gpt_neox", vocab_size=520)),
    "uniform llama": ("llama", lambda: cut("llama", **UNIFORM)),
    "uniform qwen3": ("qwen3", lambda: cut("qwen3", bias=False, **UNIFORM)),
    "uniform phi3": ("llama", lambda: cut("phi3", **UNIFORM)),
    "llama per layer": ("deci", lambda: cut("llama")),
    "phi3 per layer": ("deci", lambda: cut("phi3")),
    "biases per layer": ("deci", lambda: cut("llama-tied-bias")),
    "uniform qwen2": ("llama", lambda: cut("qwen2", **UNIFORM)),
    "qwen2 per layer": ("deci", lambda: cut("qwen2")),
    "sub-layers gone": ("deci", lambda: without_sub_layers(vocab_size=520)),
    "llama3": (
        "llama",
        lambda: make_tiny(
            "llama",
            vocab_size=520,
            rope_parameters={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 500.0,
            },
        ),
    ),
}


@pytest.mark.parametrize(("graph", "make"), CASES.values(), ids=CASES)
def test_logits(graph: str, make, tmp_path: Path, tiny_tokenizer, llama_cpp) -> None:
    made, file = make(), tmp_path / "model.gguf"
    # where torch can't run what is written, another model gives the same
    cut, model = made if isinstance(made, tuple) else (made, made)
    write_gguf(Source(cut), tiny_tokenizer, file, "float32")
    assert File(file).graph == graph
    runtime, ids = llama_cpp(file, context=64), tiny_tokenizer(TEXT)["input_ids"]
    try:
        assert runtime.tokenize(TEXT) == ids
        logits = runtime.logits(ids)
    finally:
        runtime.close()
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0]
    # the KV cache is float16
    torch.testing.assert_close(logits, wanted, atol=0.02 * float(wanted.std()), rtol=0)


def test_sentencepiece_words(tmp_path: Path, sentencepiece, llama_cpp) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(Source(make_tiny("llama", vocab_size=len(sentencepiece))), sentencepiece, file, "float32")
    runtime = llama_cpp(file, context=64)
    try:
        for text in (TEXT, "Two  spaces, é 你", "new\n\nlines"):
            assert runtime.tokenize(text) == sentencepiece(text)["input_ids"]
    finally:
        runtime.close()
