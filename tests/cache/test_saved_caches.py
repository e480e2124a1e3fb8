"""Caches on disk: what is loaded goes on as what was saved, and what doesn't belong here says so in one sentence."""

from __future__ import annotations

import copy
import json
import struct

import pytest
import torch

import secateur as sc
from cache_reference import as_dense, generate
from families import make_tiny, tiny_ids
from secateur.errors import CorruptFileError, OutputError, PlanMismatchError, SecateurError, UsageError

IDS = tiny_ids(windows=2, length=20)
MASK = torch.ones_like(IDS)
MASK[1, :5] = 0
BITMAPS = "adakv(knorm:0.5)+mustafar:0.5,window=4,block=4"
SPECS = [
    "knorm:0.5",
    "knorm:0",
    "adakv(knorm:0.5)",
    "knorm:0.5+think:0.5,recent=4",
    "mustafar:0.5,window=4,block=4",
    BITMAPS,
    "h2o:budget=9",
    "key_rerotation(streaming_llm:budget=9)",
    "decoding(expected_attention):budget=9,every=2,queries=8",
]


@pytest.fixture(scope="module")
def model():
    return make_tiny("llama")


def behind(model, spec, mask=MASK):
    cache = sc.compressed_cache(spec, model)
    with torch.no_grad():
        model(IDS, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), cache=cache)
    return cache


def is_same(loaded, cache):
    assert loaded.report() == cache.report() and loaded.methods == cache.methods
    for mine, theirs in zip(loaded.layers, cache.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(as_dense(mine), as_dense(theirs), strict=True))
        assert mine.tensors().keys() == theirs.tensors().keys()
        assert all(torch.equal(tensor, theirs.tensors()[name]) for name, tensor in mine.tensors().items())
        assert (mine.cut, mine.packed, mine.settled) == (theirs.cut, theirs.packed, theirs.settled)


@pytest.mark.parametrize("spec", SPECS)
def test_a_loaded_cache_goes_on_bit_for_bit(model, tmp_path, spec):
    cache = behind(model, spec)
    cache.save(tmp_path / "cache.safetensors")
    loaded = sc.load_cache(tmp_path / "cache.safetensors", model, spec)
    is_same(loaded, cache)
    mask = MASK
    for t in range(8):  # past windows, blocks and budgets
        mask = torch.cat([mask, mask[:, :1].clone().fill_(1)], dim=1)
        step = {"attention_mask": mask, "position_ids": mask.cumsum(-1)[:, -1:] - 1}
        with torch.no_grad():
            mine, theirs = (model(IDS[:, t : t + 1], cache=c, **step).logits for c in (loaded, cache))
        assert torch.equal(mine, theirs)
    copy.deepcopy(loaded).batch_select_indices(torch.tensor([1]))


@pytest.mark.parametrize(
    "spec", ["adakv(knorm:0.5)+mustafar:0.5,window=8,block=4", "adakv(knorm:0.5)+think:0.5,recent=8"]
)
def test_sequences_with_fewer_dense_rows_come_back(model, tmp_path, spec):
    mask = MASK.clone()
    mask[1, :14] = 0
    cache = behind(model, spec, mask)
    counts = [(layer.tail_positions() >= 0).sum(dim=-1) for layer in cache.layers]
    assert all(layer.blank for layer in cache.layers) and all(len(set(n[:, 0].tolist())) == 2 for n in counts)
    for entry in cache.report()["layers"]:
        assert [sum(heads) for heads in entry["tokens_kept"]] == [20, 6]
    cache.save(tmp_path / "cache.safetensors")
    is_same(sc.load_cache(tmp_path / "cache.safetensors", model, spec), cache)
    twice = copy.deepcopy(cache)
    twice.batch_select_indices(torch.tensor([0]))
    assert all((layer.tail_positions() >= 0).all() and not layer.blank for layer in twice.layers)


@pytest.mark.parametrize("spec", ["mustafar:k=0.5,v=0,window=4,block=4", BITMAPS])
def test_tiles_that_were_added_while_decoding_come_back(tmp_path, spec):
    """Blocks lie in another order than their elements, and what is added goes on from there."""
    model = make_tiny("llama", max_position_embeddings=512)
    ids = tiny_ids(windows=2, length=300)
    cache = sc.compressed_cache(spec, model)
    with torch.no_grad():
        for piece in ids[:, :210].split(70, dim=1):
            model(piece, cache=cache)
        # sequence 1 twice: elements are held once
        cache.batch_select_indices(torch.tensor([1, 0, 1]))
        cache.save(tmp_path / "cache.safetensors")
        loaded = sc.load_cache(tmp_path / "cache.safetensors", model, spec)
        is_same(loaded, cache)
        keys = loaded.layers[0].store.keys
        assert keys.bits.shape[0] > len(keys.starts.unique()) and bool((keys.starts.diff() < 0).any())
        assert loaded.layers[0].packed >= 128
        for piece in ids[[1, 0, 1], 210:].split(30, dim=1):
            assert torch.equal(*(model(piece, cache=c).logits for c in (loaded, cache)))
        is_same(loaded, cache)
        for one in (loaded, cache):
            one.crop(-20)
        is_same(loaded, cache)


def test_sliding_windows_and_half_precision_come_back(tmp_path):
    model = make_tiny("gemma2", layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    model = model.to(torch.bfloat16)
    model.set_attn_implementation("eager")
    ids = tiny_ids(windows=1, length=20)
    cache = sc.compressed_cache("adakv(knorm:0.5)", model)
    with torch.no_grad():
        model(ids, cache=cache)
        cache.save(tmp_path / "cache.safetensors")
        loaded = sc.load_cache(tmp_path / "cache.safetensors", model)
        for t in range(3):
            assert torch.equal(*(model(ids[:, t : t + 1], cache=c).logits for c in (loaded, cache)))


def test_a_prefix_is_read_in_one_process_and_used_in_another(model, tmp_path):
    longer = torch.cat([IDS[:1], tiny_ids(windows=1, length=4, seed=5)], dim=1)
    cache = sc.compressed_cache("knorm:0.5", model)
    with torch.no_grad():
        model(IDS[:1], cache=cache)
    cache.save(tmp_path / "prefix.safetensors")
    expected = generate(model, longer, cache=cache)
    for _ in range(2):
        found = generate(model, longer, cache=sc.load_cache(tmp_path / "prefix.safetensors", model))
        assert torch.equal(found.logits, expected.logits)


def test_what_doesnt_belong_here_is_refused(model, tmp_path):
    path = tmp_path / "cache.safetensors"
    behind(model, "knorm:0.5").save(path)
    other, wider = make_tiny("llama", seed=3), make_tiny("llama", vocab_size=128)
    cases = [
        (other, None, PlanMismatchError, "other weights"),
        (make_tiny("qwen3"), None, PlanMismatchError, "whose shapes aren't those of"),
        (wider, None, PlanMismatchError, "whose shapes aren't those of"),
        (model, "knorm:0.4", UsageError, r"made by 'knorm:sparsity=0.5', and 'knorm:sparsity=0.4' was asked for"),
        (model, "keydiff:0.5", UsageError, "was asked for"),
    ]
    for of, spec, error, words in cases:
        with pytest.raises(error, match=words) as caught:
            sc.load_cache(path, of, spec)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="empty"):
        sc.compressed_cache("knorm:0.5", model).save(tmp_path / "none.safetensors")
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists"):
        behind(model, "knorm:0.25").save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    behind(model, "knorm:0.25").save(path, overwrite=True)
    assert sc.load_cache(path, model).methods[0].sparsity == 0.25


def edited(path, change):
    """The file with another header."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    outer = json.loads(raw[8 : 8 + length])
    inner = json.loads(outer["__metadata__"]["secateur_cache"])
    change(inner, outer)
    if "secateur_cache" in outer["__metadata__"]:
        outer["__metadata__"]["secateur_cache"] = json.dumps(inner)
    head = json.dumps(outer).encode()
    head += b" " * (-len(head) % 8)
    path.with_name("edited.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + raw[8 + length :])
    return path.with_name("edited.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda inner, outer: outer["__metadata__"].pop("secateur_cache"),
        lambda inner, outer: inner.update(version=99),
        lambda inner, outer: inner.pop("version"),
        lambda inner, outer: inner.pop("model"),
        lambda inner, outer: inner.pop("methods"),
        lambda inner, outer: inner["methods"][0].pop("options"),
        lambda inner, outer: inner["methods"][0].update(name="no_such_method"),
        lambda inner, outer: inner["layers"].pop(),
        lambda inner, outer: inner["layers"][1].pop("seen"),
        lambda inner, outer: inner["layers"][1].update(kind="sliding"),
        lambda inner, outer: inner["layers"][0]["store"]["lengths"][0].__setitem__(0, 99),
        lambda inner, outer: inner["layers"][0]["store"]["keys"].update(kind="OtherRows"),
        lambda inner, outer: outer.update({"layers.9.keys": outer.pop("layers.0.keys")}),
    ],
)
def test_a_damaged_file_says_so(model, tmp_path, change):
    path = tmp_path / "cache.safetensors"
    behind(model, "adakv(knorm:0.5)").save(path)
    with pytest.raises(SecateurError) as caught:
        sc.load_cache(edited(path, change), model)
    assert "\n" not in str(caught.value)


def damaged(spec, model, path, name, index, value):
    """A cache of which one number was changed, saved."""
    cache = behind(model, spec)
    *way, last = name.split(".")
    held = cache.layers[0]
    for part in way:
        held = getattr(held, part)
    getattr(held, last)[index] = value
    cache.save(path)
    return path


@pytest.mark.parametrize(
    ("spec", "name", "value", "words"),
    [
        (BITMAPS, "store.keys.starts", 10**9, "more elements than there are"),
        (BITMAPS, "store.values.starts", -1, "more elements than there are"),
        (BITMAPS, "store.keys.bits", -1, "more elements than there are"),
        (BITMAPS, "store.values.counts", 65, "more than 64 rows"),
        (BITMAPS, "store.keys.counts", 1, "its blocks aren't those of its heads"),
        (BITMAPS, "store.positions", 99, "positions aren't all within 20 tokens"),
        ("adakv(knorm:0.5)", "store.positions", -1, "positions aren't all within 20 tokens"),
        ("knorm:0.5", "kept", 20, "positions aren't all within 20 tokens"),
        ("think:0.5,recent=4", "store.keys.channels", 8, "channels aren't among those of a head"),
    ],
)
def test_numbers_that_point_outside_are_refused(model, tmp_path, spec, name, value, words):
    """A kernel follows them without looking."""
    path = damaged(spec, model, tmp_path / "cache.safetensors", name, -1, value)
    with pytest.raises(CorruptFileError, match=words) as caught:
        sc.load_cache(path, model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("side", "change"),
    [
        ("keys", {"by": "channel"}),
        ("keys", {"by": "row"}),
        ("values", {"width": 9}),
        ("values", {"kind": "DenseRows"}),
    ],
)
def test_tiles_of_another_kind_are_refused(model, tmp_path, side, change):
    path = tmp_path / "cache.safetensors"
    behind(model, BITMAPS).save(path)
    with pytest.raises(CorruptFileError):
        sc.load_cache(edited(path, lambda inner, outer: inner["layers"][0]["store"][side].update(change)), model)


def test_a_file_that_is_cut_short_or_something_else(model, tmp_path):
    path = tmp_path / "cache.safetensors"
    behind(model, "knorm:0.5").save(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CorruptFileError, match="cut short"):
        sc.load_cache(path, model)
    with pytest.raises(CorruptFileError, match="can't read"):
        sc.load_cache(tmp_path / "missing.safetensors", model)
