"""Oracles of OBSPA: least squares, its error, the order in which columns leave, and a network refitted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.methods import Consumer, Coupled, make_method
from secateur.networks.applying import module_anatomy
from secateur.networks.example import Example
from secateur.networks.fitting import _shifted
from secateur.networks.kinds import Asked
from secateur.networks.modules import plan_module
from secateur.observe import Gram
from secateur.solver import inverse_factor, inverse_hessian, obs_sweep, refit_without, removal_losses

GONE = [1, 4, 5, 9]


def problem(outputs=5, inputs=12, samples=40, seed=0):
    """W [outputs, inputs] and inputs X [inputs, samples] that depend on each other, float64."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    mix = torch.eye(inputs, dtype=torch.float64) + 0.4 * torch.randn(
        inputs, inputs, generator=generator, dtype=torch.float64
    )
    return w, mix @ torch.randn(inputs, samples, generator=generator, dtype=torch.float64)


def columns_gone(inputs=12, gone=GONE):
    flags = torch.zeros(inputs, dtype=torch.bool)
    flags[gone] = True
    return flags


def inverse(x, damping=0.0):
    found, used = inverse_hessian(2 * x @ x.T, damping)
    assert used == damping
    return found


def error(w, refitted, x):
    return float((w @ x - refitted @ x).square().sum())


def test_group_compensation_is_the_least_squares_refit():
    w, x = problem()
    refitted = refit_without(w, inverse(x), columns_gone())
    kept = (~columns_gone()).nonzero().flatten()
    xk = x[kept]
    expected = (w @ x) @ xk.T @ torch.linalg.inv(xk @ xk.T)
    assert torch.allclose(refitted[:, kept], expected, rtol=0, atol=1e-10)
    assert not refitted[:, GONE].any()


def test_removal_loss_is_the_error_that_is_left():
    w, x = problem()
    loss = removal_losses(w, inverse(x), [torch.tensor(GONE)])
    assert float(loss) == pytest.approx(error(w, refit_without(w, inverse(x), columns_gone()), x), rel=1e-10)
    # and a single column is the classic saliency of the optimal brain surgeon
    single = removal_losses(w, inverse(x), [torch.tensor([3])])
    assert float(single) == pytest.approx(float(0.5 * w[:, 3].square().sum() / inverse(x)[3, 3]), rel=1e-12)


def test_one_column_at_a_time_with_downdates_gives_the_same():
    w, x = problem()
    joint, h_inverse = refit_without(w, inverse(x), columns_gone()), inverse(x)
    for p in GONE:
        w = w - torch.outer(w[:, p], h_inverse[p]) / h_inverse[p, p]
        h_inverse = h_inverse - torch.outer(h_inverse[:, p], h_inverse[p]) / h_inverse[p, p]
    assert torch.allclose(w, joint, atol=1e-10)
    kept = (~columns_gone()).nonzero().flatten()
    hkk = 2 * x[kept] @ x[kept].T
    assert torch.allclose(h_inverse[kept][:, kept], torch.linalg.inv(hkk), atol=1e-10)


def test_a_sweep_from_left_to_right_can_only_be_worse():
    w, x = problem()
    keep = (~columns_gone()).expand_as(w)
    factor, _ = inverse_factor(2 * x @ x.T, 0.0)
    swept, mask, _ = obs_sweep(w, factor, lambda scores: keep)
    assert torch.equal(mask, keep)
    joint = error(w, refit_without(w, inverse(x), columns_gone()), x)
    assert error(w, swept, x) > 1.01 * joint
    assert joint < 0.9 * error(w, w.masked_fill(columns_gone(), 0), x)


def test_units_of_several_columns_and_of_none():
    w, x = problem()
    columns = [torch.tensor([0, 1]), torch.tensor([], dtype=torch.int64), torch.tensor([7]), torch.tensor([2, 11])]
    losses = removal_losses(w, inverse(x, 0.01), columns)
    single = [removal_losses(w, inverse(x, 0.01), [c]) if len(c) else torch.zeros(1) for c in columns]
    assert torch.allclose(losses, torch.cat([s.double() for s in single])) and float(losses[1]) == 0


# -- the method --------------------------------------------------------------------------------------------------------


def gram_of(x):
    gram = Gram()
    gram.update(x.T.unsqueeze(0))
    return gram


def test_the_score_is_the_sum_over_all_consumers():
    (v, x), (w, y) = problem(seed=1), problem(outputs=3, seed=2)
    units = tuple(torch.tensor([c]) for c in range(12))
    group = Coupled("g", 12, (), (Consumer("v", v, gram_of(x), units), Consumer("w", w, gram_of(y), units)))
    found = make_method("obspa", {"damping": 0.0}).score(group)
    expected = removal_losses(v, inverse(x), units) + removal_losses(w, inverse(y), units)
    assert found is not None and torch.allclose(found, expected, rtol=1e-8)
    assert make_method("obspa").score(Coupled("g", 12, ())) is None


def test_a_silent_channel_loses_nothing_however_quiet_the_others_are():
    w, x = problem()
    x[5] = 0
    units = tuple(torch.tensor([c]) for c in range(12))
    for loudness in (1e-3, 1.0):
        group = Coupled("g", 12, (), (Consumer("w", w, gram_of(loudness * x), units),))
        found = make_method("obspa").score(group)
        assert float(found[5]) == 0 and int((found == 0).sum()) == 1


class Convolutions(nn.Module):
    """Two convolutions and a linear layer around batch norms, all biases and norms away from their defaults."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        for norm in (self.norm1, self.norm2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.2, 0.2)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        return self.head(torch.relu(self.norm2(self.conv2(x))).mean(dim=(2, 3)))


def convolutions(samples=64):
    module = Convolutions().double().eval()
    x = torch.randn(samples, 3, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    return module, x


def planned(module, x, data, **options):
    chosen = make_method("obspa", {"sparsity": 0.4, "scope": "uniform", "budget": "channels", **options})
    example = Example((x[:2],))
    return plan_module(chosen, module_anatomy(module, example), example, Asked(data=data))


def test_scores_of_a_convolution_are_those_of_its_patches():
    module, x = convolutions()
    plan = planned(module, x, [x[:40], x[40:]])
    with torch.no_grad():
        seen = torch.relu(module.norm1(module.conv1(x)))
    patches = nn.functional.unfold(seen, 3, padding=1, stride=2).transpose(0, 1).flatten(1)
    h, w = inverse(patches, 0.01), module.conv2.weight.detach().flatten(1)
    expected = removal_losses(w, h, [torch.arange(9) + 9 * c for c in range(6)])
    assert torch.allclose(plan.scores["conv1"], (expected / expected.mean()).float(), rtol=1e-4)


@pytest.mark.parametrize("inputs", ["pruned", "dense"])
def test_a_network_is_refitted_layer_by_layer(inputs):
    """The same by hand: forwards of the user's module, unfold, least squares with damping, statistics of norms."""
    module, x = convolutions()
    plan = planned(module, x, [x], inputs=inputs)
    cut = sc.apply(plan, module)
    first, second = plan.keep["conv1"], plan.keep["conv2"]
    with torch.no_grad():
        # only rows leave from conv1, and what norm1 sees of the others is as before
        seen = torch.relu(module.norm1(module.conv1(x)))
        patches = nn.functional.unfold(seen, 3, padding=1, stride=2).transpose(0, 1).flatten(1)
        gone = ~torch.isin(torch.arange(6), first)
        weight = refit_without(module.conv2.weight.flatten(1), inverse(patches, 0.01), gone.repeat_interleave(9))
        made = nn.functional.conv2d(seen, weight.reshape(8, 6, 3, 3), stride=2, padding=1)
        mean, var = made.mean(dim=(0, 2, 3)), made.transpose(0, 1).flatten(1).var(dim=1)
        norm = nn.functional.batch_norm(made, mean, var, module.norm2.weight, module.norm2.bias)
        dense = module.norm2(module.conv2(seen))
        pooled = torch.relu(norm if inputs == "pruned" else dense).mean(dim=(2, 3)).T
        gone = ~torch.isin(torch.arange(8), second)
        head = refit_without(module.head.weight, inverse(pooled, 0.01), gone)
    kept = weight.reshape(8, 6, 3, 3)[second][:, first]
    assert torch.equal(cut.conv1.weight, module.conv1.weight[first])
    assert torch.equal(cut.norm1.running_mean, module.norm1.running_mean[first])
    assert torch.allclose(cut.conv2.weight, kept, atol=1e-10)
    assert torch.allclose(cut.norm2.running_mean, mean[second], atol=1e-10)
    assert torch.allclose(cut.norm2.running_var, var[second], atol=1e-10)
    assert torch.allclose(cut.head.weight, head[:, second], atol=1e-10)
    assert torch.equal(cut.head.bias, module.head.bias)


def test_without_norms_statistics_stay():
    module, x = convolutions()
    plan = planned(module, x, [x], norms="stored")
    assert set(plan.values) == {"conv2.weight", "head.weight"}
    assert torch.equal(sc.apply(plan, module).norm2.running_var, module.norm2.running_var[plan.keep["conv2"]])


def test_shifted_norms_have_their_statistics_moved_by_the_change():
    """By hand: what norm2 sees in the dense and in the refitted network, on data that its statistics aren't from."""
    module, x = convolutions()
    nn.init.uniform_(module.norm2.running_mean, -0.5, 0.5)
    nn.init.uniform_(module.norm2.running_var, 0.5, 2.0)
    plan = planned(module, x, [x[:40], x[40:]], norms="shift")
    cut, first, second = sc.apply(plan, module), plan.keep["conv1"], plan.keep["conv2"]
    with torch.no_grad():
        seen = torch.relu(module.norm1(module.conv1(x)))
        before = module.conv2(seen)[:, second]
        after = nn.functional.conv2d(seen[:, first], cut.conv2.weight, stride=2, padding=1)
    (mean, variance), (new_mean, new_variance) = (
        (made.mean(dim=(0, 2, 3)), made.transpose(0, 1).flatten(1).var(dim=1)) for made in (before, after)
    )
    expected = module.norm2.running_mean[second] + new_mean - mean
    assert torch.allclose(cut.norm2.running_mean, expected, atol=1e-7)
    expected = module.norm2.running_var[second] * new_variance / variance
    assert torch.allclose(cut.norm2.running_var, expected, rtol=1e-6)
    # nothing has changed before norm1
    assert torch.equal(cut.norm1.running_var, module.norm1.running_var[first])


def test_a_channel_that_was_constant_gets_the_variance_that_it_has_now():
    zero, one = torch.zeros(2), torch.ones(2)
    stored, before, after = (one, 2 * one), (one, torch.tensor([0.0, 4.0])), (zero, 3 * one)
    mean, variance = _shifted(stored, before, after)
    assert mean.tolist() == [0, 0] and variance.tolist() == [2 + 3, 2 * 3 / 4]


def test_channels_that_others_stand_in_for_cost_nothing():
    """Twins: with channel 4 a copy of channel 1, either may go and the network computes what it did."""
    module, x = convolutions()
    with torch.no_grad():
        for name in ("conv1.weight", "conv1.bias", "norm1.weight", "norm1.bias"):
            tensor = module.get_parameter(name)
            tensor[4] = tensor[1]
    plan = planned(module, x, [x], damping=1e-9, sparsity=0.05, norms="stored", scope="global", normalizer="none")
    assert plan.removed("conv1").tolist() in ([1], [4]) and not len(plan.removed("conv2"))
    with torch.no_grad():
        assert torch.allclose(sc.apply(plan, module)(x), module(x), atol=1e-6)
        plain = sc.apply(plan, module)
        plain.conv2.weight.copy_(module.conv2.weight[:, plan.keep["conv1"]])
        assert not torch.allclose(plain(x), module(x), atol=1e-2)


def test_norms_work_with_the_statistics_of_the_noise_while_it_is_looked_at():
    module, x = convolutions()
    plan = planned(module, x, None, calibration="noise", samples=50, low=-0.5, high=2.0, seed=3, scope="global")
    generator = torch.Generator().manual_seed(3)
    drawn = torch.cat([torch.rand(2, 3, 8, 8, generator=generator) for _ in range(25)])
    with torch.no_grad():
        seen = module.conv1((-0.5 + 2.5 * drawn).double())
        norm = nn.functional.batch_norm(seen, None, None, module.norm1.weight, module.norm1.bias, training=True)
        patches = nn.functional.unfold(torch.relu(norm), 3, padding=1, stride=2).transpose(0, 1).flatten(1)
        gone = ~torch.isin(torch.arange(6), plan.keep["conv1"])
        weight = refit_without(module.conv2.weight.flatten(1), inverse(patches, 0.01), gone.repeat_interleave(9))
        columns = [torch.arange(9) + 9 * c for c in range(6)]
        scores = removal_losses(module.conv2.weight.flatten(1), inverse(patches, 0.01), columns)
    cut, kept = sc.apply(plan, module), plan.keep["conv2"]
    assert torch.allclose(plan.scores["conv1"], (scores / scores.mean()).float(), rtol=1e-3)
    # statistics are summed in float32
    expected = weight.reshape(8, 6, 3, 3)[kept][:, plan.keep["conv1"]]
    assert gone.any() and torch.allclose(cut.conv2.weight, expected, rtol=1e-4, atol=1e-6)
    assert set(plan.values) == {"conv2.weight", "head.weight"}
    assert torch.equal(cut.norm2.running_mean, module.norm2.running_mean[kept])


class Pair(nn.Module):
    """Two layers read one input, and one of them has its parameter the other way round; a third reads both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.left, self.head = nn.Linear(3, 8), nn.Linear(8, 5), nn.Linear(5, 2)
        self.right = nn.Parameter(torch.randn(8, 5))

    def forward(self, x):
        x = torch.tanh(self.a(x))
        return self.head(torch.tanh(self.left(x) + nn.functional.linear(x, self.right.t())))


def test_weights_that_share_an_input_and_what_comes_after_them():
    module = Pair().double().eval()
    x = torch.randn(50, 3, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    plan = planned(module, x, [x[:20], x[20:]], normalizer="none")
    # named by the first parameter whose rows they are
    read = plan.keep["right"]
    with torch.no_grad():
        seen = torch.tanh(module.a(x))
        h, gone = inverse(seen.T, 0.01), ~torch.isin(torch.arange(8), read)
        units = [torch.tensor([c]) for c in range(8)]
        scores = removal_losses(module.left.weight, h, units) + removal_losses(module.right.T, h, units)
        left, right = (refit_without(w, h, gone) for w in (module.left.weight, module.right.T))
        behind = torch.tanh(seen @ (left + right).T + module.left.bias)
        wanted = refit_without(
            module.head.weight, inverse(behind.T, 0.01), ~torch.isin(torch.arange(5), plan.keep["left"])
        )
    cut = sc.apply(plan, module)
    assert gone.any() and len(plan.removed("left"))
    assert torch.allclose(plan.scores["right"], scores.float(), rtol=1e-5)
    assert torch.allclose(cut.right, right.T[read][:, plan.keep["left"]], atol=1e-10)
    assert torch.allclose(cut.head.weight, wanted[:, plan.keep["left"]], atol=1e-10)
