"""Ratios of single groups beside the budget of the whole network."""

import pytest
import torch

import secateur as sc
from channel_networks import Residual
from secateur.errors import BudgetError, UsageError

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def pruned(**options):
    return sc.prune(Residual().eval(), example_inputs=(X,), method="spa_l1", **options)


def share(plan, group):
    return 1 - len(plan.keep[group]) / plan.groups[group]


def test_groups_lose_what_is_said_and_the_others_the_rest():
    result = pruned(sparsity=0.4, budget="params", ratios={"conv1": 0.25, "point": 0.75})
    assert share(result.plan, "conv1") == 0.25 and share(result.plan, "point") == 0.75
    # a channel of the stream is 5 % of this network
    assert result.report.achieved == pytest.approx(0.4, abs=0.05)
    without = pruned(sparsity=0.4, budget="params")
    assert share(without.plan, "conv1") != 0.25
    # those that stay are the best of their group
    scores = result.plan.scores["conv1"]
    assert set(result.plan.keep["conv1"].tolist()) == set(scores.topk(18).indices.tolist())


def test_ratios_alone():
    plan = pruned(sparsity=0.0, ratios={"conv*": 0.5}).plan
    assert share(plan, "conv1") == 0.5
    assert all(share(plan, name) == 0 for name in plan.groups if name != "conv1")


def test_the_first_pattern_counts_and_the_plan_remembers(tmp_path):
    result = pruned(sparsity=0.0, ratios={"conv1": 0.25, "*": 0.5})
    assert share(result.plan, "conv1") == 0.25 and share(result.plan, "stem.0") == 0.5
    assert result.plan.provenance[0].options["ratios"] == {"conv1": 0.25, "*": 0.5}
    result.plan.save(tmp_path / "plan")
    again = sc.apply(sc.Plan.load(tmp_path / "plan"), Residual().eval())
    assert torch.equal(again(X), result.model(X))


def test_multiples_and_minimum_hold():
    plan = pruned(sparsity=0.0, ratios={"*": 0.9}, options={"round_to": 4, "min_keep": 4}).plan
    assert all(len(kept) % 4 == 0 and len(kept) >= 4 for kept in plan.keep.values())


def test_in_steps_they_hold_for_all_together():
    plan = pruned(sparsity=0.0, ratios={"conv1": 0.75}, steps=2).plan
    assert share(plan, "conv1") == 0.75 and plan.provenance[0].options["ratios"] == {"conv1": 0.75}


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"ratios": {"conv1": 1.0}}, UsageError, r"ratio of conv1 must lie in \[0, 1\), got 1.0"),
        ({"ratios": {"conv7": 0.5}}, UsageError, "did you mean 'conv1'"),
        ({"ratios": {"*": 0.1}, "sparsity": 0.5}, BudgetError, "can't remove 50.0%"),
    ],
)
def test_ratios_that_cannot_be(options, error, said):
    with pytest.raises(error, match=said):
        pruned(**{"sparsity": 0.3, **options})
