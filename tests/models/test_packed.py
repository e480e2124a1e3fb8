"""The packed format: bit-for-bit round trips, the stated sizes, and the worked example of its page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hand_cut import tiny
from secateur.errors import ModelLoadError
from secateur.models.loading import load_model
from secateur.models.packed import pack, unpack
from secateur.models.saving import save_model

PAGE = Path(__file__).parents[2] / "docs" / "packed-format.md"
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def size(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


@settings(max_examples=60, deadline=None)
@given(DTYPES, st.integers(1, 9), st.integers(1, 19), st.floats(0, 1), st.integers(0, 99))
def test_round_trip_is_exact(dtype: torch.dtype, rows: int, columns: int, sparsity: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    weight[0, 0] = -0.0
    weight[-1, -1] = float("nan")
    state = {"a.weight": weight.to(dtype), "a.bias": torch.zeros(rows, dtype=dtype)}
    back = unpack(*pack(state))
    assert set(back) == set(state)
    for name, tensor in state.items():
        assert back[name].dtype == dtype and back[name].shape == tensor.shape
        assert torch.equal(bits(back[name]), bits(tensor)), name


def half(rows: int, columns: int) -> torch.Tensor:
    weight = torch.randn(rows, columns)
    weight.view(-1)[torch.randperm(weight.numel())[: weight.numel() // 2]] = 0
    return weight


def two_of_four(rows: int, columns: int) -> torch.Tensor:
    weight = torch.randn(rows, columns)
    smallest = weight.view(-1, 4).abs().topk(2, largest=False).indices
    weight.view(-1, 4).scatter_(1, smallest, 0)
    return weight


@pytest.mark.parametrize("prune", [half, two_of_four])
def test_half_of_the_weights_in_bfloat16_take_9_of_16_bits(prune) -> None:
    state = {"a.weight": prune(64, 128).to(torch.bfloat16)}
    packed, shapes = pack(state)
    assert shapes == {"a.weight": [64, 128]}
    assert size(packed) == 64 * 128 // 8 + 64 * 128 // 2 * 2
    assert size(packed) / size(state) == 9 / 16


def test_only_what_gets_smaller_is_packed() -> None:
    state = {
        "dense": torch.ones(16, 16),
        "vector": torch.zeros(64),
        "integers": torch.zeros(16, 16, dtype=torch.int64),
        # 1 of 32 zeros saves just what the bitmap costs in float32
        "break_even": torch.cat([torch.zeros(1, 8), torch.ones(31, 8)]),
        "sparse": torch.cat([torch.zeros(2, 8), torch.ones(30, 8)]),
    }
    packed, shapes = pack(state)
    assert set(shapes) == {"sparse"}
    assert packed["dense"] is state["dense"]
    assert set(state) == {"dense", "vector", "integers", "break_even", "sparse"}  # the input is left alone


def test_malformed_packed_weights_are_named() -> None:
    packed, shapes = pack({"w": half(8, 8)})
    with pytest.raises(ModelLoadError, match=r"^w\.values is missing from the packed weights$"):
        unpack({"w.bitmap": packed["w.bitmap"]}, shapes)
    with pytest.raises(ModelLoadError, match=r"^w has 31 values for 32 ones in its bitmap$"):
        unpack({**packed, "w.values": packed["w.values"][1:]}, shapes)
    with pytest.raises(ModelLoadError, match=r"^the bitmap of w must hold 9 bytes, got \[8\]$"):
        unpack(packed, {"w": [9, 8]})


def test_shards_and_loading(tmp_path: Path) -> None:
    model = tiny("llama").to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.copy_(two_of_four(*parameter.shape))
    save_model(model, None, tmp_path / "out", format="packed", max_shard_size="20KB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    stored = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    matrices = {n: p for n, p in model.named_parameters() if "proj" in n}
    packed = {n: t for n, t in stored.items() if n.endswith((".bitmap", ".values"))}
    assert size(packed) <= 0.57 * size(matrices)
    loaded, _ = load_model(tmp_path / "out", dtype="auto")
    for name, tensor in model.state_dict().items():
        assert torch.equal(bits(tensor), bits(loaded.state_dict()[name])), name


def test_worked_example_of_the_page() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf8"), re.S)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(block, names)
