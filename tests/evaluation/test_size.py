"""Size against counts by hand, real files and known allocations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model

from secateur.errors import UsageError
from secateur.evaluation import evaluate_models, make_task
from secateur.evaluation.size import (
    LiveBytes,
    checkpoint_bytes,
    count_bytes,
    count_nonzero,
    count_parameters,
    peak_bytes,
)

EMBEDDING, ATTENTION, MLP, NORMS = 512 * 32, 2 * 32 * 32 + 2 * 16 * 32, 3 * 32 * 64, 32
UNTIED = 2 * EMBEDDING + 2 * (ATTENTION + MLP + 2 * NORMS) + NORMS


def test_parameters_are_counted_once(make_llama: Any) -> None:
    assert count_parameters(make_llama()) == UNTIED
    assert count_parameters(make_llama(tie_word_embeddings=True)) == UNTIED - EMBEDDING


def test_zeros_are_not_counted(tiny_llama: Any) -> None:
    tiny_llama.model.layers[0].mlp.up_proj.weight.data[:10] = 0
    assert count_nonzero(tiny_llama) == UNTIED - 10 * 32


def test_bytes_follow_the_dtype(make_llama: Any) -> None:
    assert count_bytes(make_llama()) == 4 * UNTIED
    assert count_bytes(make_llama(tie_word_embeddings=True).bfloat16()) == 2 * (UNTIED - EMBEDDING)


class Packed(torch.nn.Module):
    """Weights in buffers, one of which a checkpoint leaves out, and one that is there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.register_buffer("bits", torch.zeros(5, dtype=torch.uint8))
        self.register_buffer("again", self.bits)
        self.register_buffer("cache", torch.zeros(100), persistent=False)


def test_buffers_count_where_a_checkpoint_keeps_them() -> None:
    assert count_bytes(Packed()) == 3 * 8 + 5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disk_bytes_are_those_of_the_file(tied: bool, dtype: torch.dtype, make_llama: Any, tmp_path: Path) -> None:
    model = make_llama(tie_word_embeddings=tied).to(dtype)
    save_file(
        {name: p.detach() for name, p in model.named_parameters()},
        tmp_path / "a.safetensors",
        metadata={"format": "pt"},
    )
    assert checkpoint_bytes(model) == (tmp_path / "a.safetensors").stat().st_size


def test_disk_bytes_of_mixed_dtypes(tmp_path: Path) -> None:
    module = torch.nn.ModuleDict({"b": torch.nn.Linear(3, 5).half(), "a": torch.nn.Linear(7, 2).double()})
    save_model(module, str(tmp_path / "a.safetensors"), metadata={"format": "pt"})
    assert checkpoint_bytes(module) == (tmp_path / "a.safetensors").stat().st_size


def test_live_bytes_of_known_tensors() -> None:
    given = torch.ones(1000)
    storage = given.untyped_storage()
    with LiveBytes({storage._cdata: storage}) as live:
        view = given[:10]  # no new memory
        assert live.peak == 0
        one = given * 2
        two = one + 1
        assert live.peak == 8000
        del one
        three = two.view(10, 100).exp()  # takes the place of what was freed
        assert live.peak == 8000
        four = three + two.sum()
        assert live.peak == 12004
    assert view.numel() + four.numel() == 1010


def test_a_chain_needs_two_tensors_at_a_time() -> None:
    x = torch.ones(1000)
    with LiveBytes({x.untyped_storage()._cdata: x.untyped_storage()}) as live:
        for _ in range(20):
            x = x * 2
    assert live.peak == 8000


def test_peak_memory_is_weights_and_activations_and_repeats(make_llama: Any) -> None:
    model = make_llama()
    peak = peak_bytes(model, 64)
    rotary = sum(b.numel() * 4 for b in {id(b): b for b in model.buffers()}.values())
    cache = 2 * 2 * 64 * 16 * 4
    assert peak > 4 * UNTIED + rotary + cache
    assert peak == peak_bytes(model, 64)
    model.train()
    other = make_llama(intermediate_size=512)
    wider = peak_bytes(other, 64) - 4 * count_parameters(other)
    assert wider - (peak - 4 * UNTIED) >= 2 * 64 * (512 - 64) * 4  # gate and up of the wider feed-forward network
    assert peak == peak_bytes(model, 64)
    assert model.training


def test_the_metrics_of_a_cut_model(make_llama: Any, tiny_tokenizer: Any) -> None:
    dense, small = make_llama(), make_llama(intermediate_size=32)
    table = evaluate_models([dense, small], tiny_tokenizer, ["size"], length=32)
    assert [m.name for m in table] == ["parameters", "non-zero parameters", "bytes", "bytes on disk", "peak memory"]
    assert table["parameters"].values == {"dense": UNTIED, "pruned": UNTIED - 2 * 3 * 32 * 32}
    assert table["bytes"].change("pruned") == pytest.approx(-2 * 3 * 32 * 32 / UNTIED)
    assert table["peak memory"].values["pruned"] < table["peak memory"].values["dense"]
    assert "1 x 32 tokens" in table["peak memory"].protocol


def test_a_given_folder_is_weighed(make_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "model-1.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "model-2.safetensors").write_bytes(b"x" * 11)
    (tmp_path / "config.json").write_bytes(b"x" * 1000)
    models = {"a": make_llama(), "b": make_llama()}
    table = evaluate_models(models, tiny_tokenizer, ["size"], length=32, folders={"b": tmp_path})
    assert table["bytes on disk"].values == {"a": checkpoint_bytes(models["a"]), "b": 111}


def test_size_takes_no_settings() -> None:
    with pytest.raises(UsageError, match="size has no settings, got 'batch=1'"):
        make_task("size:batch=1")
