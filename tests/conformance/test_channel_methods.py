"""What every method that removes coupled channels must do, on networks that it has never seen."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import secateur as sc
from channel_networks import Attention, Residual
from secateur.errors import BudgetError, DataError, NonFiniteError, PlanMismatchError, UsageError
from secateur.methods import ChannelMethod, get_method, list_methods, make_method
from secateur.networks.applying import apply_to_module
from secateur.networks.deciding import network_report
from secateur.networks.example import Example
from secateur.networks.kinds import Asked
from secateur.networks.modules import ModuleNetwork
from secateur.plans import Plan

METHODS = [m for m in list_methods() if issubclass(get_method(m), ChannelMethod)]
NETWORKS = {"residual": (Residual, (3, 12, 12), 10), "attention": (Attention, (7, 6), 5)}
BUDGETS = ("params", "macs", "bytes", "channels")


def made(network: str):
    cls, shape, classes = NETWORKS[network]
    module = cls().eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, *shape, generator=generator)
    return module, x, [(x, torch.arange(4) % classes), (x + 1, torch.arange(4) % classes)]


@cache
def opened(network: str, heads: str) -> ModuleNetwork:
    """Traced once for all tests: none of them changes the module, or the plan of a fresh one would be another."""
    module, x, _ = made(network)
    return ModuleNetwork.open(module, Example((x,)), heads=heads, ignore=())


def planned(method: str, network: str = "residual", sparsity: float = 0.4, **options) -> tuple[ModuleNetwork, Plan]:
    """As ``sc.plan`` on the network that is traced already."""
    chosen = make_method(method, {"sparsity": sparsity, **options})
    found = opened(network, chosen.heads)
    return found, found.plan(chosen, Asked(made(network)[2] if chosen.needs else None))


@cache
def usual(method: str, network: str = "residual") -> tuple[ModuleNetwork, Plan]:
    """The plan that several tests look at."""
    return planned(method, network)


def runs_on(method: str, network: str) -> bool:
    return method not in ("slimming", "hrank") or network == "residual"


CASES = [(m, n) for m in METHODS for n in NETWORKS if runs_on(m, n)]


def starts_anew(method: str) -> bool:
    return get_method(method).descriptor.recovery == "fresh_weights"


@pytest.mark.parametrize(("method", "network"), CASES)
def test_masked_module_equals_cut_module(method, network):
    found, plan = usual(method, network)
    module, x, _ = made(network)
    cut, notes = found.cut(plan, inplace=False)
    masked = apply_to_module(plan, module, anatomy=found.anatomy, example=found.example, mask=True).module
    with torch.no_grad():
        # one that draws its layers anew must not have kept the old weights
        assert torch.allclose(cut(x), masked(x), rtol=1e-4, atol=1e-5) != starts_anew(method)
        assert not torch.allclose(cut(x), module(x), rtol=1e-3, atol=1e-4)
    assert type(cut) is type(module) and not notes


@pytest.mark.parametrize("method", METHODS)
def test_sparsity_zero_is_the_identity(method):
    found, plan = planned(method, sparsity=0.0)
    module, x, _ = made("residual")
    assert plan.is_identity
    with torch.no_grad():
        assert torch.equal(found.cut(plan, inplace=False)[0](x), module(x))


@pytest.mark.parametrize("method", METHODS)
def test_same_arguments_give_the_same_bytes_and_leave_the_module_alone(method, tmp_path):
    module, x, data = made("residual")
    before = {n: t.clone() for n, t in module.state_dict().items()}
    data = data if get_method(method).needs else None
    result = sc.prune(module, example_inputs=(x,), method=method, sparsity=0.4, data=data)
    result.plan.save(tmp_path / "a")
    usual(method)[1].save(tmp_path / "b")
    for file in ("plan.json", "plan.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    loaded = Plan.load(tmp_path / "b")
    assert loaded.provenance == result.plan.provenance and not result.plan.diff(loaded)
    assert torch.equal(sc.apply(loaded, module)(x), result.model(x)) and not result.report.notes
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("method", [m for m in METHODS if get_method(m).needs])
def test_frozen_parameters_are_scored_like_others(method):
    module, x, data = made("residual")
    for parameter in [*module.parameters()][::2]:
        parameter.requires_grad_(False)
    before = [p.requires_grad for p in module.parameters()]
    chosen = make_method(method, {"sparsity": 0.4})
    plan = ModuleNetwork.open(module, Example((x,)), heads=chosen.heads, ignore=()).plan(chosen, Asked(data))
    assert not plan.diff(usual(method)[1])
    assert all(torch.equal(s, usual(method)[1].scores[name]) for name, s in plan.scores.items())
    assert [p.requires_grad for p in module.parameters()] == before
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("scope", ["global", "uniform"])
def test_the_budget_is_met_within_one_unit(budget, scope):
    found, plan = planned("spa_l1", budget=budget, scope=scope)
    report = network_report(plan, found.anatomy)
    assert report.achieved == pytest.approx(0.4, abs=0.03)
    parameters = sum(p.numel() for p in found.cut(plan, inplace=False)[0].parameters())
    counted = {m.name: m.values["pruned"] for m in report.metrics}
    assert counted["parameters"] == parameters and counted["bytes of weights"] == 4 * parameters


def test_a_uniform_cut_takes_the_same_share_of_every_group():
    _, plan = planned("spa_l1", budget="channels", sparsity=0.5, scope="uniform")
    assert {len(k) / plan.groups[n] for n, k in plan.keep.items()} == {0.5}


@pytest.mark.parametrize("method", METHODS)
def test_a_larger_sparsity_removes_all_that_a_smaller_one_does(method):
    small, large = planned(method, sparsity=0.2)[1], usual(method)[1]
    assert all(set(large.keep[n].tolist()) <= set(small.keep[n].tolist()) for n in small.keep)


@pytest.mark.parametrize("method", METHODS)
def test_rounding_and_minimum_are_respected(method):
    _, plan = planned(method, sparsity=0.3, round_to=4, min_keep=8)
    assert all(len(kept) >= 8 and len(kept) % 4 == 0 for kept in plan.keep.values())


def test_heads_leave_whole_or_lane_by_lane():
    module, x, _ = made("attention")
    outer = sc.anatomy(module, example_inputs=(x,))
    inner = sc.anatomy(module, example_inputs=(x,), heads="inner")
    assert {(g.units, g.slices[0].index.shape[1]) for g in outer.of_kind("channel") if g.name.startswith("qkv")} == {
        (4, 24)
    }
    assert {(g.units, g.slices[0].index.shape[1]) for g in inner.of_kind("channel") if g.name.startswith("qkv")} == {
        (8, 12)
    }
    cut = sc.prune(module, example_inputs=(x,), method="spa_l1", sparsity=0.5, budget="channels")
    assert cut.model.num_heads == cut.model.qkv.out_features // 24 < 4


def test_ignored_modules_stay():
    module, x, _ = made("residual")
    result = sc.prune(module, example_inputs=(x,), method="spa_l1", sparsity=0.03, ignore=("conv1", "stem.*"))
    assert result.model.conv1.weight.shape == module.conv1.weight.shape
    assert torch.equal(sc.apply(result.plan, module)(x), result.model(x))


def test_in_place_changes_the_callers_module():
    module, x, _ = made("residual")
    expected = sc.prune(module, example_inputs=(x,), method="spa_l1", sparsity=0.4).model(x)
    result = sc.prune(module, example_inputs=(x,), method="spa_l1", sparsity=0.4, inplace=True)
    assert result.model is module and module.conv1.out_channels < 24
    assert torch.equal(module(x), expected)


def test_a_cut_module_trains_and_is_cut_again():
    module, x, data = made("residual")
    once = sc.prune(module, example_inputs=(x,), method="spa_l1", sparsity=0.3).model.train()
    optimizer = torch.optim.SGD(once.parameters(), lr=0.1)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(once(x), data[0][1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    twice = sc.prune(once, example_inputs=(x,), method="spa_l1", sparsity=0.3).model
    assert sum(p.numel() for p in twice.parameters()) < sum(p.numel() for p in once.parameters())
    assert once.training


# -- bad input ---------------------------------------------------------------------------------------------------------


def refused(error, match, **arguments):
    module, x, _ = made("residual")
    before = {n: t.clone() for n, t in module.state_dict().items()}
    given = {"example_inputs": (x,), "method": "spa_l1", "sparsity": 0.3, **arguments}
    with pytest.raises(error, match=match) as caught:
        sc.prune(module, **given)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


def test_user_mistakes_are_one_sentence():
    refused(UsageError, "example_inputs must be a tuple", example_inputs=torch.zeros(1, 3, 12, 12))
    refused(UsageError, "doesn't run on the example inputs", example_inputs=(torch.zeros(1, 4, 12, 12),))
    refused(UsageError, "matches no parameter", ignore=("nothing",))
    refused(UsageError, "doesn't remove channels", method="wanda")
    refused(BudgetError, "at most", sparsity=0.99, options={"min_keep": 6})
    refused(DataError, "needs data", method="taylor")
    refused(DataError, "empty", method="taylor", data=[])
    refused(DataError, "pairs", method="taylor", data=[torch.zeros(4, 3, 12, 12)])
    refused(DataError, "scalar", method="taylor", data=[1], loss=lambda module, batch: torch.zeros(3))
    images = torch.zeros(4, 3, 12, 12)
    refused(DataError, "batch 1 .* can't be taken", method="taylor", data=[(images, torch.arange(4)), (images[0], 1)])
    refused(DataError, "batch 0 .* out of bounds", method="taylor", data=[(images, torch.tensor([0, 1, 2, 99]))])
    refused(DataError, "no gradient", method="taylor", data=[images], loss=lambda module, x: module(x).mean().detach())
    nan = [(torch.full((2, 3, 12, 12), float("nan")), torch.tensor([0, 1]))]
    refused(NonFiniteError, "NaN", method="spa_snip", data=nan)


def test_a_channel_method_on_a_decoder_says_what_to_do(cli):
    run = cli("prune", "smollm2-135m", "--method", "spa_l1", "--dry-run")
    assert run.code == 2 and "example_inputs" in run.err and len(run.err.strip().splitlines()) == 1


def test_a_plan_for_another_module_is_refused():
    module, x, _ = made("residual")
    plan = sc.plan(module, example_inputs=(x,), method="spa_l1", sparsity=0.3)
    with pytest.raises(PlanMismatchError, match="other shapes"):
        sc.apply(plan, Residual(width=8))


# -- what one reads ----------------------------------------------------------------------------------------------------


def test_anatomy_and_plan_print_groups_by_name(cli, tmp_path):
    module, x, _ = made("residual")
    shown = str(sc.anatomy(module, example_inputs=(x,)))
    assert "stem.0" in shown and "conv1.weight[0]" in shown and "output of the network" in shown
    plan = sc.plan(module, example_inputs=(x,), method="spa_l1", sparsity=0.4)
    run = cli("plan", "show", plan.save(tmp_path / "plan"))
    kept = len(plan.keep["stem.0"])
    assert run.code == 0 and "stem.0" in run.out and f"{kept}" in run.out
