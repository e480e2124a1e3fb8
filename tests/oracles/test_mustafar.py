"""Mustafar: how many elements stay, the bitmap, and decoding beside an emulation token by token."""

from __future__ import annotations

import pytest
import torch

import secateur as sc
from cache_reference import as_dense
from families import make_tiny, tiny_ids
from secateur.cache.attention import Visible, mixed_attention
from secateur.cache.rows import DenseRows, Span
from secateur.cache.store import Store
from secateur.cache.tiles import BitmapRows
from secateur.methods import make_method


@pytest.mark.parametrize(
    ("sparsity", "paper", "exact"), [(0.5, 65, 64), (0.7, 40, 38), (0.9, 14, 13), (0.001, 128, 128)]
)
def test_elements_that_stay_of_128(sparsity, paper, exact):
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    for rounding, count in (("paper", paper), ("exact", exact)):
        mask = make_method("mustafar", {"sparsity": sparsity, "rounding": rounding}).element_mask(x, "keys")
        assert mask.sum(dim=-1).tolist() == [count] * 3
        assert all(bool((row[m].abs().min() > row[~m].abs()).all()) for row, m in zip(x, mask, strict=True))


def test_equals_of_the_threshold_stay_with_the_papers_rounding():
    x = torch.tensor([[1.0, 1.0, 1.0, 2.0]])
    assert make_method("mustafar").element_mask(x, "keys").tolist() == [[True] * 4]
    exact = make_method("mustafar", {"rounding": "exact"}).element_mask(x, "keys")
    assert exact.tolist() == [[True, False, False, True]]


def test_values_along_channels_compare_32_tokens():
    x = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0))
    mask = make_method("mustafar", {"direction": "channel", "sparsity": 0.5}).element_mask(x, "values")
    assert mask.unflatten(1, (2, 32)).sum(dim=2).unique().tolist() == [17]
    assert torch.equal(mask[:, :32], make_method("mustafar").element_mask(x[:, :32].mT, "keys").mT)


def test_attention_as_a_factor_of_a_token_doesnt_change_which_of_its_elements_stay():
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    method = make_method("mustafar")
    assert torch.equal(method.element_mask(x, "values"), method.element_mask(x * torch.rand(5, 1).add(0.1), "values"))


# -- the bitmap --------------------------------------------------------------------------------------------------------


SIDES = ("token", "channel")


def relu(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).relu()


def rows_of(bitmap):
    """All rows of all segments, one after the other."""
    return bitmap.dense(Span(0, bitmap.count, 0, (1, 1)))[0, 0]


@pytest.mark.parametrize("by", SIDES)
@pytest.mark.parametrize("width", [8, 13, 64, 96])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_bit_by_bit(width, sparsity, dtype, by):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(130, width, generator=generator).to(dtype)
    x[torch.rand(130, width, generator=generator) < sparsity] = 0
    rows = BitmapRows.encode(x, torch.tensor([2, 64, 64]), by)
    assert torch.equal(rows_of(rows), x) and rows.values.numel() == int((x != 0).sum())
    assert torch.equal(rows.dense(Span(2, 130, 1, (1, 2))).flatten(0, 2), x[2:])
    words = 2 * -(-width // 2) if by == "token" else 32 * -(-width // 32)
    assert rows.bits.shape == (3, words) and rows.bits.dtype == torch.int64 and rows.counts.tolist() == [2, 64, 64]


def test_a_tile_is_what_is_multiplied_together():
    x = torch.zeros(64, 64)
    x[0, 0], x[0, 1], x[3, 0], x[33, 5] = 1.0, 2.0, 3.0, 4.0
    # token 33 is lane 1 of the second half, channel 5 the second step of pair 2
    keys = BitmapRows.encode(x, torch.tensor([64]), "token")
    assert keys.values.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert {int(at): int(keys.bits[0, at]) for at in keys.bits[0].nonzero()} == {0: 0b1000011, 34: 0b1000}
    # tokens 0 and 1 are a pair, and so are 2 and 3, 32 and 33
    values = BitmapRows.encode(x, torch.tensor([64]), "channel")
    assert values.values.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert {int(at): int(values.bits[0, at]) for at in values.bits[0].nonzero()} == {0: 0b101, 1: 0b10, 16: 1 << 11}


@pytest.mark.parametrize("by", SIDES)
def test_what_is_added_later_is_as_if_it_had_been_there(by):
    x = relu(2, 192, 16)
    whole = BitmapRows.encode(x.flatten(0, 1), torch.tensor([192, 192]), by)
    first = BitmapRows.encode(x[:, :128].flatten(0, 1), torch.tensor([128, 128]), by)
    joined = first.joined(x[:, 128:], torch.tensor([128, 128]))
    assert torch.equal(joined.bits, whole.bits) and torch.equal(rows_of(joined), rows_of(whole))
    assert joined.values.numel() == whole.values.numel()


@pytest.mark.parametrize("by", SIDES)
def test_segments_change_places_and_rows_are_chosen(by):
    lengths = torch.tensor([70, 0, 5])
    parts = relu(75, 16).split(lengths.tolist())
    rows = BitmapRows.encode(torch.cat(parts), lengths, by)
    more = relu(3, 65, 16)
    grown = [torch.cat(pair) for pair in zip(parts, more, strict=True)]
    joined, lengths = rows.joined(more, lengths), lengths + 65
    assert joined.counts.tolist() == [64, 6, 64, 1, 64, 1, 5, 64, 1] and torch.equal(rows_of(joined), torch.cat(grown))
    moved = joined.batch(torch.tensor([2, 0, 2]), lengths)
    assert torch.equal(rows_of(moved), torch.cat([grown[2], grown[0], grown[2]]))
    # the elements of the segment that left are gone, those of the one that is there twice are held once
    assert moved.values.numel() == int((torch.cat([grown[0], grown[2]]) != 0).sum())
    order = torch.tensor([7, 0, 134])
    assert torch.equal(rows_of(joined.select(order, torch.tensor([1, 2]))), torch.cat(grown)[order])


def test_rows_of_segments_stay_together_when_rows_are_added():
    x, more = relu(2, 3, 4, 8), relu(2, 3, 2, 8)
    lengths = torch.full((2, 3), 4)
    store = Store(lengths, BitmapRows.encode(x.flatten(0, 2), lengths, "token"), DenseRows(x.flatten(0, 2)))
    joined = store.joined(more, more, None)
    (span, _, _), *_ = joined.spans()
    expected = torch.cat([x, more], dim=2)
    assert torch.equal(joined.keys.dense(span), expected) and torch.equal(joined.values.dense(span), expected)


def test_every_segment_gets_rows_of_its_own_number():
    """Keys and values under bitmaps beside dense ones, of which a mask says what is added."""
    lengths = torch.tensor([[70, 0], [5, 64]])
    x, more = relu(139, 8), relu(2, 2, 70, 8)
    keep = (
        torch.rand(2, 2, 70, generator=torch.Generator().manual_seed(1))
        < torch.tensor([[0.9, 0.5], [0.0, 1.0]])[..., None]
    )
    parts = zip(x.split(lengths.flatten().tolist()), more.flatten(0, 1), keep.flatten(0, 1), strict=True)
    expected = torch.cat([torch.cat([held, new[stays]]) for held, new, stays in parts])
    at = torch.arange(70, 140).expand(2, 2, 70)
    positions = torch.cat([torch.arange(n) for n in lengths.flatten().tolist()]).to(torch.int32)
    for keys in (BitmapRows.encode(x, lengths, "token"), DenseRows(x)):
        store = Store(lengths, keys, BitmapRows.encode(x, lengths, "channel"), positions)
        joined = store.joined(more, more, at, keep)
        assert torch.equal(joined.lengths, lengths + keep.sum(dim=-1))
        for side in (joined.keys, joined.values):
            assert torch.equal(rows_of(side), expected)
            side.check(joined.lengths, x)
        ends = joined.lengths.flatten().cumsum(0).tolist()
        for segment, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            own, stays = int(lengths.flatten()[segment]), keep.flatten(0, 1)[segment]
            there = torch.cat([torch.arange(own), torch.arange(70, 140)[stays]])
            assert torch.equal(joined.positions[start:end].long(), there)
        rows, blocks = joined.layout
        assert torch.equal(rows[blocks], torch.tensor([0, *ends]))


def test_attention_over_the_bitmap_is_that_on_zeros_and_query_heads_may_change_places():
    x = torch.randn(2, 1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    x[x.abs() < 0.7] = 0
    lengths = torch.full((1, 2), 9)
    encoded = (BitmapRows.encode(side.flatten(0, 2), lengths, by) for side, by in zip(x, SIDES, strict=True))
    store = Store(lengths, *encoded)
    tail = (torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8))
    query, positions = torch.randn(1, 4, 1, 8), torch.arange(9, 11).expand(1, 2, 2)
    out = mixed_attention(query, store, tail, positions, Visible(None, 1, 11), 0.3)
    sides = [torch.cat(pair, dim=2).repeat_interleave(2, dim=1) for pair in zip(x, tail, strict=True)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *sides, scale=0.3)
    assert torch.allclose(out, expected.transpose(1, 2), atol=1e-6)
    swapped = mixed_attention(query[:, [1, 0, 3, 2]], store, tail, positions, Visible(None, 1, 11), 0.3)
    assert torch.allclose(swapped, out[:, :, [1, 0, 3, 2]], atol=1e-6)


# -- the window --------------------------------------------------------------------------------------------------------


def lengths(cache):
    """Rows in the store and in the tail of the first layer."""
    layer = cache.layers[0]
    return (layer.store.rows if layer.store else 0), layer.keys.shape[2]


def test_blocks_leave_the_window_as_the_paper_triggers_them():
    model = make_tiny("llama", num_hidden_layers=1, max_position_embeddings=1024)
    ids = tiny_ids(windows=1, length=545)
    cache = sc.compressed_cache("mustafar:0.5", model)
    with torch.no_grad():
        model(ids[:, :300], cache=cache)
        assert lengths(cache) == (256, 44)
        for token in range(300, 545):
            model(ids[:, token : token + 1], cache=cache)
            expected = (512, token + 1 - 512) if token + 1 >= 544 else (256, token + 1 - 256)
            assert lengths(cache) == expected


@pytest.mark.parametrize(
    "spec", ["mustafar:0.5,window=4,block=1", "mustafar:k=0.7,v=0,window=4,block=8,rounding=exact"]
)
def test_decoding_is_the_emulation_token_by_token(spec):
    """After every step the cache is the dense one with what has left the window pruned, and nothing else."""
    model = make_tiny("llama", num_hidden_layers=1, max_position_embeddings=128)
    ids = tiny_ids(windows=2, length=90)
    cache = sc.compressed_cache(spec, model)
    dense = sc.compressed_cache("knorm:0", model)
    method = cache.methods[0]
    with torch.no_grad():
        ends = [20, *range(21, 31), 84, *range(85, 91)]
        for start, stop in zip([0, *ends], ends, strict=False):
            model(ids[:, start:stop], cache=cache)
            model(ids[:, start:stop], cache=dense)
            pruned = (stop - 4) // method.block * method.block
            keys, values, there = as_dense(cache.layers[0])
            for side, mine, whole in (("keys", keys, dense.layers[0].keys), ("values", values, dense.layers[0].values)):
                expected = whole.clone()
                if method.side_sparsity(side):
                    gone = ~method.element_mask(whole[:, :, :pruned], side)
                    expected[:, :, :pruned].masked_fill_(gone, 0)
                assert torch.equal(mine, expected)
            assert bool(there.all())
            assert cache.layers[0].cut == [pruned, pruned]
            # all that is ready at the end of the prompt, and then 64 rows at a time
            assert lengths(cache) == ((80, stop - 80) if stop >= 84 else (16, stop - 16))
