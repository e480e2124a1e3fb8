"""Oracles of evopress: numbers of sub-layers that never change, and a search small enough to be exhaustive."""

import itertools
from random import Random

import pytest
import torch

import secateur as sc
from families import make_tiny, tiny_ids
from runs import plan_for
from secateur.criteria.divergence import kl_divergence
from secateur.errors import BudgetError
from secateur.methods import get_method
from secateur.methods.layers.evopress import mutated
from sublayers import gone, silenced

IDS = tiny_ids()
KINDS = tuple(tuple(f"layers.{layer}.{kind}" for layer in range(7)) for kind in ("attention", "mlp"))


def test_mutants_keep_the_number_of_attentions_and_of_ffns():
    random, state, seen = Random(0), frozenset({*KINDS[0][:3], *KINDS[1][2:5]}), set()
    for _ in range(200):
        mutant = mutated(state, KINDS, random)
        assert [len(mutant & set(names)) for names in KINDS] == [3, 3]
        # at most three swaps, two names each
        assert len(mutant ^ state) <= 6
        seen.add(len(mutant ^ state))
        state = mutant
    assert {2, 4, 6} <= seen


def test_the_best_of_all_states_is_found():
    model = make_tiny("llama")
    with torch.no_grad():
        dense = model(IDS).logits
        apart = {
            pair: kl_divergence(dense, silenced(model, pair)(IDS).logits)
            for pair in itertools.product(*([f"layers.{i}.{kind}" for i in range(3)] for kind in ("attention", "mlp")))
        }
    plan = plan_for("evopress", model, IDS, layers=1)
    assert gone(plan) == set(min(apart, key=apart.__getitem__))


def test_silent_branches_leave_and_the_logits_stay():
    model = silenced(make_tiny("llama", num_hidden_layers=6), ["layers.1.attention", "layers.4.mlp"])
    plan = plan_for("evopress", model, IDS, layers=1, starts=4, offspring=8, generations=12)
    assert gone(plan) == {"layers.1.attention", "layers.4.mlp"}
    with torch.no_grad():
        torch.testing.assert_close(sc.apply(plan, model)(IDS).logits, model(IDS).logits)


def test_the_seed_decides():
    model = make_tiny("llama", num_hidden_layers=6)
    few = {"layers": 2, "starts": 1, "offspring": 1, "generations": 1}
    plans = [gone(plan_for("evopress", model, IDS, seed=seed, **few)) for seed in (0, 0, 1, 2, 3)]
    assert plans[0] == plans[1] and len({frozenset(p) for p in plans}) > 1
    assert all(sum(name.endswith("mlp") for name in p) == 2 and len(p) == 4 for p in plans)


def test_the_published_number_of_generations():
    assert get_method("evopress")()._generations(8, 32) == 128


def test_one_of_every_kind_must_stay():
    with pytest.raises(BudgetError, match="can't remove 3 of 3 attentions or FFNs"):
        plan_for("evopress", make_tiny("llama"), IDS, layers=3)
