"""KVzip against the attention of one dense pass over prompt and repetition, and its budgets by hand."""

from __future__ import annotations

import pytest
import torch

import secateur as sc
from cache_prompts import Words
from cache_reference import as_dense, generate, reference_logits
from families import make_tiny, tiny_ids
from secateur.cache.rereading import reread_scores
from secateur.errors import OptionError, UsageError
from secateur.methods.cachespec import parse_cache_spec
from secateur.methods.rereading import FIRST, LATER, answer_begins, passages

IDS = tiny_ids(windows=2, length=20)
MASK = torch.ones_like(IDS)
MASK[1, :5] = 0
SINKS = 2


@pytest.fixture(scope="module")
def model():
    return make_tiny("llama")


def read(model, spec, ids, mask=None):
    cache = sc.compressed_cache(spec, model, tokenizer=Words())
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), cache=cache)
    return cache


def slow_scores(model, text, chunk, plus):
    """[layers, K, S] from dense passes over the prompt and what is read behind it, all attention weights at once."""
    tokens = len(text)
    inputs: dict[int, torch.Tensor] = {}
    handles = [
        block.self_attn.register_forward_pre_hook(
            lambda m, a, k: inputs.__setitem__(m.layer_idx, k["hidden_states"][0]), with_kwargs=True
        )
        for block in model.model.layers
    ]
    model.set_attn_implementation("eager")
    scores = torch.zeros(model.config.num_hidden_layers, 2, tokens)
    for passage in passages(text, Words(), first=SINKS, chunk=chunk):
        with torch.no_grad():
            out = model(torch.cat([text, passage.ids])[None], output_attentions=True, use_cache=False)
        seen = [*range(SINKS), *range(passage.start, passage.stop), *range(tokens, tokens + len(passage.ids))]
        for layer, weights in enumerate(out.attentions):
            part = weights[0, :, tokens:, seen]
            part = part / part.sum(dim=-1, keepdim=True)  # the softmax over these keys alone
            part = part[..., SINKS : SINKS + passage.stop - passage.start]
            if plus:
                module, h = model.model.layers[layer].self_attn, inputs[layer]
                for head in range(4):
                    value = module.v_proj(h).view(len(h), 2, 8)[passage.start : passage.stop, head // 2]
                    norm = (value @ module.o_proj.weight[:, 8 * head : 8 * head + 8].T).norm(dim=-1)
                    part[head] = part[head] * norm / h[tokens:].norm(dim=-1)[:, None]
            scores[layer, :, passage.start : passage.stop] = part.view(2, 2, *part.shape[1:]).amax(dim=(1, 2))
    for handle in handles:
        handle.remove()
    model.set_attn_implementation("sdpa")
    return scores.detach()


@pytest.mark.parametrize("chunk", [64, 7])
@pytest.mark.parametrize("plus", [False, True])
def test_scores_are_those_of_a_dense_pass_over_prompt_and_repetition(model, chunk, plus):
    cache = sc.compressed_cache("knorm:0", model)
    with torch.no_grad():
        model(IDS[:1], cache=cache)
    cache.tokenizer, text = Words(), IDS[0]
    method = parse_cache_spec(f"kvzip:0.5,chunk={chunk},sinks={SINKS},plus={plus}")[0]
    before = [layer.keys.clone() for layer in cache.layers]
    found = torch.stack(reread_scores(cache, model.model, method, (0, 0), text))
    assert torch.allclose(found, slow_scores(model, text, chunk, plus), atol=1e-5)
    assert (found[..., SINKS:] > 0).all() and (found[..., :SINKS] == 0).all()
    # what was read isn't kept
    assert cache.get_seq_length() == 20 and all(
        torch.equal(a, layer.keys) for a, layer in zip(before, cache.layers, strict=True)
    )


def test_requests_are_those_of_the_official_code():
    words, text = Words(), torch.arange(20)
    found = passages(text, words, first=2, chunk=7)
    assert [(p.start, p.stop) for p in found] == [(2, 9), (9, 16), (16, 20)]

    def ids(text):
        return words.encode(text, add_special_tokens=False)

    assert FIRST == "\n\nRepeat the previous context exactly."
    assert found[0].ids.tolist() == [*ids(FIRST), *ids("\n"), *range(2, 9)]
    assert found[1].ids.tolist() == [*ids(LATER), *range(2, 9), *ids("\n"), *range(9, 16)]
    assert found[2].ids.tolist() == [*ids(LATER), *range(8, 16), *ids("\n"), *range(16, 20)]
    words.chat_template = "some"
    assert answer_begins(words) == ids("</user><model>")


def test_a_budget_over_layers_and_heads_by_hand():
    scores = [torch.tensor([[0.9, 0.1, 0.4], [0.2, 0.8, 0.05]]), torch.tensor([[0.3, 0.3, 0.6], [0.7, 0.02, 0.5]])]

    def kept(options):
        keep = parse_cache_spec(f"kvzip:0.5,sinks=0{options}")[0].keep_of_all([s.clone() for s in scores])
        return [row.nonzero()[:, 0].tolist() for layer in keep for row in layer]

    assert kept("") == [[0, 2], [1], [2], [0, 2]]
    assert kept(",share=layer") == [[0, 2], [1], [2], [0, 2]]
    assert kept(",share=head") == [[0], [1], [2], [0]]
    assert kept(",level=head") == [[0, 1, 2], [0, 1, 2], [], []]
    first = parse_cache_spec("kvzip:0.5,sinks=1,level=head")[0].keep_of_all([s.clone() for s in scores])
    # behind the sink, the best are .4 and .8, .6 and .5
    assert [layer.all(dim=-1).tolist() for layer in first] == [[False, True], [True, False]]
    assert all(layer.sum() == 4 and layer[:, 0].all() for layer in first)


@pytest.mark.parametrize("options", ["", ",share=head", ",level=head", ",plus=true", "+think:0.5,recent=2"])
def test_what_follows_sees_what_stays(model, options):
    spec = f"kvzip:0.5,sinks=2{options}"
    cache = read(model, spec, IDS, MASK)
    assert not cache.pending and cache.layers[0].pending is None
    found = generate(model, IDS, MASK, new=4, cache=sc.compressed_cache(spec, model, tokenizer=Words()))
    expected = reference_logits(model, cache, found.tokens[:, :3], MASK)
    assert torch.allclose(found.logits[:, 1:], expected, atol=1e-4)
    for b, padding in enumerate((0, 5)):
        alone = generate(
            model, IDS[b : b + 1, padding:], new=4, cache=sc.compressed_cache(spec, model, tokenizer=Words())
        )
        assert torch.allclose(alone.logits[0], found.logits[b], atol=1e-4)
    if "think" not in options and "level" not in options:
        assert sum(int(as_dense(layer)[2][0].sum()) for layer in cache.layers) == 3 * 2 * 10


def test_sliding_windows_come_back_as_they_were():
    model = make_tiny("gemma2", layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    model.set_attn_implementation("eager")
    ids = tiny_ids(windows=1, length=20)
    cache = read(model, "kvzip:0.5,sinks=2", ids)
    plain = read(model, "knorm:0.5", ids)
    for n in (0, 2):
        assert torch.equal(cache.layers[n].keys, plain.layers[n].keys)
        assert cache.layers[n].cumulative_length == plain.layers[n].cumulative_length == 20
    assert sum(sum(h) for h in cache.report()["layers"][1]["tokens_kept"]) == 20
    with torch.no_grad():
        assert model(ids[:, :1], cache=cache).logits.isfinite().all()


def test_within_the_context(model):
    with sc.compress_cache(model, "kvzip:0.5,sinks=2", tokenizer=Words()) as compressing:
        found = generate(model, IDS[:1], new=3)
    expected = generate(model, IDS[:1], new=3, cache=sc.compressed_cache("kvzip:0.5,sinks=2", model, tokenizer=Words()))
    assert torch.equal(found.logits, expected.logits) and compressing.report()["tokens"] == 22


def test_what_cant_be(model):
    with pytest.raises(UsageError, match="needs the tokenizer"):
        sc.compressed_cache("kvzip:0.5", model)
    with pytest.raises(UsageError, match="needs the tokenizer"), sc.compress_cache(model, "kvzip:0.5"):
        pass
    sc.compressed_cache("kvzip:0", model)  # nothing is read again
    with pytest.raises(OptionError, match="decides on all of them together"):
        sc.compressed_cache("adakv(kvzip:0.5)", model)
    cache = sc.compressed_cache("kvzip:0.5", model, tokenizer=Words())
    with pytest.raises(UsageError, match="got inputs_embeds"), torch.no_grad():
        model(inputs_embeds=torch.zeros(1, 9, 32), cache=cache)
    with pytest.warns(
        UserWarning, match="reads up to position 68 to repeat the prompt, and this model was made for 64"
    ):
        read(model, "kvzip:0.5", tiny_ids(windows=1, length=33))
    learned = make_tiny("gpt2")
    with pytest.raises(UsageError, match="take a shorter prompt, or shorter passages"):
        read(learned, "kvzip:0.5", tiny_ids(windows=1, length=33))
    with pytest.warns(UserWarning, match="leaves a prompt of 4 tokens as it is"):
        assert read(model, "kvzip:0.5", IDS[:1, :4]).get_seq_length() == 4
