"""Oracles of PreCropping: densities by hand and against brute force, widths of known blocks, budgets, starts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from channel_networks import Attention, Residual
from secateur.allocate import erk, fit_shares, global_masks, of_masks, synexp, uniform
from secateur.errors import BudgetError, DataError, UnsupportedModelError, UsageError
from secateur.networks.applying import module_anatomy
from secateur.networks.example import Example
from secateur.observe.flow import synaptic_flow
from secateur.structure.layers import layers_of
from secateur.structure.streams import residual_streams

# -- densities ---------------------------------------------------------------------------------------------------------


def test_layers_below_the_cap_keep_the_same_number_of_weights():
    n = [100, 400]
    assert synexp(n, n, max_weights=250) == pytest.approx([1, 0.375], rel=1e-12)
    assert synexp(n, n, max_weights=250, cap=None) == pytest.approx([1.25, 0.3125], rel=1e-12)


@pytest.mark.parametrize(("share", "expected"), [(0.2, [1, 0.32, 0.16, 0.16, 1]), (0.05, [1, 0.067, 0.034, 0.034, 1])])
def test_densities_of_a_chain(share, expected):
    n = [288, 18432, 36864, 36864, 640]
    assert synexp(n, n, max_weights=share * sum(n)) == pytest.approx(expected, abs=6e-3)


def test_a_budget_that_holds_everything_keeps_everything():
    n, f = [100, 400, 30], [900, 400, 30]
    assert (synexp(n, f, max_weights=530, max_macs=1330) == 1).all()
    assert (synexp(n, f) == 1).all()


@pytest.mark.parametrize(("weights", "macs"), [(300, None), (None, 2500), (300, 2500), (430, 900), (200, 4000)])
def test_no_grid_of_densities_does_better(weights, macs):
    n, f = np.array([30.0, 120, 400]), np.array([3000.0, 1200, 800])
    best = synexp(n, f, max_weights=weights, max_macs=macs)
    assert weights is None or best @ n <= weights * (1 + 1e-9)
    assert macs is None or best @ f <= macs * (1 + 1e-9)
    grid = np.linspace(0.02, 1, 50)
    tried = np.array(list(itertools.product(grid, repeat=3)))
    fits = ((weights is None) | (tried @ n <= (weights or 0))) & ((macs is None) | (tried @ f <= (macs or 0)))
    reached = np.log(tried[fits]).sum(axis=1).max()
    assert np.log(best).sum() >= reached
    # and the grid comes near, so the comparison says something
    assert np.log(best).sum() - reached < 0.2


def test_both_budgets_bind_or_have_no_price():
    n, f = np.array([30.0, 120, 400]), np.array([3000.0, 1200, 800])
    both = synexp(n, f, max_weights=300, max_macs=2500)
    assert both @ n == pytest.approx(300) and both @ f == pytest.approx(2500)
    loose = synexp(n, f, max_weights=300, max_macs=1e6)
    assert np.array_equal(loose, synexp(n, f, max_weights=300))


def test_budgets_that_cant_be_met_are_refused():
    with pytest.raises(BudgetError, match="budget of 2 weights is too small: one weight in each of 3 layers takes 3"):
        synexp([10, 10, 10], [10, 10, 10], max_weights=2)
    with pytest.raises(BudgetError, match="budget of 20 MACs is too small"):
        synexp([10, 10, 10], [100, 100, 100], max_macs=20)
    with pytest.raises(BudgetError, match="without a cap need a budget"):
        synexp([10], [10], cap=None)


@pytest.mark.parametrize(
    ("shapes", "density", "expected"),
    [
        ([(300, 784), (100, 300), (10, 100)], 0.1, [0.079568, 0.230189, 1.0]),
        ([(300, 784), (100, 300), (10, 100)], 0.05, [0.038484, 0.111334, 0.918507]),
        ([(300, 784), (100, 300), (10, 100)], 0.02, [0.015394, 0.044534, 0.367403]),
        ([(300, 784), (100, 300), (10, 100)], 0.5, [0.434099, 1.0, 1.0]),
        ([(16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (10, 64)], 0.1, [0.566298, 0.114675, 0.054152, 1.0]),
    ],
)
def test_erk_by_hand(shapes, density, expected):
    found = erk(shapes, density)
    assert found == pytest.approx(expected, abs=1e-6)
    n = np.array([math.prod(shape) for shape in shapes])
    assert found @ n == pytest.approx(density * n.sum())


def test_erk_and_uniform_at_the_ends():
    shapes = [(30, 20), (20, 30, 3, 3)]
    assert (erk(shapes, 1.0) == 1).all() and (uniform(shapes, 0.25) == 0.25).all()


def test_a_layer_without_weights_is_named():
    masks = {"a": torch.tensor([True, False]), "b": torch.tensor([False])}
    with pytest.raises(BudgetError, match="no weight of b would stay"):
        of_masks(masks)


def test_ties_dont_remove_more_than_was_asked():
    masks = global_masks(lambda masks: {"a": torch.ones(7), "b": torch.ones(2, 5)}, {"a": (7,), "b": (2, 5)}, 0.3)
    assert masks["a"].tolist() == [True] * 5 + [False] * 2 and not masks["b"].any()


# -- from densities to widths ------------------------------------------------------------------------------------------


def test_a_block_on_a_fixed_stream_takes_the_root_of_the_product():
    both = np.ones((2, 1))
    assert fit_shares(both, np.array([0.25, 0.25])) == pytest.approx([0.25])
    assert fit_shares(both, np.array([0.16, 0.36])) == pytest.approx([0.24])
    assert fit_shares(np.ones((3, 1)), np.array([0.5, 0.2, 0.3])) == pytest.approx([(0.5 * 0.2 * 0.3) ** (1 / 3)])


def test_a_chain_with_fixed_ends_reproduces_its_densities():
    exponents = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    densities = np.array([0.5, 0.25, 0.5])
    shares = fit_shares(exponents, densities)
    assert shares == pytest.approx([0.5, 0.5])
    assert np.exp(exponents @ np.log(shares)) == pytest.approx(densities)


def test_weights_of_the_fit_decide_between_layers():
    both, densities = np.ones((2, 1)), np.array([0.1, 0.4])
    assert fit_shares(both, densities, np.array([3.0, 1.0])) == pytest.approx([0.1 ** (3 / 4) * 0.4 ** (1 / 4)])


def test_no_group_grows():
    assert fit_shares(np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([0.2, 0.5])) == pytest.approx([0.2, 1.0])


class Chain(nn.Module):
    """Convolutions with norms, a linear head."""

    def __init__(self, widths=(32, 64, 64, 64), classes=10):
        super().__init__()
        blocks, before = [], 1
        for number, width in enumerate(widths):
            conv = nn.Conv2d(before, width, 3, stride=2 if number == 1 else 1, padding=1, bias=False)
            blocks.append(nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()))
            before = width
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(before, classes)

    def forward(self, x):
        return self.head(self.blocks(x).mean(dim=(2, 3)))


def chain():
    torch.manual_seed(0)
    return Chain(), torch.randn(2, 1, 8, 8)


def precropped(module, x, **arguments):
    return sc.prune(module, example_inputs=(x,), method="precrop", **arguments)


def test_layers_are_found_with_weights_macs_and_groups():
    module, x = chain()
    layers = layers_of(module_anatomy(module, Example((x,))))
    assert [layer.weights for layer in layers] == [288, 18432, 36864, 36864, 640]
    # two images; the second convolution halves 8x8
    assert [layer.macs for layer in layers] == [
        2 * n * at for n, at in zip([288, 18432, 36864, 36864, 640], [64, 16, 16, 16, 1], strict=True)
    ]
    assert [dict(layer.exponents) for layer in layers] == [
        {"blocks.0.0": 1},
        {"blocks.0.0": 1, "blocks.1.0": 1},
        {"blocks.1.0": 1, "blocks.2.0": 1},
        {"blocks.2.0": 1, "blocks.3.0": 1},
        {"blocks.3.0": 1},
    ]


def test_depthwise_and_concatenated_dimensions_count_as_often_as_they_get_narrower():
    layers = {
        layer.tensor: layer for layer in layers_of(module_anatomy(Residual(), Example((torch.randn(1, 3, 12, 12),))))
    }
    assert layers["depthwise.weight"].exponents == {"stem.0": 1}
    assert layers["head.weight"].exponents == {"stem.0": 0.5, "point": 0.5}
    fused = {layer.tensor: layer for layer in layers_of(module_anatomy(Attention(), Example((torch.randn(1, 7, 6),))))}
    assert fused["qkv.weight"].exponents == {"embed": 1, "qkv": 1} and "table" not in fused


def test_residual_streams_are_the_channels_of_sums():
    assert residual_streams(module_anatomy(Residual(), Example((torch.randn(1, 3, 12, 12),)))) == {"stem.0"}
    assert residual_streams(module_anatomy(Attention(), Example((torch.randn(1, 7, 6),)))) == {"embed"}
    module, x = chain()
    assert not residual_streams(module_anatomy(module, Example((x,))))


class Gated(nn.Module):
    """A gate times a value, with a mask and positions that are added: no residual connection."""

    def __init__(self):
        super().__init__()
        self.gate, self.value, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.positions = nn.Parameter(torch.zeros(5, 8))

    def forward(self, x, mask):
        return self.out(self.gate(x).sigmoid() * (self.value(x) + self.positions) + mask)


def test_gates_masks_and_positions_make_no_stream():
    anatomy = module_anatomy(Gated(), Example((torch.randn(2, 5, 6), torch.zeros(2, 5, 1))))
    assert [g.name for g in anatomy if not g.frozen] == ["gate"] and not residual_streams(anatomy)


# every pair of a budget, a way to densities and a sparsity, rather than all 36 cases
@pytest.mark.parametrize(
    ("budget", "densities", "sparsity"),
    [
        (budget, densities, (0.3, 0.8, 0.95)[(row + column) % 3])
        for row, budget in enumerate(("params", "macs", "bytes"))
        for column, densities in enumerate(("synexp", "synflow", "erk", "uniform"))
    ],
)
def test_budgets_are_met_within_one_channel(budget, densities, sparsity):
    module, x = chain()
    result = precropped(module, x, sparsity=sparsity, budget=budget, options={"densities": densities, "rounds": 5})
    anatomy = sc.anatomy(result.model, example_inputs=(x,))
    dense = getattr(sc.anatomy(module, example_inputs=(x,)).total, budget)
    dearest = max(getattr(group.cost, budget) for group in anatomy if not group.frozen)
    assert abs(getattr(anatomy.total, budget) - (1 - sparsity) * dense) <= dearest
    if budget == "params":
        assert anatomy.total.params == sum(p.numel() for p in result.model.parameters())


def test_a_limit_on_macs_holds_beside_the_budget():
    module, x = chain()
    dense = sc.anatomy(module, example_inputs=(x,)).total
    for keep_macs, binds in ((0.1, True), (0.9, False)):
        result = precropped(module, x, sparsity=0.5, options={"keep_macs": keep_macs})
        cost = sc.anatomy(result.model, example_inputs=(x,)).total
        assert cost.macs <= keep_macs * dense.macs * 1.05 and cost.params <= 0.5 * dense.params * 1.02
        assert (cost.macs == pytest.approx(keep_macs * dense.macs, rel=0.05)) is binds
        assert (cost.params == pytest.approx(0.5 * dense.params, rel=0.02)) is not binds


def test_widths_are_those_of_the_least_squares_times_one_number():
    module, x = chain()
    plan = precropped(module, x, sparsity=0.8).plan
    widths = np.array([len(kept) for kept in plan.keep.values()])
    n = [288, 18432, 36864, 36864, 640]
    densities = synexp(n, n, max_weights=0.2 * sum(n))
    # the normal equations of a chain of five layers between four groups
    lies = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=float)
    shares = np.minimum(1, np.exp(np.linalg.solve(lies.T @ lies, lies.T @ np.log(densities))))
    fits = [
        s
        for s in np.linspace(0.5, 2, 3001)
        if (np.minimum(1, s * shares) * [32, 64, 64, 64]).round().tolist() == widths.tolist()
    ]
    assert fits and len(set(widths.tolist())) > 2
    assert all(torch.equal(kept, torch.arange(len(kept))) for kept in plan.keep.values())


def test_nothing_is_cut_within_the_budget():
    module, x = chain()
    result = precropped(module, x, sparsity=0.0)
    assert result.plan.is_identity
    assert all(torch.equal(t, result.model.state_dict()[n]) for n, t in module.state_dict().items())


def test_streams_stay_unless_they_are_asked_for():
    module, x = Residual(), torch.randn(1, 3, 12, 12)
    assert precropped(module, x, sparsity=0.3).model.stem[0].out_channels == 12
    cropped = precropped(module, x, sparsity=0.7, options={"densities": "uniform", "crop_residual": True})
    assert cropped.model.stem[0].out_channels < 12
    with pytest.raises(BudgetError, match=r"can't remove 95\.0% of the params"):
        precropped(module, x, sparsity=0.95)


class Stream(nn.Module):
    """Nothing but a residual stream."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.mix(x))


@pytest.mark.parametrize("densities", ["synexp", "synflow"])
def test_networks_without_free_channels_say_why(densities):
    options = {"densities": densities}
    with pytest.raises(UnsupportedModelError, match="residual connections, such as embed: set crop_residual"):
        precropped(Stream(), torch.randn(2, 4), sparsity=0.5, options=options)
    with pytest.raises(UnsupportedModelError, match="has no channels"):
        precropped(nn.LayerNorm(4), torch.randn(2, 4), sparsity=0.5, options=options)


def test_densities_from_the_loss_need_data():
    module, x = chain()
    for densities in ("snip", "grasp"):
        with pytest.raises(DataError, match="precrop needs data"):
            precropped(module, x, sparsity=0.5, options={"densities": densities})
    labels = torch.tensor([0, 1])
    for densities in ("snip", "grasp"):
        cut = precropped(module, x, sparsity=0.5, data=[(x, labels)], options={"densities": densities}).model
        assert sum(p.numel() for p in cut.parameters()) < 0.55 * sum(p.numel() for p in module.parameters())


def test_densities_alone_are_what_widths_come_from():
    module, x = chain()
    found = sc.densities(module, example_inputs=(x,), sparsity=0.8)
    n = [288, 18432, 36864, 36864, 640]
    assert list(found) == [f"blocks.{i}.0.weight" for i in range(4)] + ["head.weight"]
    assert list(found.values()) == pytest.approx(synexp(n, n, max_weights=0.2 * sum(n)).tolist())
    wider = sc.densities(module, example_inputs=(x,), sparsity=0.2, method="preconfig")
    assert max(wider.values()) > 1
    with pytest.raises(UsageError, match="spa_l1 doesn't give layers densities"):
        sc.densities(module, example_inputs=(x,), method="spa_l1")


def test_a_tied_weight_is_one_layer_under_all_its_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.a.weight = self.b.weight

        def forward(self, x):
            return self.head(self.a(self.b(x).relu()).relu())

    torch.manual_seed(0)
    module, x = Tied(), torch.randn(4, 6)
    data = [(x, torch.tensor([0, 1, 2, 0]))]
    for densities in ("synflow", "snip"):
        options = {"densities": densities, "rounds": 3}
        found = sc.densities(module, example_inputs=(x,), sparsity=0.5, options=options, data=data)
        assert len(found) == 2 and 0 < min(found.values()) < 1
    flow = synaptic_flow(module, (x,), {})
    assert torch.equal(flow["a.weight"], flow["b.weight"]) and flow["a.weight"].sum() > 0


# -- how the narrow network starts -------------------------------------------------------------------------------------


def test_changed_layers_are_drawn_for_their_new_number_of_inputs():
    module, x = chain()
    cut = precropped(module, x, sparsity=0.8).model
    for block in list(cut.blocks)[1:]:
        weight = block[0].weight.detach()
        bound = 1 / math.sqrt(weight[0].numel())  # torch draws from U(-bound, bound)
        assert 0.9 * bound < float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_the_draw_follows_the_seed_and_leaves_the_global_one_alone():
    module, x = chain()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (precropped(module, x, sparsity=0.5, seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    weights = [m.blocks[2][0].weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_inherited_channels_have_the_scale_of_a_new_draw():
    module, x = chain()
    result = precropped(module, x, sparsity=0.8, options={"init": "first"})
    old, new = module.blocks[2][0].weight, result.model.blocks[2][0].weight
    scale = math.sqrt(old[0].numel() / new[0].numel())
    assert torch.allclose(new, old[: new.shape[0], : new.shape[1]] * scale)
    assert torch.equal(result.model.head.bias, module.head.bias)


def test_in_place_and_as_a_graph_start_alike():
    class Wired(Chain):
        def forward(self, x):
            return self.head(self.blocks(x).mean(dim=(2, 3)).reshape(-1, 64))

    module, x = chain()
    expected = precropped(module, x, sparsity=0.6)
    sc.prune(module, example_inputs=(x,), method="precrop", sparsity=0.6, inplace=True)
    assert torch.equal(module(x), expected.model(x))

    torch.manual_seed(0)
    wired = Wired()
    graph = precropped(wired, x, sparsity=0.6)
    assert "GraphModule" in graph.report.notes[0]
    weight = graph.model.get_parameter("blocks.2.0.weight").detach()
    assert float(weight.abs().max()) == pytest.approx(1 / math.sqrt(weight[0].numel()), rel=0.05)


def test_attention_of_torch_is_drawn_anew_as_a_whole():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 4)
            self.embed = nn.Linear(6, 32)

        def forward(self, x):
            x = self.embed(x)
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    module, x = Block(), torch.randn(2, 5, 6)
    cut = precropped(module, x, sparsity=0.3).model
    changed = [n for n, p in cut.named_parameters() if p.shape != dict(module.named_parameters())[n].shape]
    assert any("attention" in name for name in changed)
    assert torch.isfinite(cut(x)).all()
