"""The optimizer of a module that is cut in place goes on as that of a module which was masked."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from channel_networks import Residual
from secateur.errors import UsageError

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01),
    "plain": lambda p: torch.optim.SGD(p, lr=0.05),
}


def step(module, optimizer):
    optimizer.zero_grad()
    module(X).square().mean().backward()
    optimizer.step()


def trained(kind):
    module = Residual().eval()
    optimizer = OPTIMIZERS[kind](module.parameters())
    step(module, optimizer)
    step(module, optimizer)
    return module, optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_with_what_the_optimizer_knows(kind):
    module, optimizer = trained(kind)
    plan = sc.plan(module, example_inputs=(X,), method="spa_l1", sparsity=0.4)
    cut = sc.apply(plan, module)
    dense_state = copy.deepcopy(optimizer.state_dict())["state"]
    assert sc.apply(plan, module, inplace=True, optimizer=optimizer) is module
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(held, module.parameters(), strict=True))
    # the same slices of the state as of the parameters
    for parameter, expected in zip(held, cut.parameters(), strict=True):
        assert torch.equal(parameter, expected)
        for value in optimizer.state[parameter].values():
            assert not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape == parameter.shape
    norms = [v.norm() for s in dense_state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.dim()]
    assert bool(norms) == (kind != "plain")
    before = [p.clone() for p in held]
    step(module, optimizer)
    assert all(not torch.equal(a, b) for a, b in zip(before, held, strict=True))


def test_momentum_of_what_stays_is_the_same_numbers():
    module, optimizer = trained("sgd")
    weight = module.conv1.weight
    momentum = optimizer.state[weight]["momentum_buffer"].clone()
    plan = sc.plan(module, example_inputs=(X,), method="spa_l1", sparsity=0.4)
    sc.apply(plan, module, inplace=True, optimizer=optimizer)
    expected = momentum[plan.keep["conv1"]][:, plan.keep["stem.0"]]
    assert torch.equal(optimizer.state[module.conv1.weight]["momentum_buffer"], expected)
    assert weight not in optimizer.state


def test_layers_that_start_anew_are_forgotten():
    module, optimizer = trained("adam")
    sc.prune(module, example_inputs=(X,), method="precrop", sparsity=0.4, inplace=True, optimizer=optimizer)
    assert module.conv1.weight not in optimizer.state
    step(module, optimizer)


def test_one_optimizer_through_all_steps():
    module, optimizer = trained("adam")
    result = sc.prune(
        module,
        example_inputs=(X,),
        method="spa_l1",
        sparsity=0.5,
        steps=2,
        inplace=True,
        optimizer=optimizer,
        train_fn=lambda module, number: step(module, optimizer),
    )
    assert result.model is module and int(optimizer.state[module.conv1.weight]["step"]) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "goes with inplace=True"),
        ({"inplace": True, "optimizer": "adam"}, "must be a torch.optim.Optimizer"),
        ({"inplace": True, "optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())}, "none of the module's"),
    ],
)
def test_what_cannot_follow_is_refused(options, said):
    module, optimizer = trained("plain")
    shapes = [p.shape for p in module.parameters()]
    with pytest.raises(UsageError, match=said):
        sc.prune(module, example_inputs=(X,), method="spa_l1", sparsity=0.4, **{"optimizer": optimizer, **options})
    assert [p.shape for p in module.parameters()] == shapes
