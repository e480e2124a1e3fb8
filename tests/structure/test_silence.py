"""Groups of which a masked network keeps something are marked, and no others, in torch graphs and in ONNX."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from cut_networks import anatomy_of, images, pruned_anatomy, randomised, zeroed
from onnx_models import Net as Graph
from onnx_models import feeds_for, run
from secateur.structure.onnx import cut_onnx, mask_onnx, onnx_anatomy

Between = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """[batch, 5, positions] → six channels, and what lies between them and the output."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.first = nn.Conv1d(5, 6, 1)
        self.norm, self.plain = nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False)
        self.second = nn.Conv1d(6, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(6, 1))
        self.steps = nn.LSTM(6, 6, batch_first=True)
        self.register_buffer("table", torch.rand(6, 1))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, self.first(x))


def linear_attention(net: Net, x: Tensor) -> Tensor:
    q, k = F.elu(x) + 1, F.elu(net.scale * x) + 1
    return (q.transpose(1, 2) @ k) @ x.mean(dim=1, keepdim=True).transpose(1, 2)


EXACT: dict[str, Between] = {
    "relu": lambda net, x: x.relu().sum(dim=1),
    "smooth": lambda net, x: (F.gelu(x) + F.silu(x) - x.tanh() * 3).sum(dim=1),
    "root": lambda net, x: x.square().sum(dim=1).sqrt(),
    "norm": lambda net, x: (x / x.norm(dim=1, keepdim=True).clamp_min(1e-6)).sum(dim=1),
    "read": lambda net, x: net.second(x.sigmoid() + 1),
    "gate": lambda net, x: (x * x.sigmoid() / (1 + x.exp())).sum(dim=1),
    "scaled": lambda net, x: (x.sigmoid() * net.scale).sum(dim=1),
    "batch norm": lambda net, x: net.norm(x.cos()).sum(dim=1),
    "norm without scale": lambda net, x: net.plain(x).sum(dim=1),
    "pools": lambda net, x: F.avg_pool1d(F.max_pool1d(x.relu(), 3), 2).sum(dim=1),
    "pad": lambda net, x: F.pad(x, (1, 2)).sum(dim=1),
    "concatenated": lambda net, x: net.second(torch.cat([x[:, :3], x[:, 3:].sigmoid()], dim=1)),
    "over positions": lambda net, x: net.second(x.exp() / x.exp().sum(dim=2, keepdim=True)),
    "attention": lambda net, x: ((x.transpose(1, 2) @ x).softmax(dim=2) @ x.transpose(1, 2)).sum(dim=2),
    "where": lambda net, x: torch.where(x > 0, x, 0.5 * x).sum(dim=1),
    "clamped": lambda net, x: x.clamp(-1, 2).sum(dim=1),
    "einsum": lambda net, x: torch.einsum("bct,bcs->bts", x, x.sigmoid()),
    "product": lambda net, x: x.transpose(1, 2) @ x.sigmoid(),
    "lstm": lambda net, x: net.steps(x.transpose(1, 2))[0].sum(dim=2),
    "buffer": lambda net, x: (x.exp() * net.table).sum(dim=1),
}

INEXACT: dict[str, Between] = {
    "softplus": lambda net, x: F.softplus(x).sum(dim=1),
    "sigmoid": lambda net, x: x.sigmoid().sum(dim=1),
    "cosine": lambda net, x: x.cos().norm(dim=1),
    "constant": lambda net, x: (x + 1).sum(dim=1),
    "elu": linear_attention,
    "power": lambda net, x: (0.5**x).sum(dim=1),
    "pad": lambda net, x: F.pad(x, (1, 2), value=1.0).sum(dim=1),
    "einsum": lambda net, x: torch.einsum("bct,bcs->bts", x.exp(), x.sigmoid()),
    "product": lambda net, x: x.cos().transpose(1, 2) @ x.sigmoid(),
    "clamped": lambda net, x: x.clamp(0.5, 2).sum(dim=1),
    "scale": lambda net, x: (net.scale.exp() * x.cos()).sum(dim=1),
    "positive weights": lambda net, x: F.conv1d(x.exp(), F.softplus(net.second.weight)),
    "over positions": lambda net, x: x.softmax(dim=2).sum(dim=1),
    "batch norm": lambda net, x: net.norm(x).sigmoid().sum(dim=1),
    "not finite": lambda net, x: x.square().sqrt().log().sum(dim=1),
}


@pytest.mark.parametrize(
    ("between", "marked"),
    [*((f, False) for f in EXACT.values()), *((f, True) for f in INEXACT.values())],
    ids=[*EXACT, *INEXACT],
)
def test_torch(between: Between, marked: bool) -> None:
    net, inputs = randomised(Net(between)), images(2, 5, 7)
    anatomy = anatomy_of(net, inputs)
    name = next(g.name for g in anatomy.groups if any(s.tensor == "first.weight" for s in g.slices))
    found = pruned_anatomy(net, inputs, anatomy, {name: [1, 4]})
    with torch.no_grad():
        masked, cut = zeroed(found)(*inputs), found.graph(*inputs)
    assert (bool(anatomy[name].inexact), not torch.allclose(masked, cut)) == (marked, marked)


class Standardised(nn.Conv2d):
    """Divides its weights by their own deviation, and by nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        spread, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / spread, self.bias)


@pytest.mark.parametrize("kind", ["StdConv2d", "ScaledStdConv2d", None])
def test_standardised_weights_that_are_all_zero(kind: str | None) -> None:
    """0 / 0 is said beforehand; with an epsilon, as in timm's networks, zeros stay zeros."""
    conv = Standardised if kind is None else getattr(pytest.importorskip("timm.layers"), kind)
    net, inputs = randomised(nn.Sequential(conv(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))), images(2, 3, 5, 5)
    (group,) = anatomy_of(net, inputs).groups
    plan = sc.plan(net, example_inputs=inputs, method="spa_l1", sparsity=0.0, budget="channels", ratios={"0": 0.5})
    with torch.no_grad():
        cut, masked = sc.apply(plan, net)(*inputs), sc.apply(plan, net, mask=True)(*inputs)
    assert torch.isfinite(cut).all()
    if kind is None:
        assert masked.isnan().all() and group.inexact == "div isn't finite where its parameters are 0"
    else:
        assert torch.allclose(masked, cut) and group.inexact is None


def rows(weight: Tensor) -> Tensor:
    return weight.flatten(1)


NORMED: dict[str, Callable[[Tensor], Tensor]] = {
    "batch norm": lambda w: F.batch_norm(rows(w)[None], None, None, training=True, eps=1e-6).view_as(w),
    "instance norm": lambda w: F.instance_norm(rows(w)[None]).view_as(w),
    "group norm": lambda w: F.group_norm(rows(w)[None], len(w)).view_as(w),
    "layer norm": lambda w: F.layer_norm(w, w.shape[1:]),
    "by hand": lambda w: (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5),
    "length": lambda w: F.normalize(rows(w), dim=1).view_as(w),
}
"""Norms of weights over their inputs, two of them as timm's standardised convolutions have them."""

PARAMETRIZED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "weight norm over outputs": lambda conv: nn.utils.parametrizations.weight_norm(conv, dim=1),
    "weight norm over all": lambda conv: nn.utils.parametrizations.weight_norm(conv, dim=None),  # type: ignore[arg-type]
    "spectral norm": nn.utils.parametrizations.spectral_norm,
}


class Normed(nn.Conv2d):
    how = "length"

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, NORMED[self.how](self.weight), self.bias)


def second_convolution(kind: str) -> nn.Module:
    if kind in PARAMETRIZED:
        return PARAMETRIZED[kind](nn.Conv2d(6, 4, 3))
    found = Normed(6, 4, 3)
    found.how = kind
    return found


@pytest.mark.parametrize("kind", [*NORMED, *PARAMETRIZED])
def test_norms_of_weights(kind: str) -> None:
    """A mask of what a normed weight reads, or makes, computes what the cut does, or the plan names the reason."""
    parts = nn.Conv2d(3, 6, 1), nn.ReLU(), second_convolution(kind), nn.ReLU(), nn.Conv2d(4, 2, 1)
    net, inputs = randomised(nn.Sequential(*parts)), images(2, 3, 5, 5)
    groups = anatomy_of(net, inputs).groups
    # a norm over a whole weight isn't known
    assert bool(groups) == (kind != "weight norm over all")
    for group in groups:
        plan = sc.plan(net, example_inputs=inputs, method="spa_l1", sparsity=0.0, ratios={group.name: 0.5})
        with torch.no_grad():
            cut, masked = sc.apply(plan, net)(*inputs), sc.apply(plan, net, mask=True)(*inputs)
        assert torch.isfinite(cut).all()
        told = f"masked and cut network differ in {group.name}: {group.inexact}"
        assert (told in plan.provenance[0].notes) == (not torch.allclose(masked, cut, atol=1e-6)), group.name


def test_the_norm_of_a_weight_keeps_the_channels_in_front_of_it_exact() -> None:
    """Zeros add nothing to a length, whatever it divides."""
    for kind, exact in {"length": True, "weight norm": True, "spectral norm": True, "group norm": False}.items():
        net = randomised(nn.Sequential(nn.Conv2d(3, 6, 1), second_convolution(kind)))
        (group,) = anatomy_of(net, images(2, 3, 5, 5)).groups
        assert (group.inexact is None) == exact, kind


def test_no_random_numbers_of_the_caller_are_drawn() -> None:
    net, inputs = randomised(Net(lambda net, x: F.dropout(x, training=True).sum(dim=1))), images(2, 5, 7)
    before = torch.get_rng_state()
    (group,) = anatomy_of(net, inputs).groups
    assert group.inexact is None and torch.equal(torch.get_rng_state(), before)


Calls = Callable[[Graph, str], str]


def total(net: Graph, x: str) -> str:
    return net("ReduceSum", x, net.ints(1), keepdims=0)


def flat(net: Graph, x: str) -> str:
    return net("Flatten", net("ReduceMean", x, net.ints(2, 3)))


ONNX_EXACT: dict[str, Calls] = {
    "Relu": lambda net, x: total(net, net("Relu", x)),
    "Clip": lambda net, x: total(net, net("Clip", x, net.constant(np.float32(0)), net.constant(np.float32(6)))),
    "Pow": lambda net, x: total(net, net("Pow", x, net.constant(np.float32(2)))),
    "gate": lambda net, x: total(net, net("Mul", x, net("Sigmoid", x))),
    "read": lambda net, x: net("Gemm", net("Exp", flat(net, x)), net.weight(3, 6), net.weight(3), transB=1),
    "LpNormalization": lambda net, x: net("LpNormalization", net.conv(x, 6, 4), axis=3),
    "Pad": lambda net, x: total(net, net("Pad", x, net.ints(0, 0, 1, 1, 0, 0, 0, 0), net.constant(np.float32(0)))),
}


ONNX_INEXACT: dict[str, Calls] = {
    "Softplus": lambda net, x: total(net, net("Softplus", x)),
    "Clip": lambda net, x: total(net, net("Clip", x, net.constant(np.float32(1)), net.constant(np.float32(6)))),
    "Add": lambda net, x: total(net, net("Add", x, net.constant(np.float32(2)))),
    "ReduceL2": lambda net, x: net("ReduceL2", net("Cos", x), net.ints(1), keepdims=0),
    "LpNormalization": lambda net, x: net.conv(net("LpNormalization", net("Cos", x), axis=1), 6, 4),
    "Pad": lambda net, x: total(net, net("Pad", x, net.ints(0, 0, 1, 1, 0, 0, 0, 0), net.constant(np.float32(1)))),
    "MatMul": lambda net, x: net("MatMul", net("Transpose", net("Exp", x), perm=[0, 2, 3, 1]), turned(net, x)),
}


def turned(net: Graph, x: str) -> str:
    return net("Transpose", net("Sigmoid", x), perm=[0, 2, 1, 3])


@pytest.mark.parametrize(
    ("between", "marked"),
    [*((f, False) for f in ONNX_EXACT.values()), *((f, True) for f in ONNX_INEXACT.values())],
    ids=[*ONNX_EXACT, *ONNX_INEXACT],
)
def test_onnx(between: Calls, marked: bool) -> None:
    net = Graph(2, 3, 5, 5)
    anatomy = onnx_anatomy(net.model(between(net, net.conv("x", 3, 6, name="first"))))
    feeds, removed = feeds_for(anatomy), {"first": [1, 4]}
    cut, masked = run(cut_onnx(anatomy, removed), feeds), run(mask_onnx(anatomy, removed), feeds)
    assert (bool(anatomy["first"].inexact), not np.allclose(cut[0], masked[0], atol=1e-5)) == (marked, marked)
