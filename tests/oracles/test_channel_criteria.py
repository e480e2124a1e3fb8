"""Scores of methods that prune traced modules, against numbers worked out by hand or by a plain second computation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from channel_networks import Residual
from secateur.criteria.groups import NORMALIZERS, REDUCTIONS, reduce_slices
from secateur.errors import DataError
from secateur.methods import Coupled, Part, make_method
from secateur.networks.applying import module_anatomy
from secateur.networks.example import Example
from secateur.networks.kinds import Asked
from secateur.networks.modules import plan_module
from secateur.observe.gradients import cross_entropy, learned


class Chain(nn.Module):
    """Two linear layers around a norm: the smallest network with one group."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.uniform_(self.norm.bias, -0.5, 0.5)

    def forward(self, x):
        return self.b(torch.tanh(self.norm(self.a(x))))


@pytest.fixture
def chain():
    module = Chain().double().eval()
    x = torch.randn(6, 3, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    return module, x, torch.tensor([0, 1, 1, 0, 1, 0])


def scores(method, module, x, data=None, **options):
    chosen = make_method(method, {"sparsity": 0.3, **options})
    example = Example((x,))
    plan = plan_module(chosen, module_anatomy(module, example), example, Asked(data=data))
    assert list(plan.scores) == ["a"]
    return plan.scores["a"]


def test_spa_l1_sums_all_coupled_entries_and_divides_by_the_mean(chain):
    module, x, _ = chain
    s = module.a.weight.abs().sum(1) + module.a.bias.abs() + module.norm.weight.abs() + module.norm.bias.abs()
    s = s + module.b.weight.abs().sum(0)
    assert torch.allclose(scores("spa_l1", module, x), (s / s.mean()).float())


def test_depgraph_l2_is_the_mean_over_layers_without_biases(chain):
    module, x, _ = chain
    parts = [module.a.weight.square().sum(1), module.norm.weight.square(), module.b.weight.square().sum(0)]
    s = torch.stack(parts).mean(0)
    assert torch.allclose(scores("depgraph_l2", module, x), (s / s.mean()).float())


def test_slimming_is_the_scale_of_the_norm(chain):
    module, x, _ = chain
    assert torch.allclose(scores("slimming", module, x), module.norm.weight.abs().float())


def gradients(module, x, y):
    loss = nn.functional.cross_entropy(module(x), y)
    return dict(zip(dict(module.named_parameters()), torch.autograd.grad(loss, list(module.parameters())), strict=True))


def test_snip_is_theta_times_its_gradient(chain):
    module, x, y = chain
    g = gradients(module, x, y)
    s = {n: (p * g[n]).abs() for n, p in module.named_parameters()}
    total = s["a.weight"].sum(1) + s["a.bias"] + s["norm.weight"] + s["norm.bias"] + s["b.weight"].sum(0)
    found = scores("spa_snip", module, x, data=[(x, y)])
    assert torch.allclose(found, (total / total.mean()).float())
    # scaling the loss changes no score
    assert torch.allclose(found, scaled(module, x, y))


def scaled(module, x, y):
    chosen = make_method("spa_snip", {"sparsity": 0.3})
    example = Example((x,))
    loss = lambda m, batch: 7 * nn.functional.cross_entropy(m(batch[0]), batch[1])  # noqa: E731
    return plan_module(chosen, module_anatomy(module, example), example, Asked(data=[(x, y)], loss=loss)).scores["a"]


def test_taylor_gate_is_the_squared_sum_of_output_times_gradient(chain):
    module, x, y = chain
    seen = {}
    hook = module.norm.register_forward_hook(lambda m, i, o: (o.retain_grad(), seen.update(o=o))[0])
    nn.functional.cross_entropy(module(x), y).backward()
    hook.remove()
    gate = (seen["o"] * seen["o"].grad).sum(0)
    module.zero_grad(set_to_none=True)
    assert torch.allclose(scores("taylor", module, x, data=[(x, y)]), gate.square().float())


def test_taylor_averages_squares_over_batches(chain):
    module, x, y = chain
    halves = [(x[:3], y[:3]), (x[3:], y[3:])]
    single = [scores("taylor", module, x, data=[half]) for half in halves]
    assert torch.allclose(scores("taylor", module, x, data=halves), torch.stack(single).mean(0))


def test_a_channel_without_outgoing_weights_has_no_taylor_importance(chain):
    module, x, y = chain
    with torch.no_grad():
        module.b.weight[:, 2] = 0
    found = scores("taylor", module, x, data=[(x, y)])
    assert float(found[2]) == 0 and float(found.sum()) > 0


def test_grasp_and_crop_on_a_quadratic_loss():
    # L = th^T A th / 2 with A = diag(1, 2), th = (1, 1): g = (1, 2), Hg = (1, 4), so -th * Hg = (-1, -4)
    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.ones(2))

    def loss(module, batch):
        return 0.5 * (module.theta.square() * torch.tensor([1.0, 2.0])).sum()

    module = Quadratic()
    told = learned(module, [None], loss, ("gradient", "curvature"), per_batch=False)[0]
    assert told["gradient"]["theta"].tolist() == [1.0, 2.0] and told["curvature"]["theta"].tolist() == [1.0, 4.0]
    part = Part(
        "theta",
        0,
        torch.tensor([[0], [1]]),
        "weight",
        module.theta.detach(),
        **{kind: tensors["theta"] for kind, tensors in told.items()},
    )
    group = Coupled("theta", 2, (part,))
    # higher = keep: index 0 leaves first
    assert make_method("spa_grasp").score(group).tolist() == [1.0, 4.0]
    module.theta.data[1] = -1.0
    told = learned(module, [None], loss, ("curvature",), per_batch=False)[0]["curvature"]["theta"]
    part = Part("theta", 0, torch.tensor([[0], [1]]), "weight", module.theta.detach(), curvature=told)
    assert make_method("spa_crop").score(Coupled("theta", 2, (part,))).tolist() == [1.0, 4.0]


class Quadratic(nn.Module):
    """Its loss is th^T A th / 2: the Hessian is A, whatever the parameters are."""

    def __init__(self, a) -> None:
        super().__init__()
        self.register_buffer("a", torch.tensor(a, dtype=torch.double))
        self.theta = nn.Parameter(torch.linspace(1, 2, len(a), dtype=torch.double))

    @staticmethod
    def loss(module, batch):
        return 0.5 * module.theta @ module.a @ module.theta


def test_the_estimated_diagonal_is_exact_for_a_diagonal_hessian_and_near_for_others():
    def diagonal(module, probes, seed=0):
        found = learned(module, [None], Quadratic.loss, ("diagonal",), False, probes=probes, seed=seed)
        assert list(found[0]) == ["diagonal"]
        return found[0]["diagonal"]["theta"]

    assert diagonal(Quadratic([[1.0, 0.0], [0.0, -3.0]]), probes=1).tolist() == [1.0, -3.0]
    coupled = Quadratic([[2.0, 0.5, 0.1], [0.5, 1.0, -0.4], [0.1, -0.4, 3.0]])
    near = diagonal(coupled, probes=400)
    assert torch.allclose(near, coupled.a.diagonal(), atol=0.1) and not torch.equal(near, coupled.a.diagonal())
    assert torch.equal(near, diagonal(coupled, probes=400)) and not torch.equal(near, diagonal(coupled, 400, seed=1))


def test_obd_and_second_order_taylor_are_the_change_of_a_quadratic_loss():
    module = Quadratic([[3.0, 0.0], [0.0, 1.0]])
    told = learned(module, [None], Quadratic.loss, ("gradient", "diagonal"), False)[0]
    kinds = {kind: tensors["theta"] for kind, tensors in told.items()}
    theta = module.theta.detach()
    group = Coupled("theta", 2, (Part("theta", 0, torch.tensor([[0], [1]]), "weight", theta, **kinds),))
    # without theta_k the loss falls by A_kk theta_k^2 / 2, of which OBD leaves out the gradient
    change = 0.5 * module.a.diagonal() * theta.square()
    assert torch.allclose(make_method("obd").score(group), change)
    assert torch.allclose(make_method("taylor", {"order": 2}).score(group), change.square())
    assert torch.allclose(make_method("taylor").score(group), (2 * change).square())


def test_a_loss_that_is_linear_has_no_second_derivative():
    told = learned(nn.Linear(3, 1), [torch.ones(2, 3)], lambda m, b: m(b).sum(), ("curvature", "diagonal"), False)[0]
    assert all(not bool(t.any()) for tensors in told.values() for t in tensors.values())


def test_second_order_taylor_of_a_network_uses_gradient_and_diagonal(chain):
    module, x, y = chain
    told = learned(module, [(x, y)], cross_entropy, ("gradient", "diagonal"), True, probes=16)[0]
    s = {
        n: (told["gradient"][n] * p - 0.5 * told["diagonal"][n] * p.square()).square()
        for n, p in module.named_parameters()
    }
    total = s["a.weight"].sum(1) + s["a.bias"] + s["norm.weight"] + s["norm.bias"] + s["b.weight"].sum(0)
    assert torch.allclose(scores("taylor", module, x, data=[(x, y)], order=2), total.float())


def test_fpgm_drops_the_channel_in_the_middle_of_the_others():
    module = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1))
    with torch.no_grad():
        # four corners and their centre, which is by far the largest but not the most replaceable by size
        module[0].weight.copy_(torch.tensor([[9.0, 10], [11, 10], [10, 9], [10, 11], [10, 10]]))
        module[2].weight.fill_(1.0)
    x = torch.zeros(1, 2)
    plan = sc.plan(module, example_inputs=(x,), method="fpgm", sparsity=0.2, budget="channels")
    assert plan.keep["0"].tolist() == [0, 1, 2, 3]
    # two neighbours at sqrt(2), the opposite one at 2, the centre at 1
    sums = torch.tensor([3 + 2 * 2**0.5] * 4 + [4.0])
    assert torch.allclose(plan.scores["0"], sums / sums.mean())


def test_gradients_are_the_mean_over_batches(chain):
    module, x, y = chain
    halves = [(x[:3], y[:3]), (x[3:], y[3:])]
    told = learned(module, halves, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), ("gradient",), False)[0]
    whole = gradients(module, x, y)
    assert all(torch.allclose(told["gradient"][n], g) for n, g in whole.items())


def test_frozen_parameters_have_gradients_and_stay_frozen(chain):
    module, x, y = chain
    whole = gradients(module, x, y)
    module.a.requires_grad_(False)
    told = learned(module, [(x, y)], cross_entropy, ("gradient",), False)[0]["gradient"]
    assert told.keys() == whole.keys() and all(torch.allclose(told[n], g) for n, g in whole.items())
    with pytest.raises(DataError, match="scalar"):
        learned(module, [(x, y)], lambda module, batch: module(batch[0]), ("gradient",), False)
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["a.weight", "a.bias"]


def test_reductions_and_normalisers():
    entries = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 2.0]], dtype=torch.double)
    assert {n: f(entries).tolist() for n, f in REDUCTIONS.items()} == {
        "sum": [6.0, 6.0], "mean": [2.0, 2.0], "max": [3.0, 4.0], "first": [1.0, 4.0],
    }  # fmt: skip
    s = torch.tensor([1.0, 3.0, -1.0], dtype=torch.double)
    assert {n: f(s).tolist() for n, f in NORMALIZERS.items() if n not in ("standardise", "lamp")} == {
        "none": [1.0, 3.0, -1.0], "mean": [1.0, 3.0, -1.0], "max": [1 / 3, 1.0, -1 / 3], "sum": [1 / 3, 1.0, -1 / 3],
    }  # fmt: skip
    assert NORMALIZERS["mean"](torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert NORMALIZERS["lamp"](torch.tensor([1.0, 4.0, 9.0, 0.0])).tolist() == [1 / 14, 4 / 13, 1.0, 0.0]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_slices_are_reduced_as_their_entries_are(reduction):
    """Whatever dimension units lie along, and with one position or several of it, all entries of a unit count."""
    scores = torch.rand(4, 6, 3, generator=torch.Generator().manual_seed(0))
    for dim, index in ((0, [[2], [0]]), (1, [[1, 4], [0, 5]]), (-2, [[3, 2, 0]]), (2, [[1]])):
        for one, along in ((scores, dim), (scores[:, 0, 0], 0)):
            index_UW = torch.tensor(index).clamp(max=one.shape[along] - 1)
            entries = one.movedim(along, 0)[index_UW].flatten(1).double()
            found = reduce_slices(one, along, index_UW, reduction)
            assert found.dtype == torch.float64 and torch.allclose(found, REDUCTIONS[reduction](entries), rtol=1e-12)


def test_a_residual_stream_is_scored_by_all_its_layers():
    module = Residual().eval()
    x = torch.zeros(1, 3, 12, 12)
    plan = sc.plan(module, example_inputs=(x,), method="slimming", sparsity=0.2)
    stream = module.stem[1].weight.abs() + module.bn2.weight.abs()
    assert torch.allclose(plan.scores["stem.0"], stream.detach().float())
