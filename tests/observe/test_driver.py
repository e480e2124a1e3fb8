"""The walk over blocks gives what the whole model gives, for every family."""

from __future__ import annotations

import pytest
import torch

from families import FAMILY_CONFIGS, make_tiny, tiny_ids
from secateur.errors import NonFiniteError, UsageError
from secateur.models.decoders import decoder_blocks, is_linear
from secateur.models.sources import Source
from secateur.observe import Gram, SumSquares
from secateur.observe.driver import BlockWalk
from secateur.observe.precision import bfloat16_speedup, compute_dtype

IDS = tiny_ids(5)


def walk_over(model, dtype=torch.float32, batch_tokens=32):
    source = Source(model)
    return BlockWalk(source, IDS, dtype=dtype, batch_tokens=batch_tokens), source.blocks


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_inputs_of_every_block_equal_those_in_a_whole_forward(family):
    model = make_tiny(family)
    expected = {}
    _, blocks = decoder_blocks(model)
    for i, block in enumerate(blocks):
        # outputs of a linear inside the block stand for everything that happens before it
        name, linear = [(n, m) for n, m in block.named_modules() if is_linear(m)][-1]
        linear.register_forward_pre_hook(lambda m, a, key=(i, name): expected.__setitem__(key, a[0].detach().clone()))
    with torch.no_grad():
        model(IDS, use_cache=False)
    walk, _ = walk_over(make_tiny(family), batch_tokens=32)
    for (i, name), x in sorted(expected.items()):
        block = walk.open(i)
        seen = walk.observe(block, i, [name], {"squares": SumSquares}, advance=True)
        total = x.reshape(-1, x.shape[-1]).double().square().sum(dim=0)
        torch.testing.assert_close(seen[name]["squares"].total_C, total, rtol=1e-4, atol=1e-6)


def test_modules_that_read_one_tensor_share_their_statistics():
    walk, _ = walk_over(make_tiny("llama"))
    names = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    seen = walk.observe(walk.open(0), 0, names, {"gram": Gram}, advance=False)
    assert seen["self_attn.q_proj"]["gram"] is seen["self_attn.k_proj"]["gram"] is seen["self_attn.v_proj"]["gram"]
    assert seen["mlp.gate_proj"]["gram"] is seen["mlp.up_proj"]["gram"]
    assert len({id(s["gram"]) for s in seen.values()}) == 4
    assert all(s["gram"].tokens == IDS.numel() for s in seen.values())


def test_a_forward_that_only_looks_ends_at_the_last_input():
    names = ["self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    run: list[str] = []
    walk, _ = walk_over(make_tiny("llama"))
    whole, seen = (walk.open(0) for _ in range(2))
    for name in names:
        seen.get_submodule(name).register_forward_hook(lambda *_, name=name: run.append(name))
    found = walk.observe(seen, 0, names, {"gram": Gram}, advance=False)
    assert run == names[:2] * len(walk.hidden)
    other, _ = walk_over(make_tiny("llama"))
    for name, statistics in other.observe(whole, 0, names, {"gram": Gram}, advance=True).items():
        assert torch.equal(found[name]["gram"].total_CC, statistics["gram"].total_CC)


def test_an_input_that_overflows_is_named_though_no_output_is_computed():
    walk, _ = walk_over(make_tiny("llama"))
    block = walk.open(0)
    with torch.no_grad():
        block.mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"layer 0 gives NaN or inf to mlp\.down_proj: try --dtype float32"):
        walk.observe(block, 0, ["mlp.up_proj", "mlp.down_proj"], {"squares": SumSquares}, advance=False)


def test_a_model_with_a_nan_activation_names_the_layer():
    model = make_tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    walk, _ = walk_over(model)
    walk.advance(walk.open(0), 0)
    with pytest.raises(NonFiniteError, match="layer 1 gives NaN or inf in calibration batch 0"):
        walk.advance(walk.open(1), 1)


def test_blocks_are_as_before_after_the_walk_begins():
    model = make_tiny("falcon")
    with torch.no_grad():
        before = model(IDS).logits
    walk_over(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)
    assert all("forward" not in block.__dict__ for block in decoder_blocks(model)[1])


def test_bfloat16_forwards_leave_the_model_in_float32():
    model = make_tiny("llama")
    walk, _ = walk_over(model, dtype=torch.bfloat16)
    block = walk.open(0)
    assert next(block.parameters()).dtype == torch.bfloat16
    seen = walk.observe(block, 0, ["mlp.down_proj"], {"gram": Gram}, advance=True)
    assert seen["mlp.down_proj"]["gram"].total_CC.dtype == torch.float32
    assert next(model.parameters()).dtype == torch.float32


def test_auto_takes_the_faster_dtype_and_other_names_are_refused():
    device = torch.device("cpu")
    fast = bfloat16_speedup(device)
    assert fast > 0 and bfloat16_speedup(device) == fast
    assert compute_dtype("auto", device) in (torch.float32, torch.bfloat16)
    assert compute_dtype("float64", device) == torch.float64
    with pytest.raises(UsageError, match="dtype must be auto"):
        compute_dtype("int8", device)
