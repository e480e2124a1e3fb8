"""Masks that change of weights that are sharded over two gloo ranks with FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fsdp_ranks
import secateur as sc
from fsdp_ranks import LAST
from ranks import run_ranks
from sparse_training import STEPS, network, sgd, sparsifier, train

CASES: list[tuple[str, dict[str, Any]]] = [
    ("gmp", {}),
    ("gmp", {"scope": "global", "criterion": "saliency"}),
    ("rigl", {}),
    ("set", {"split_signs": True}),
    ("granet", {"initial": 0.5}),
    ("snfs", {}),
    ("gmp", {"block": "2x2", "exclude": ["0.weight"]}),
    ("gmp", {"scope": "erk"}),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    run_ranks(fsdp_ranks.job, 2, CASES, folder)
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: "-".join([CASES[n][0], *CASES[n][1]]))
def test_masks_are_those_of_one_process(number, trained):
    method, options = CASES[number]
    one, two = (torch.load(trained / f"{number}-{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = network().eval()
    optimizer = sgd(alone)
    pruned = sparsifier(alone, optimizer, method, sparsity=0.8, **options)
    masks: list[dict[str, torch.Tensor]] = []
    train(alone, optimizer, pruned, seen=lambda step: masks.append(pruned.masks))
    assert len(one["masks"]) == len(masks) == STEPS and one["log"] == [update.sparsity for update in pruned.log]
    assert any(not torch.equal(first, masks[-1][name]) for name, first in masks[0].items())
    for mine, theirs, here in zip(one["masks"], two["masks"], masks, strict=True):
        assert all(torch.equal(mask, theirs[name]) for name, mask in mine.items())
        # up to ties: the mean of two halves is rounded in another order than the whole
        assert sum(int((mask != here[name]).sum()) for name, mask in mine.items()) <= 4
    plan = sc.Plan.load(trained / f"{number}-plan")
    assert plan.model.architecture == "Sequential" and plan.model.shapes == pruned.finish().model.shapes
    # it lays the same masks on a network that isn't sharded
    laid = sc.apply(plan, network())
    assert all(not laid.get_parameter(name)[~mask].any() for name, mask in one["masks"][-1].items())


@pytest.mark.parametrize("number", [0, 5], ids=["gmp", "snfs"])
def test_one_process_goes_on_with_what_two_ranks_saved(number, trained):
    method, options = CASES[number]
    step = torch.load(trained / f"{number}-step.pt", weights_only=True)
    alone = network(seed=1).eval()
    optimizer = sgd(alone)
    with torch.no_grad():
        for name, weight in alone.named_parameters():
            weight.copy_(step["weights"][name])
            optimizer.state[weight]["momentum_buffer"] = step["momenta"][name].clone()
    state = trained / f"{number}-state.safetensors"
    pruned = sparsifier(alone, optimizer, method, sparsity=0.8, resume=state, **options)
    assert pruned.steps_done == LAST
    train(alone, optimizer, pruned, first=LAST + 1)
    together = torch.load(trained / f"{number}-0.pt", weights_only=True)["masks"][-1]
    assert sum(int((mask != together[name]).sum()) for name, mask in pruned.masks.items()) <= 4
