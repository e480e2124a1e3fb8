"""What every method that trains in rounds must do."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import secateur as sc
from lotteries import STEPS, accuracy, network, same_numbers, train
from secateur.errors import UsageError
from secateur.methods import RoundsMethod, get_method, list_methods
from secateur.rounds import Rounds, rounds_methods

METHODS = [m for m in list_methods() if issubclass(get_method(m), RoundsMethod)]
QUICK = {"lottery_rewind": {"start_at": "2", "steps": STEPS}, "sap": {"gamma": 2.0}}


def test_all_are_found():
    assert rounds_methods() == METHODS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["global", "layer", "neuron"])
def test_levels_are_nested_dead_weights_zero_and_nothing_depends_on_what_was_drawn_before(method, scope):
    options = {"method": method, "scope": scope, "levels": 2, "evaluate": accuracy, **QUICK.get(method, {})}
    rounds = Rounds(network, train, **options)
    entries = rounds.run(["shuffle"])
    assert [e.level for e in entries if e.branch == "ticket"] == [0, 1, 2]
    assert entries[0].sparsity == 0 and all(0 <= e.pq_index < 1 for e in entries)
    masks = [rounds.masks(level) for level in range(3)]
    for less, more in pairwise(masks):
        assert all(not (more[name] & ~less[name]).any() for name in more)
        assert sum(int(m.sum()) for m in more.values()) < sum(int(m.sum()) for m in less.values())
    assert all(not rounds.trained(2).get_parameter(n)[~mask].any() for n, mask in masks[2].items())
    torch.rand(3)
    assert same_numbers(Rounds(network, train, **options).run(["shuffle"]), entries)


@pytest.mark.parametrize("method", METHODS)
def test_commands_and_functions_for_others_refuse_and_say_what_to_do(method, cli):
    for command in ("prune", "estimate"):
        run = cli(command, "smollm2-135m", "--method", method, *(("--out", "nowhere") if command == "prune" else ()))
        assert run.code == 2 and run.out == ""
        assert f"{method} trains a network many times" in run.err and "secateur.lottery(network, train" in run.err
    with pytest.raises(UsageError, match=r"secateur\.lottery"):
        sc.prune(network(), example_inputs=(torch.zeros(1, 1, 8, 8),), method=method)
    with pytest.raises(UsageError, match=f"{method} doesn't prune while a network is trained"):
        sc.Sparsifier(network(), method=method)
