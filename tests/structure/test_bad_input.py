"""Networks, inputs and requests that can't be: one sentence each, and the caller's module stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cut_networks import anatomy_of, check, images, pruned, randomised, tokens
from secateur.errors import UnsupportedModelError, UsageError
from secateur.networks.applying import module_anatomy
from secateur.networks.example import Example
from secateur.structure.graphcut import Reference
from secateur.structure.groups import traced_anatomy
from secateur.structure.trace import RULES, Call, NoRule, Trace, Value, Zeros, rule, trace


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.sum() > 0:
            x = -x
        return self.b(x)


class Found(Branches):
    """As many rows as the values say."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        rows = x[:, 0].nonzero()[:, 0]
        return self.b(x[rows]) if rows.numel() > 1 else self.b(x)


class Listed(Branches):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x * x.flatten()[0].item() if float(x.flatten()[0]) > 0 else x)


def state(module: nn.Module) -> Any:
    tensors = {n: (id(t), t.clone(), t.requires_grad) for n, t in module.state_dict(keep_vars=True).items()}
    parts = [(id(m), m.training, sorted(k for k in m.__dict__)) for m in module.modules()]
    return tensors, parts


def same(before: Any, after: Any) -> bool:
    tensors = all(
        a[::2] == b[::2] and torch.equal(a[1], b[1]) for a, b in zip(before[0].values(), after[0].values(), strict=True)
    )
    return tensors and before[1] == after[1]


@pytest.mark.parametrize("network", [Branches, Found, Listed])
def test_control_flow_that_depends_on_values_is_named_with_its_line(network):
    module = network().train()
    before = state(module)
    with pytest.raises(
        UnsupportedModelError, match=rf"^{network.__name__} can't be exported at .*test_bad_input\.py:\d+: "
    ) as refusal:
        trace(module, (torch.randn(3, 4),))
    assert "\n" not in str(refusal.value)
    assert same(before, state(module))


class Box:
    def __init__(self, x: Tensor) -> None:
        self.x = x


class Boxed(Branches):
    def forward(self, x: Tensor) -> Any:
        return Box(self.a(x))


# "meta" stands for a device that isn't the processor
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_runs_where_the_module_is_is_not_said_not_to(device):
    with pytest.raises(UnsupportedModelError, match=r"^Boxed can't be exported: Found .*Box'> in output.*[^.]$"):
        trace(Boxed().to(device), (torch.randn(3, 4, device=device),))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ((torch.zeros(2, 5, 8, 8),), r"expected input\[2, 5, 8, 8\] to have 3 channels"),
        ((torch.zeros(2, 3),), "Expected 3D .* or 4D"),
        ((torch.zeros(2, 3, 2, 2),), "[Kk]ernel size"),
        ((), "missing 1 required positional argument: 'x'"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(1)), "takes 2 positional arguments but 3 were given"),
        ((torch.zeros(2, 3, 8, 8, dtype=torch.float64),), "should be the same"),
        ((None,), "invalid combination of arguments - got .NoneType"),
    ],
    ids=["channels", "dimensions", "too small", "none", "too many", "type", "no tensor"],
)
def test_inputs_that_do_not_fit(inputs, says):
    module = Plain()
    before = state(module)
    with pytest.raises(UsageError, match=rf"^Plain doesn't run on the example inputs.*{says}") as refusal:
        trace(module, inputs)
    assert "\n" not in str(refusal.value)
    assert same(before, state(module))


class Cached(nn.Module):
    """What was seen before may be nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return self.b(torch.cat([self.a(x), past.flatten(2)], 1))


def test_an_empty_batch():
    with pytest.raises(UsageError, match=r"^the example inputs hold no entries, as with an empty batch: give a batch"):
        module_anatomy(Plain(), Example((torch.zeros(0, 3, 8, 8),)))


def test_a_tensor_without_entries_keeps_its_sizes():
    module, inputs = randomised(Cached()), (*images(2, 3, 4), torch.zeros(2, 0, 2, 3, dtype=torch.float64))
    anatomy = module_anatomy(module, Example(inputs))
    assert anatomy.groups == ()
    assert any("it reshapes a tensor without entries" in f.reason for f in anatomy.frozen)


def test_a_failing_network_says_where():
    class Failing(Plain):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no room at the inn")

    with pytest.raises(UsageError, match=r"at .*test_bad_input\.py:\d+: no room at the inn"):
        trace(Failing(), images(2, 3, 8, 8))


# -- operators that nobody knows --------------------------------------------------------------------------------------


@pytest.fixture
def scaled() -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """``secateur_tests::scaled(x, scale)``, an operator of somebody's own."""
    library = torch.library.Library("secateur_tests", "FRAGMENT")
    library.define("scaled(Tensor x, Tensor scale) -> Tensor")
    library.impl("scaled", lambda x, scale: x * scale, "CompositeExplicitAutograd")
    library.impl("scaled", lambda x, scale: torch.empty_like(x), "Meta")
    yield torch.ops.secateur_tests.scaled
    library._destroy()


class Custom(nn.Module):
    def __init__(self, operator: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.operator = operator
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.operator(torch.relu(self.a(x)), self.scale)
        return self.c(torch.relu(self.b(x)))


def test_an_unknown_operator_keeps_what_it_touches_and_is_listed_with_its_line(scaled):
    module, inputs = randomised(Custom(scaled)), images(2, 4)
    before = state(module)
    found = pruned(module, inputs)
    (places,) = found.trace.unknown.values()
    assert list(found.trace.unknown) == ["secateur_tests::scaled"]
    assert len(places) == 1 and "test_bad_input.py:" in places[0]
    assert {g.name: g.units for g in found.anatomy.groups} == {"b": 8}
    reasons = {f.name: f.reason for f in found.anatomy.frozen}
    for name in ("a.weight dim 0", "a.bias dim 0", "scale dim 0", "b.weight dim 1"):
        assert "secateur_tests::scaled" in reasons[name] and "it has no rule" in reasons[name]
    check(found)
    assert same(before, state(module))


def test_a_rule_of_ones_own_frees_what_its_operator_touches(scaled, monkeypatch):
    monkeypatch.setattr("secateur.structure.trace.RULES", RULES.copy())

    @rule("secateur_tests::scaled")
    def together(trace: Trace, call: Call) -> Value:
        x = call["x"]
        trace.units.join(x.dims[-1], call["scale"].dims[0])
        return x

    found = pruned(randomised(Custom(scaled)), images(2, 4))
    assert found.trace.unknown == {}
    first, second = sorted(found.anatomy.groups, key=lambda g: g.units)
    assert {(s.tensor, s.dim) for s in first.slices} == {("scale", 0), ("a.weight", 0), ("a.bias", 0), ("b.weight", 1)}
    assert (first.units, second.name, second.units) == (6, "b", 8)
    check(found)


class Summing(Custom):
    def forward(self, x: Tensor) -> Tensor:
        return self.operator(self.a(x), self.scale).sum(dim=-1)


@pytest.mark.parametrize("zeros", ["lost", "pointwise", Zeros.KEPT])
def test_a_rule_of_ones_own_says_what_its_operator_makes_of_zeros(scaled, monkeypatch, zeros):
    monkeypatch.setattr("secateur.structure.trace.RULES", RULES.copy())

    @rule("secateur_tests::scaled", zeros=zeros)
    def together(trace: Trace, call: Call) -> Value:
        trace.units.join(call["x"].dims[-1], call["scale"].dims[0])
        return call["x"]

    (group,) = anatomy_of(randomised(Summing(scaled)), images(2, 4)).groups
    assert bool(group.inexact) is (zeros == "lost")


def test_what_an_operator_makes_of_zeros_is_one_of_a_list():
    with pytest.raises(UsageError, match=r"zeros is 'point-wise', not one of lost, pointwise, kept, .*centred"):
        rule("my::op", zeros="point-wise")


@pytest.mark.parametrize("answer", ["wrong shape", "no rule"])
def test_a_rule_that_does_not_fit_keeps_what_it_touches(scaled, monkeypatch, answer):
    monkeypatch.setattr("secateur.structure.trace.RULES", RULES.copy())

    @rule("secateur_tests::scaled")
    def wrong(trace: Trace, call: Call) -> Value:
        if answer == "no rule":
            raise NoRule("it is too clever")
        return call["scale"]

    anatomy = anatomy_of(randomised(Custom(scaled)), images(2, 4))
    assert {g.name: g.units for g in anatomy.groups} == {"b": 8}
    says = "its rule doesn't fit this call" if answer == "wrong shape" else "it is too clever"
    assert any(says in f.reason for f in anatomy.frozen)


def test_a_rule_that_breaks_names_itself_not_us(scaled, monkeypatch):
    monkeypatch.setattr("secateur.structure.trace.RULES", RULES.copy())

    @rule("secateur_tests::scaled")
    def broken(trace: Trace, call: Call) -> Value:
        return call["nothing of this name"]

    with pytest.raises(KeyError, match="nothing of this name"):
        trace(randomised(Custom(scaled)), images(2, 4))


def test_an_operator_has_one_rule():
    before = RULES.copy()
    with pytest.raises(UsageError, match=r"operator aten::view has a rule already"):
        rule("aten::view")(lambda trace, call: call["self"])
    assert before == RULES


# -- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"heads": "outside"}, "heads must be one of outer, inner, both, got 'outside'"),
        ({"ignore": ["fc2"]}, "ignore='fc2' matches no parameter of Plain"),
        ({"ignore": ["conv", "*.wait"]}, r"ignore='\*\.wait' matches no parameter of Plain"),
    ],
    ids=["heads", "ignore", "second pattern"],
)
def test_requests_that_mean_nothing(options, says):
    module = Plain()
    before = state(module)
    with pytest.raises(UsageError, match=f"^{says}$"):
        traced_anatomy(trace(module, (torch.zeros(2, 3, 8, 8),)), **options)
    assert same(before, state(module))


@pytest.mark.parametrize("pattern", ["conv", "conv.weight", "c*", "conv.*"])
def test_ignored_modules_stay_and_say_so(pattern):
    anatomy = anatomy_of(Plain(), (torch.zeros(2, 3, 8, 8),), ignore=[pattern])
    assert anatomy.groups == ()
    assert {f.reason for f in anatomy.frozen if f.name == "conv.weight dim 0"} == {f"ignored by {pattern!r}"}


def test_a_network_without_parameters_has_nothing_to_cut():
    anatomy = anatomy_of(nn.Sequential(nn.ReLU(), nn.Flatten()), images(2, 3, 4))
    assert anatomy.groups == () and anatomy.total.params == 0


class Counting(Branches):
    """Changes a buffer whenever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.calls.add_(1)
        return self.b(x * self.calls)


def test_a_network_that_changes_its_buffers_is_not_changed_by_being_looked_at():
    module, inputs = randomised(Counting()), images(2, 4)
    before = state(module)
    dense, found = pruned(module, inputs, {}), pruned(module, inputs, {"a": [1, 4]})
    for one in (dense, found):
        Reference(one.trace, one.units).run(*inputs)
        with torch.no_grad():
            one.graph(*inputs)
    assert same(before, state(module))
    # the cut one counts on by itself
    assert found.graph.calls.tolist() == [1] * 4


class Moving(Branches):
    """Looks channels up by a buffer that it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([5, 4, 3, 2, 1, 0]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).index_select(1, self.order)
        self.order.copy_(self.order.flip(0))
        return self.b(x)


def test_an_index_that_changes_is_no_constant():
    anatomy = anatomy_of(Moving(), (torch.randn(2, 4),))
    assert anatomy.groups == ()


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)

    def forward(self, ids: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> dict[str, Any]:
        x = self.embed(ids) * scale
        if mask is not None:
            x = x * mask[..., None]
        return {"logits": self.head(F.gelu(x)), "hidden": [x.sum(-1)], "nothing": None}


def test_keyword_inputs_and_nested_outputs():
    module, (ids,) = randomised(Embedded()), tokens(2, 5, below=9)
    mask = torch.ones(2, 5, dtype=torch.float64)
    anatomy = traced_anatomy(trace(module, (ids,), {"mask": mask, "scale": 0.5}))
    assert {g.units for g in anatomy.groups} == {6}
