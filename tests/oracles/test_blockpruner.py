"""Oracles of blockpruner: brute force with zeroed matrices, and text that the dense model itself has written."""

import math

import pytest
import torch

import secateur as sc
from families import make_tiny, tiny_ids
from runs import plan_for, tokens_of
from secateur.engine import decide
from secateur.errors import BudgetError
from secateur.methods import make_method
from secateur.models.sources import Source
from sublayers import HOW, gone, silenced

IDS = tiny_ids()
NAMES = [f"layers.{layer}.{kind}" for layer in range(3) for kind in ("attention", "mlp")]


def perplexity(model, ids=IDS):
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double()
    return math.exp(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())))


@pytest.mark.parametrize("parts", ["mix", "attention", "mlp"])
def test_every_step_takes_what_brute_force_takes(parts):
    model, taken = make_tiny("llama"), []
    pool = [n for n in NAMES if parts == "mix" or n.endswith(parts)]
    for count in range(1, min(len(pool), 4)):
        left = {n: perplexity(silenced(model, [*taken, n])) for n in pool if n not in taken}
        taken.append(min(left, key=left.__getitem__))
        plan = plan_for("blockpruner", model, IDS, sublayers=count, parts=parts)
        # prefixes are nested: a larger cut begins with the smaller one
        assert gone(plan) == set(taken)


def test_the_note_gives_the_order_and_the_perplexity_of_the_cut_model():
    model = make_tiny("llama")
    found = decide(make_method("blockpruner", {"sublayers": 2}), Source(model), tokens_of(IDS), **HOW).whole
    (note,) = found.notes
    plan = plan_for("blockpruner", model, IDS, sublayers=2)
    cut = perplexity(sc.apply(plan, model))
    assert note.endswith(f"({cut:.4g})") and all(name in note for name in gone(plan))


def test_a_silent_branch_leaves_first_and_the_logits_stay():
    model = silenced(make_tiny("llama"), ["layers.1.attention", "layers.2.mlp"])
    # on text that the model itself has written no other model is better, but for chance
    torch.manual_seed(0)
    ids = model.generate(IDS[:4, :1], do_sample=True, min_new_tokens=47, max_new_tokens=47, top_k=0)
    plan = plan_for("blockpruner", model, ids, sublayers=2)
    assert gone(plan) == {"layers.1.attention", "layers.2.mlp"}
    with torch.no_grad():
        torch.testing.assert_close(sc.apply(plan, model)(IDS).logits, model(IDS).logits)


def test_a_sparsity_is_met_as_closely_as_a_step_allows():
    model = make_tiny("llama")
    anatomy = sc.anatomy(model)
    sizes = {g.name: g.units * g.cost.macs / anatomy.blocks.macs for g in anatomy if g.reader}
    assert sum(sizes.values()) == pytest.approx(1)
    for sparsity in (0.1, 0.2, 0.35, 0.5, 0.6):
        left = abs(sum(sizes[n] for n in gone(plan_for("blockpruner", model, IDS, sparsity=sparsity))) - sparsity)
        assert left <= max(sizes.values()) / 2


def test_perplexity_is_measured_on_so_many_tokens():
    model = make_tiny("llama")
    few = plan_for("blockpruner", model, IDS, sublayers=1, tokens=32)
    again = plan_for("blockpruner", model, IDS[:2], sublayers=1)
    assert gone(few) == gone(again)
    left = {n: perplexity(silenced(model, [n]), IDS[:2]) for n in NAMES}
    assert gone(few) == {min(left, key=left.__getitem__)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sublayers": 6}, "can't remove 6 sub-layers: parts=mix leaves 6 sub-layers to choose from"),
        ({"sublayers": 3, "parts": "mlp"}, "can't remove 3 sub-layers: parts=mlp leaves 3"),
        ({"sparsity": 0.9, "parts": "attention"}, "can't remove 90.0% of the parameters: parts=attention leaves 3"),
    ],
)
def test_what_can_not_be_removed(options, message):
    with pytest.raises(BudgetError, match=message):
        plan_for("blockpruner", make_tiny("llama"), IDS, **options)
