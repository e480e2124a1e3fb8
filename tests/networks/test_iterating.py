"""Pruning in steps with training in between."""

import pytest
import torch
from torch import nn

import secateur as sc
from channel_networks import Residual
from secateur.errors import NonFiniteError, UsageError

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def widths(module):
    return [tuple(p.shape) for p in module.parameters()]


def train(module, step):
    torch.manual_seed(step)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        module(torch.randn(4, 3, 12, 12)).square().mean().backward()
        optimizer.step()


def pruned(module, **options):
    return sc.prune(module, example_inputs=(X,), method="spa_l1", budget="params", **options)


def test_every_step_trains_what_is_left():
    seen = []

    def counted(module, step):
        seen.append((step, sum(p.numel() for p in module.parameters())))
        train(module, step)

    module = Residual().eval()
    before = {name: p.clone() for name, p in module.named_parameters()}
    result = pruned(module, sparsity=0.5, steps=3, train_fn=counted)
    assert [step for step, _ in seen] == [1, 2, 3]
    whole = sum(p.numel() for p in module.parameters())
    # equal shares of what is left: 0.5^(1/3), 0.5^(2/3), 0.5
    for (_, count), share in zip(seen, (0.794, 0.63, 0.5), strict=True):
        assert count / whole == pytest.approx(share, abs=0.03)
    assert result.report.achieved == pytest.approx(0.5, abs=0.03)
    assert isinstance(result.model, Residual)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_the_plan_gives_the_same_widths_in_the_dense_network(tmp_path):
    module = Residual().eval()
    result = pruned(module, sparsity=0.5, steps=2, train_fn=train)
    assert widths(sc.apply(result.plan, module)) == widths(result.model)
    assert result.plan.provenance[0].options["steps"] == 2
    assert result.plan.provenance[0].options["sparsity"] == 0.5
    assert any("trained" in note for note in result.plan.provenance[0].notes)
    # and the saved weights are the trained ones
    sc.save(result.model, None, tmp_path / "small", plan=result.plan, report=result.report)
    from safetensors.torch import load_model

    again = sc.apply(sc.Plan.load(tmp_path / "small" / "plan"), module)
    load_model(again, str(tmp_path / "small" / "model.safetensors"))
    assert torch.equal(again.eval()(X), result.model.eval()(X))


def test_scores_are_taken_from_the_trained_network():
    """Training that turns the order of the channels around changes what the second step removes."""

    def turned(module, step):
        with torch.no_grad():
            for norm in (module.bn1,):
                norm.weight.copy_(norm.weight.flip(0) * torch.linspace(0.1, 10, len(norm.weight)))

    options = {"sparsity": 0.4, "steps": 2}
    plain = sc.prune(Residual().eval(), example_inputs=(X,), method="slimming", **options)
    trained = sc.prune(Residual().eval(), example_inputs=(X,), method="slimming", **options, train_fn=turned)
    assert not all(torch.equal(plain.plan.keep[name], trained.plan.keep[name]) for name in plain.plan.keep)


def test_in_place():
    module = Residual().eval()
    result = pruned(module, sparsity=0.4, steps=2, train_fn=train, inplace=True)
    assert result.model is module
    assert widths(module) == widths(sc.apply(result.plan, Residual().eval()))


def test_the_same_steps_give_the_same_plan():
    first, second = (pruned(Residual().eval(), sparsity=0.5, steps=2, train_fn=train).plan for _ in range(2))
    assert all(torch.equal(first.keep[name], second.keep[name]) for name in first.keep)


def spoil(module, step):
    module.head.weight.data[0, 0] = float("inf")


def widen(module, step):
    module.head = nn.Linear(module.head.in_features, 11)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"steps": 0}, UsageError, "steps must be at least 1"),
        ({"steps": 2, "train_fn": 3}, UsageError, "train_fn must be a function"),
        ({"train_fn": spoil}, NonFiniteError, "head.weight holds NaN or inf after the training of step 1"),
        ({"train_fn": widen}, UsageError, "head.weight changed in step 1"),
    ],
)
def test_bad_input_changes_nothing(options, error, said):
    module = Residual().eval()
    before = widths(module)
    with pytest.raises(error, match=said):
        pruned(module, sparsity=0.3, **options)
    assert widths(module) == before


def test_an_onnx_model_has_no_steps(tmp_path):
    result = pruned(Residual().eval(), sparsity=0.0)
    sc.save(result.model, None, tmp_path / "net.onnx", plan=result.plan)
    with pytest.raises(UsageError, match="ONNX model is cut once"):
        sc.prune(tmp_path / "net.onnx", method="spa_l1", sparsity=0.3, steps=2)
