"""PreConfig: widths that shrink and grow under two budgets, and networks that are wider than the one they came from."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import secateur as sc
from channel_networks import Attention, Residual
from secateur.allocate import synexp
from secateur.errors import OptionError, PlanError
from secateur.methods import make_method
from secateur.networks.applying import apply_to_module, module_anatomy
from secateur.networks.example import Example
from secateur.plans import Plan


class Chain(nn.Module):
    """A wide and a narrow convolution, flattened into a linear layer; widths are what it is made with."""

    def __init__(self, first=16, second=4):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, first, 3, padding=1), nn.BatchNorm2d(first)
        self.conv2, self.norm2 = nn.Conv2d(first, second, 3, stride=4, padding=1), nn.BatchNorm2d(second)
        self.head = nn.Linear(second * 4, 10)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        return self.head(self.norm2(self.conv2(x)).relu().flatten(1))


class Inverted(nn.Module):
    """An inverted bottleneck with a depthwise convolution, on a residual stream."""

    def __init__(self):
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 64, 1)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.norm, self.project, self.head = nn.BatchNorm2d(64), nn.Conv2d(64, 16, 1), nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(self.norm(self.depthwise(self.expand(x).relu())).relu())
        return self.head(x.mean(dim=(2, 3)))


class Grouped(nn.Module):
    """Grouped and transposed convolutions, a group norm, halves of channels, a padding of channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.norm, self.up = nn.GroupNorm(4, 32), nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.last, self.head = nn.Conv2d(12, 20, 3), nn.Linear(24, 10)

    def forward(self, x):
        a, b = self.norm(self.grouped(self.stem(x).relu())).chunk(2, dim=1)
        x = self.last(self.up(a * b.sigmoid())).mean(dim=(2, 3))
        return self.head(nn.functional.pad(x, (2, 2)))


class Recurrent(nn.Module):
    """An LSTM, whose gates are four times its width."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(6, 12), nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.rnn(self.embed(x))[0][:, -1])


NETWORKS = {
    "chain": (Chain, (3, 8, 8)),
    "residual": (Residual, (3, 12, 12)),
    "attention": (Attention, (7, 6)),
    "inverted": (Inverted, (3, 8, 8)),
    "grouped": (Grouped, (3, 8, 8)),
    "recurrent": (Recurrent, (7, 6)),
}


def made(network):
    cls, shape = NETWORKS[network]
    torch.manual_seed(0)
    return cls(), torch.randn(2, *shape)


def configured(module, x, **options):
    arguments = {name: options.pop(name) for name in ("sparsity", "seed", "inplace") if name in options}
    return sc.prune(module, example_inputs=(x,), method="preconfig", options=options, **arguments)


def test_without_a_cap_every_layer_has_the_same_number_of_weights():
    densities = synexp([100, 400], [100, 400], max_weights=250, cap=None)
    assert densities == pytest.approx([1.25, 0.3125]) and [100, 400] @ densities == pytest.approx(250)


def test_a_network_that_grows_is_the_class_made_with_these_widths():
    module, x = made("chain")
    result = configured(module, x, sparsity=0.1, keep_macs=1.0, max_expansion=3.0)
    widths = len(result.plan.keep["conv1"]), len(result.plan.keep["conv2"])
    assert widths[0] < 16 and widths[1] > 4
    expected = Chain(*widths)
    expected.load_state_dict(result.model.state_dict())
    assert torch.equal(expected.eval()(x), result.model.eval()(x))
    assert (result.model.conv1.out_channels, result.model.conv2.in_channels) == (widths[0], widths[0])


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("crop_residual", [False, True])
def test_every_kind_of_layer_grows(network, crop_residual):
    """Groups that may grow do so by a half, all at once, whatever the budget: the module's own code follows."""
    module, x = made(network)
    anatomy = module_anatomy(module, Example((x,)))
    plan = sc.plan(
        module, example_inputs=(x,), method="preconfig", sparsity=0.3, options={"crop_residual": crop_residual}
    )
    wider = {name: torch.arange(math.ceil(1.5 * units)) % units for name, units in plan.groups.items()}
    plan = dataclasses.replace(plan, keep={name: kept.sort().values for name, kept in wider.items()})
    grown = apply_to_module(plan, module, anatomy=anatomy)
    assert grown.graph_because is None and type(grown.module) is type(module)
    parameters = sum(p.numel() for p in grown.module.parameters())
    assert parameters == anatomy.costs.without((), anatomy.units_grown(plan.keep)).params
    assert parameters > 1.2 * sum(p.numel() for p in module.parameters())
    loss = grown.module(x).square().sum()
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in grown.module.parameters())


@pytest.mark.parametrize("network", ["chain", "residual", "attention", "inverted"])
@pytest.mark.parametrize(("sparsity", "keep_macs"), [(0.2, 1.0), (0.2, 0.5), (0.5, 1.0)])
def test_both_budgets_hold_to_one_unit(network, sparsity, keep_macs):
    module, x = made(network)
    dense = module_anatomy(module, Example((x,))).total
    result = configured(module, x, sparsity=sparsity, keep_macs=keep_macs)
    found = module_anatomy(result.model, Example((x,)))
    dearest = {f: max(getattr(g.cost, f) for g in found if not g.frozen) for f in ("params", "macs")}
    over = {
        "params": found.total.params - (1 - sparsity) * dense.params,
        "macs": found.total.macs - keep_macs * dense.macs,
    }
    assert all(over[f] <= dearest[f] for f in over)
    widest = all(len(kept) == 2 * result.plan.groups[name] for name, kept in result.plan.keep.items())
    assert widest or any(abs(over[f]) <= dearest[f] for f in over)


def test_no_group_gets_wider_than_it_may():
    module, x = made("chain")
    plans = {e: configured(module, x, sparsity=0.1, max_expansion=e).plan for e in (1.0, 1.25, 4.0)}
    assert {e: len(plan.keep["conv2"]) for e, plan in plans.items()} == {1.0: 4, 1.25: 5, 4.0: 6}


def test_new_channels_are_drawn_and_no_copies():
    module, x = made("chain")
    result = configured(module, x, sparsity=0.1, max_expansion=3.0)
    for conv in (result.model.conv1, result.model.conv2):
        rows = conv.weight.detach().flatten(1)
        assert len(rows.unique(dim=0)) == len(rows)


def test_a_plan_that_grows_is_stored_and_applied_again(tmp_path):
    module, x = made("inverted")
    result = configured(module, x, sparsity=0.2, seed=3)
    loaded = Plan.load(result.plan.save(tmp_path / "plan"))
    assert not result.plan.diff(loaded) and loaded.provenance == result.plan.provenance
    assert torch.equal(sc.apply(loaded, module).eval()(x), result.model.eval()(x))
    in_place = configured(module, x, sparsity=0.2, seed=3, inplace=True)
    assert in_place.model is module and torch.equal(module.eval()(x), result.model.eval()(x))


def test_units_are_there_twice_only_where_layers_are_drawn_anew():
    module, x = made("chain")
    plan = sc.plan(module, example_inputs=(x,), method="spa_l1", sparsity=0.3)
    with pytest.raises(PlanError, match="conv1 must be ascending"):
        dataclasses.replace(plan, keep={**plan.keep, "conv1": torch.tensor([0, 0, 1])})


def test_options_that_make_no_sense_are_refused():
    for bad in ({"init": "first"}, {"densities": "erk"}, {"max_expansion": 0.5}, {"budget": "channels"}):
        with pytest.raises(OptionError):
            make_method("preconfig", bad)
