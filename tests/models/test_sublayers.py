"""Decoders without some of their attentions and MLPs: in memory, on disk, elsewhere, and cut again."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import secateur as sc
from families import FAMILY_CONFIGS, make_tiny, tiny_ids
from runs import plan_for, tokens_of
from secateur.criteria.divergence import kl_divergence, text_loss
from secateur.engine import decide
from secateur.engine.keeping import Keeper
from secateur.engine.run import Run
from secateur.engine.trials import SublayerTrials
from secateur.errors import BudgetError, NonFiniteError, PlanMismatchError, UnsupportedModelError, UsageError
from secateur.models.decoders import decoder_anatomy, typed_blocks
from secateur.models.latency import measure_decoder
from secateur.models.saving import plain
from secateur.models.sources import Source
from secateur.ranks import ALONE
from secateur.timing import Workload
from sublayers import HOW, Chosen, plan_without

IDS = tiny_ids()
# the attention of the first block, where transformers looks for the number of cached tokens; an MLP; a whole block
SOME = ("layers.0.attention", "layers.1.mlp", "layers.2.attention", "layers.2.mlp")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_masked_cut_saved_and_loaded_elsewhere(family, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_tiny(family)
    plan = plan_without(model, SOME)
    assert plan.removed("layers").tolist() == [2]
    cut = sc.apply(plan, model)
    expected = logits(cut)
    torch.testing.assert_close(logits(sc.apply(plan, model, mask=True)), expected, rtol=1e-4, atol=1e-4)
    first, second = typed_blocks(cut)
    assert (first.has_attention, first.has_mlp, second.has_attention, second.has_mlp) == (False, True, True, False)
    assert not plain(cut)
    prompt = IDS[:2, :6]
    written = cut.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    with torch.no_grad():
        steps = cut(written).logits[:, 5:-1]
    steps[..., 2] = float("-inf")
    assert torch.equal(written[:, 6:], steps.argmax(-1))
    folder = sc.save(cut, None, tmp_path / "cut", plan=plan)
    torch.testing.assert_close(logits(sc.load(folder)[0]), expected, rtol=1e-5, atol=1e-5)
    stock = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    torch.testing.assert_close(logits(stock), expected, rtol=1e-5, atol=1e-5)
    again = stock.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(again, written)


def test_what_leaves_is_what_the_sub_layers_weigh():
    model = make_tiny("llama-tied-bias")
    cut = sc.apply(plan_without(model, SOME), model)
    names = dict(cut.named_parameters())
    assert not any(name.startswith(("model.layers.0.self_attn", "model.layers.1.mlp")) for name in names)
    anatomy = sc.anatomy(model)
    sizes = {g.name: g.units * g.cost.macs for g in anatomy if g.reader}
    assert anatomy.blocks.macs - sc.anatomy(cut).blocks.macs == sum(sizes[name] for name in SOME)


def test_a_block_that_must_stay_keeps_its_norms():
    """Where attention is scaled by the number of its block, blocks can't move up: both parts leave by themselves."""
    model = make_tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    plan = plan_without(model, SOME)
    assert "layers" not in plan.keep and len(plan.keep) == 4
    cut = sc.apply(plan, model)
    assert cut.config.num_hidden_layers == 3
    torch.testing.assert_close(logits(sc.apply(plan, model, mask=True)), logits(cut), rtol=1e-4, atol=1e-4)


def test_a_model_without_sub_layers_is_cut_again():
    model = make_tiny("llama", num_hidden_layers=4)
    once = sc.apply(plan_without(model, ("layers.0.attention", "layers.2.mlp")), model)
    groups = {g.name for g in sc.anatomy(once) if g.reader}
    assert "layers.0.attention" not in groups and "layers.0.mlp" in groups and len(groups) == 6
    for method, options in (
        ("flap", {"sparsity": 0.3}),
        ("wanda", {"sparsity": 0.5}),
        ("shortgpt", {"layers": 1}),
        ("blockpruner", {"sublayers": 1}),
    ):
        plan = plan_for(method, once, IDS, **options)
        twice, masked = sc.apply(plan, once), sc.apply(plan, once, mask=True)
        torch.testing.assert_close(logits(twice), logits(masked), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["random_sp", "wanda_sp"])
def test_blocks_of_unequal_size_lose_the_same_share_of_their_own(method):
    model = make_tiny("llama")
    once = sc.apply(plan_without(model, ("layers.0.mlp", "layers.1.attention")), model)
    anatomy = sc.anatomy(once)
    plan = plan_for(method, once, IDS, sparsity=0.5)
    for layer in range(3):
        groups = [g for g in anatomy if g.layer == layer]
        own = sum(g.units * g.cost.params for g in groups)
        lost = sum(len(plan.removed(g.name)) * g.cost.params for g in groups)
        assert abs(lost - 0.5 * own) <= min(g.cost.params for g in groups) / 2


def test_blocks_that_have_lost_both_parts_are_passed_over():
    model = make_tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    once = sc.apply(plan_without(model, SOME), model)
    for method in ("wanda_sp", "flap", "wanda"):
        plan = plan_for(method, once, IDS, sparsity=0.3)
        assert torch.isfinite(logits(sc.apply(plan, once))).all()


def test_a_plan_for_groups_that_have_left_is_refused():
    model = make_tiny("llama")
    cut = sc.apply(plan_without(model, SOME[:2]), model)
    plan = plan_without(model, SOME[:1])
    with pytest.raises(PlanMismatchError):
        sc.apply(plan, cut)


def test_alibi_heads_leave_together_or_not_at_all():
    model = make_tiny("falcon-alibi")
    plan = plan_without(model, ("layers.1.attention",))
    assert decoder_anatomy(model)["layers.1.attention"].frozen
    torch.testing.assert_close(
        logits(sc.apply(plan, model)), logits(sc.apply(plan, model, mask=True)), rtol=1e-4, atol=1e-4
    )


def test_the_latency_of_unequal_blocks_is_not_guessed():
    model = make_tiny("llama")
    cut = sc.apply(plan_without(model, SOME[:1]), model)
    with pytest.raises(UnsupportedModelError, match="attentions or MLPs were removed"):
        measure_decoder(Source(cut), sc.anatomy(cut), Workload.parse("batch=1,prompt=4,new=0"), None)


def test_several_ranks_are_refused():
    ranks: Any = SimpleNamespace(size=2)
    with pytest.raises(UsageError, match="start it without torchrun"):
        decide(Chosen(names=SOME[0]), Source(make_tiny("llama")), tokens_of(IDS), ranks=ranks, **HOW)


def test_what_leaves_nothing_is_refused():
    model = make_tiny("llama")
    with pytest.raises(BudgetError, match="at least one must stay"):
        plan_without(model, [g.name for g in sc.anatomy(model) if g.reader])


def test_trials_agree_with_masked_models_however_many_go_through_at_a_time():
    model = make_tiny("llama")
    method = Chosen()
    more: Any = {"keeper": Keeper(), "hidden": None, "statistics": None, "ranks": ALONE, **HOW}
    run = Run(method, Source(model), tokens_of(IDS), **more)
    candidates = [frozenset(), frozenset(SOME[:1]), frozenset(SOME[:2]), frozenset(SOME)]
    plans = [plan_without(model, names) for names in candidates]
    masked = [logits(sc.apply(plan, model, mask=True)) for plan in plans]
    for hidden_bytes in (2**30, 1):
        trials = SublayerTrials(run, hidden_bytes)
        texts = trials.losses(candidates, fitness="perplexity")
        apart = trials.losses(candidates, fitness="divergence")
        for i, theirs in enumerate(masked):
            assert texts[i] == pytest.approx(float(torch.tensor(text_loss(theirs, IDS)).exp()), rel=1e-4)
            assert apart[i] == pytest.approx(kl_divergence(logits(model), theirs), rel=1e-3, abs=1e-6)
    # windows are drawn by the seed, and cut where one alone has more tokens
    drawn = {tuple(trials.losses(candidates[:1], fitness="perplexity", tokens=16, seed=seed)) for seed in range(20)}
    assert 2 <= len(drawn) <= len(IDS)
    short = trials.losses(candidates[:1], fitness="perplexity", tokens=5)[0]
    assert short == pytest.approx(float(torch.tensor(text_loss(logits(model)[:1, :5], IDS[:1, :5])).exp()), rel=1e-4)


def test_a_model_that_gives_nan_is_the_worst_of_all_and_a_dense_one_is_refused():
    model = make_tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(math.inf)
    more: Any = {"keeper": Keeper(), "hidden": None, "statistics": None, "ranks": ALONE, **HOW}
    trials = SublayerTrials(Run(Chosen(), Source(model), tokens_of(IDS), **more), 2**30)
    broken, mended = frozenset({"layers.0.mlp"}), frozenset({"layers.1.mlp"})
    found = trials.losses([broken, mended], fitness="perplexity")
    assert found[0] == math.inf and math.isfinite(found[1])
    with pytest.raises(NonFiniteError, match="layer 1 gives NaN or inf"):
        trials.losses([mended], fitness="divergence")
