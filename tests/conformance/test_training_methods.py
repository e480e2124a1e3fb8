"""What every method that prunes while a network is trained, or before, must do."""

from __future__ import annotations

import copy

import pytest
import torch

import secateur as sc
from secateur.errors import UsageError
from secateur.methods import DynamicMethod, TrainingMethod, get_method, list_methods, make_method
from sparse_training import STEPS, network, same, sgd, sparsifier, train

METHODS = [m for m in list_methods() if issubclass(get_method(m), TrainingMethod)]


def weights(module, pruned):
    return {name: module.get_parameter(name) for name in pruned.masks}


@pytest.mark.parametrize("method", METHODS)
def test_the_sparsity_follows_the_schedule_and_what_is_dead_stays_zero(method):
    module = network()
    optimizer = sgd(module)
    pruned = sparsifier(module, optimizer, method, sparsity=0.8)
    total, counts = sum(w.numel() for w in weights(module, pruned).values()), []

    def check(step):
        live = sum(int(mask.sum()) for mask in pruned.masks.values())
        # never more than is asked for; layers are rounded up one by one
        assert live >= total * (1 - pruned.target) - 1e-6
        counts.append(live)
        for name, weight in weights(module, pruned).items():
            dead = ~pruned.masks[name]
            assert not weight[dead].any() and not optimizer.state[weight]["momentum_buffer"][dead].any()

    train(module, optimizer, pruned, seen=check)
    assert pruned.sparsity == pytest.approx(0.8, abs=3 / total)
    if issubclass(get_method(method), DynamicMethod):
        assert len(set(counts)) == 1 and sum(u.exchanged for u in pruned.log) > 0
    if get_method(method).descriptor.when == "before_training":
        assert pruned.log == [] and len(set(counts)) == 1
    assert "1.weight" not in pruned.masks and set(pruned.masks) == {"0.weight", "4.weight", "6.weight"}


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_training_is_the_uninterrupted_one(method, tmp_path):
    whole, parts = network(), network()
    optimizer, again = sgd(whole), sgd(parts)
    pruned = sparsifier(whole, optimizer, method, sparsity=0.8)
    train(whole, optimizer, pruned)
    first = sparsifier(parts, again, method, sparsity=0.8)
    train(parts, again, first, last=5)
    state = {"model": parts.state_dict(), "optimizer": again.state_dict(), "masks": first.state_dict()}
    torch.save(state, tmp_path / "c")
    # another network, in a process that has drawn other numbers
    torch.rand(7)
    for early in (True, False):
        kept = torch.load(tmp_path / "c", weights_only=True)
        other = network(seed=1)
        other_optimizer = sgd(other)
        second = sparsifier(other, other_optimizer, method, sparsity=0.8) if early else None
        other.load_state_dict(kept["model"])
        other_optimizer.load_state_dict(kept["optimizer"])
        if second is None:
            second = sparsifier(other, other_optimizer, method, sparsity=0.8, data=None, resume=kept["masks"])
        else:
            second.load_state_dict(kept["masks"])
        train(other, other_optimizer, second, first=6)
        assert same(whole, other) and second.log == pruned.log
        assert all(torch.equal(mask, second.masks[name]) for name, mask in pruned.masks.items())


@pytest.mark.parametrize("method", METHODS)
def test_sparsity_zero_is_the_dense_training(method):
    dense, sparse = network(), network()
    optimizer, other = sgd(dense), sgd(sparse)
    pruned = sparsifier(sparse, other, method, sparsity=0.0)
    train(dense, optimizer, None)
    train(sparse, other, pruned)
    assert pruned.sparsity == 0
    # one that takes steps back is another training, and must say so
    assert same(dense, sparse) != make_method(method).skips


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_gives_the_same_zeros(method, tmp_path):
    module = network()
    optimizer = sgd(module)
    pruned = sparsifier(module, optimizer, method, sparsity=0.8)
    train(module, optimizer, pruned, last=STEPS // 2)
    plan = pruned.finish()
    loaded = sc.Plan.load(plan.save(tmp_path / "plan"))
    assert loaded.method == method and not plan.diff(loaded)
    assert same(sc.apply(loaded, module), module)
    dense = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.fill_(1.0)
    cut = sc.apply(loaded, dense)
    assert all(torch.equal(cut.get_parameter(n) != 0, mask) for n, mask in pruned.masks.items())
    # whatever is trained afterwards is trained as it is
    train(module, optimizer, None, last=1)
    assert module[4].weight.count_nonzero() > int(pruned.masks["4.weight"].sum())


@pytest.mark.parametrize("method", METHODS)
def test_the_commands_for_trained_models_refuse_and_say_what_to_do(method, cli):
    for command in ("prune", "estimate"):
        run = cli(command, "smollm2-135m", "--method", method, *(("--out", "nowhere") if command == "prune" else ()))
        assert run.code == 2 and run.out == ""
        assert f"{method} prunes while a network is trained" in run.err and "secateur.Sparsifier(model, opt" in run.err
    with pytest.raises(UsageError, match=r"secateur\.Sparsifier"):
        sc.prune(network(), example_inputs=(torch.zeros(1, 1, 8, 8),), method=method)


@pytest.mark.parametrize("method", ["synflow", "wanda"])
def test_other_methods_are_refused_with_those_that_will_do(method):
    module = network()
    with pytest.raises(UsageError, match=f"{method} doesn't prune while a network is trained: .* erk_random, gmp"):
        sc.Sparsifier(module, sgd(module), method=method)
