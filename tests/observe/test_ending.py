"""What a block has lost, asked of the module that adds to it last: through norms and factors."""

import pytest
import torch

from families import make_tiny, tiny_ids
from secateur.models.decoders import typed_blocks
from secateur.models.families import summed
from secateur.models.sources import Source
from secateur.observe.driver import BlockWalk
from secateur.observe.ending import Ending, EndingWatch

DOUBLE = torch.float64
IDS = tiny_ids(2, 8)
# norms of transformers work in float32
STEP = 1e-2
LAYOUTS = {
    "llama": {},
    "granite": {"residual_multiplier": 0.3},
    "gemma2": {},
    "gemma3": {},
    "olmo2": {},
    "opt": {"do_layer_norm_before": False},
    "gpt_neox": {},
    "falcon": {},
}


def ending_of(model, layer=1):
    block = typed_blocks(model)[layer]
    norm, factor = summed(model.config, block.family)
    return block, Ending(block.down.removeprefix(block.name + "."), norm, factor)


@torch.inference_mode()
@pytest.mark.parametrize("family", LAYOUTS)
def test_a_block_gives_what_is_asked_of_its_last_module(family):
    model = make_tiny(family, **LAYOUTS[family]).double()
    block, ending = ending_of(model)
    module = block.module
    walk = BlockWalk(Source(model), IDS, dtype=DOUBLE)
    watch = EndingWatch(module, ending)
    handles = watch.begin()
    before = walk.run(module, 1, 0, walk.hidden[0])
    for handle in handles:
        handle.remove()
    wanted = torch.randn(before.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    if ending.norm:
        # neither the part along what is normed nor, in a LayerNorm, the mean can be had
        norm = module.get_submodule(ending.norm)
        along = norm(watch._normed).reshape(wanted.shape) - (getattr(norm, "bias", None) if family == "opt" else 0)
        gain = norm.weight + (1 if family.startswith("gemma") else 0)
        along, scaled = along / gain, wanted / gain
        if family == "opt":
            scaled = scaled - scaled.mean(dim=-1, keepdim=True)
        share = (along * scaled).sum(dim=-1, keepdim=True) / along.square().sum(dim=-1, keepdim=True)
        wanted = gain * (scaled - share * along)
    asked = watch.asked(wanted) * STEP
    given = []
    for sign in (1, -1):
        more = sign * asked
        handle = module.get_submodule(ending.module).register_forward_hook(
            lambda m, args, out, x=more: out + x.view_as(out)
        )
        given.append(walk.run(module, 1, 0, walk.hidden[0]))
        handle.remove()
    # but for the little that is left out where a gain is small
    torch.testing.assert_close((given[0] - given[1]) / (2 * STEP), wanted, rtol=0.02, atol=0.02)


@torch.inference_mode()
def test_little_is_asked_of_a_channel_that_a_norm_all_but_removes():
    block = torch.nn.Module()
    block.norm = torch.nn.RMSNorm(8)
    with torch.no_grad():
        block.norm.weight[3] = 1e-6
    watch = EndingWatch(block, Ending("down", "norm"))
    (handle,) = watch.begin()
    block.norm(torch.ones(1, 4, 8))
    handle.remove()
    asked = watch.asked(torch.ones(1, 4, 8))
    assert float(asked[..., 3].abs().max()) < 1e-3
    torch.testing.assert_close(asked[..., 4], torch.full((1, 4), 1 / 1.01))


@torch.inference_mode()
def test_a_batch_is_seen_once_and_forgotten():
    block = torch.nn.Module()
    block.norm = torch.nn.LayerNorm(4)
    watch = EndingWatch(block, Ending("down", "norm"))
    (handle,) = watch.begin()
    first, second = torch.randn(2, 1, 3, 4)
    block.norm(first)
    block.norm(second)  # of the dense network
    lost = torch.ones(1, 3, 4)
    once = watch.asked(lost)
    watch.end_of_batch()
    block.norm(second)
    handle.remove()
    assert not torch.allclose(once, watch.asked(lost))
    torch.testing.assert_close(once[..., :1], first.std(dim=-1, keepdim=True, correction=0) / 1.01)
