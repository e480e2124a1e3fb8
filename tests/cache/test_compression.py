"""Kernels that compress beside plain torch: the same elements stay, in the same places, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import secateur as sc
from cache_reference import generate
from families import make_tiny, tiny_ids
from secateur.cache import kernels
from secateur.cache.kernels import compression
from secateur.cache.tiles import BitmapRows
from secateur.errors import UsageError
from secateur.methods.elements import Largest

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 2, 13, 64, 96, 256)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Few different sizes, so that many are equal, of both signs, with zeros of both signs among them."""
    drawn = torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(0))
    x = (drawn / 3).to(dtype)
    x[drawn == 4] = -0.0
    return x


def same(found: Tensor, expected: Tensor) -> bool:
    """Also the signs of zeros, and what kind of NaN it is."""
    bits = {4: torch.int32, 2: torch.int16}[found.element_size()]
    return torch.equal(found.contiguous().view(bits), expected.contiguous().view(bits))


def pruned(x: Tensor, rule: Largest) -> Tensor:
    found = x.clone(memory_format=torch.preserve_format)
    assert compression.keep_largest(found, rule)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_largest_are_those_of_torch(width, dtype):
    generator = torch.Generator().manual_seed(1)
    smooth = torch.randn(2, 3, 40, width, generator=generator).to(dtype)
    for x in (smooth, smooth * 1e-6, numbers(2, 3, 40, width, dtype=dtype)):
        for count in sorted({1, width // 3 or 1, width // 2 or 1, width}):
            for ties in (True, False):
                rule = Largest(count, ties)
                mask = rule.mask(x)
                assert same(pruned(x, rule), x.masked_fill(~mask, 0))
                assert ties or bool((mask.sum(dim=-1) == count).all())
    assert not pruned(smooth, Largest(0, ties=False)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_is_as_torch_has_it(dtype):
    x = numbers(6, 16, dtype=dtype)
    x[0, 3], x[1, 2:9], x[2], x[3, 5], x[4, :3] = torch.nan, torch.nan, torch.nan, torch.inf, -torch.inf
    x[5, 4], x[5, 9] = torch.nan, -torch.nan
    for count in (1, 2, 8, 15, 16):
        for ties in (True, False):
            rule = Largest(count, ties)
            assert same(pruned(x, rule), x.masked_fill(~rule.mask(x), 0))


def test_parts_of_larger_tensors_are_changed_in_place():
    whole = numbers(2, 3, 50, 12)
    views = (whole[:, :, 7:40], whole[1:, 1], whole[0, :, ::2], whole.transpose(1, 2)[..., 3:9], whole[0, 0].mT)
    for view in views:
        rule, before = Largest(4, ties=True), whole.clone()
        expected = view.masked_fill(~rule.mask(view), 0)
        assert compression.keep_largest(view, rule) and torch.equal(view, expected)
        outside = torch.ones_like(whole, dtype=torch.bool)
        outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
        assert torch.equal(whole[outside], before[outside])
        whole.copy_(before)
    for nothing in (whole[:, :, :0], whole[:0]):
        assert compression.keep_largest(nothing, rule)


@pytest.mark.parametrize("by", ["token", "channel"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_tiles_are_those_of_torch(width, dtype, by, monkeypatch):
    lengths = torch.tensor([[70, 0, 1], [64, 128, 5]])
    whole = numbers(int(lengths.sum()), 2 * width, dtype=dtype)
    whole[3, 0], whole[4], whole[140:200] = torch.nan, 0, 0
    for dense in (whole[:, :width].contiguous(), whole[:, width:], whole[:0, :width]):
        counts = lengths if len(dense) else torch.zeros_like(lengths)
        monkeypatch.setenv(kernels.SWITCH, "auto")
        found = BitmapRows.encode(dense, counts, by)
        monkeypatch.setenv(kernels.SWITCH, "torch")
        expected = BitmapRows.encode(dense, counts, by)
        assert same(found.values, expected.values) and torch.equal(found.counts, expected.counts)
        assert torch.equal(found.bits, expected.bits) and torch.equal(found.starts, expected.starts)
        found.check(counts, dense)


def test_threads_share_the_work():
    x, rule, before = numbers(1, 2, 700, 64), Largest(20, ties=False), torch.get_num_threads()
    alone = pruned(x, rule)
    tiles = BitmapRows.encode(alone.flatten(0, 2), torch.tensor([1400]), "token")
    try:
        torch.set_num_threads(3)
        assert torch.equal(pruned(x, rule), alone)
        more = BitmapRows.encode(alone.flatten(0, 2), torch.tensor([1400]), "token")
        assert torch.equal(more.values, tiles.values) and torch.equal(more.bits, tiles.bits)
    finally:
        torch.set_num_threads(before)


def test_what_no_kernel_takes_stays_for_torch(monkeypatch):
    x, rule = numbers(2, 8), Largest(4, ties=True)
    assert not compression.keep_largest(x.double(), rule)
    assert not compression.keep_largest(numbers(2, 320), rule)
    assert not compression.keep_largest(x[None, None, None], rule)
    assert BitmapRows.encode(x.double(), torch.tensor([2]), "token").values.dtype == torch.float64
    monkeypatch.setenv(kernels.SWITCH, "torch")
    assert not compression.keep_largest(x, rule)
    monkeypatch.setenv(kernels.SWITCH, "fast")
    with pytest.raises(UsageError, match="SECATEUR_KERNELS must be auto or torch"):
        compression.keep_largest(x, rule)


@pytest.mark.parametrize("options", ["", ",rounding=exact", ",direction=channel,block=32"])
@pytest.mark.parametrize("spec", ["mustafar:k=0.7,v=0.5", "adakv(knorm:0.5)+mustafar:0.5"])
def test_a_cache_is_the_same_by_kernels_and_by_torch(spec, options, monkeypatch):
    model, ids, mask = make_tiny("llama"), tiny_ids(windows=2, length=48), torch.ones(2, 48, dtype=torch.long)
    mask[1, :5] = 0
    spec += f",window=4{options}" if "block" in options else f",window=4,block=4{options}"
    real, called, held = compression._library, [], []
    monkeypatch.setattr(compression, "_library", lambda: called.append(way) or real())
    for way in ("auto", "torch"):
        monkeypatch.setenv(kernels.SWITCH, way)
        cache = sc.compressed_cache(spec, model)
        with torch.no_grad():
            model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), cache=cache)
        held.append([layer.tensors() for layer in cache.layers])
        assert all("store.keys.bits" in layer for layer in held[-1])
    assert set(called) == {"auto"}  # by torch no kernel was looked for
    for first, second in zip(*held, strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_text_goes_on_the_same_behind_both(monkeypatch):
    model, ids = make_tiny("llama"), tiny_ids(length=30)
    found = []
    for way in ("auto", "torch"):
        monkeypatch.setenv(kernels.SWITCH, way)
        cache = sc.compressed_cache("mustafar:0.5,window=4,block=4", model)
        found.append(generate(model, ids, torch.ones_like(ids), cache=cache))
    assert torch.equal(found[0].tokens, found[1].tokens)
