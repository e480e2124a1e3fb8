"""Oracles of lottery tickets, rewinding and SAP: counts by hand, nested masks, what goes back and what doesn't."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from lotteries import STEPS, accuracy, network, same_numbers, train
from secateur.criteria.sparsity import pq_index, retained
from secateur.errors import OptionError
from secateur.methods import Contest, Trained, make_method
from secateur.rounds import Rounds, Run
from secateur.rounds.controls import control_masks
from secateur.rounds.pruning import next_masks
from secateur.train.weights import find_layers
from sparse_training import same


def counts(sizes: dict[str, tuple[int, ...]], levels: int, method: str = "lottery_ticket", **options):
    """Live weights of every layer by level, of random weights that aren't trained."""
    module = nn.Sequential(*(nn.Linear(i, o, bias=False) for o, i in sizes.values()))
    made, layers = make_method(method, options), find_layers(module)
    masks = {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in layers.items()}
    last, found = list(layers)[-1], []
    for level in range(levels + 1):
        found.append({name: int(mask.sum()) for name, mask in masks.items()})
        parts = {
            name: Trained(
                name, layer.weight.detach(), masks[name], step=level, kind="output" if name == last else "linear"
            )
            for name, layer in layers.items()
        }
        after = next_masks(made, layers, parts)
        assert all(not (after[name] & ~masks[name]).any() for name in masks)
        masks = after
    return found


def test_counts_by_level():
    for scope in ("global", "layer"):
        found = counts({"0": (25, 40)}, 5, scope=scope)
        assert [level["0.weight"] for level in found] == [1000, 800, 640, 512, 409, 327]


def test_the_output_of_lenet_loses_half_as_much():
    sizes = {"0": (300, 784), "1": (100, 300), "2": (10, 100)}
    dense, first = counts(sizes, 1, scope="layer", output_rate=0.1)
    assert sum(dense.values()) == 266_200
    assert [first[name] / dense[name] for name in dense] == [0.8, 0.8, 0.9]
    # with all competing, those of one rate compete, and the last layer can be left out
    dense, first = counts(sizes, 1, output_rate=0.0)
    assert first["2.weight"] == 1000 and first["0.weight"] + first["1.weight"] == 0.8 * 265_200


def test_convolutions_have_a_rate_of_their_own():
    kinds = {
        k: make_method("lottery_ticket", {"conv_rate": 0.1}).kind(_part(k)) for k in ("convolution", "linear", "output")
    }
    assert kinds == {"convolution": 0.1, "linear": 0.2, "output": 0.2}
    rounds = Rounds(network, train, scope="layer", conv_rate=0.5, output_rate=0.0, levels=1)
    rounds.level(1)
    assert rounds.entries[1].layers == {"0.weight": 18, "4.weight": 460, "6.weight": 80}


def _part(kind: str) -> Trained:
    return Trained("w", torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), kind=kind)


@pytest.fixture(scope="module")
def tickets() -> Rounds:
    rounds = Rounds(network, train, evaluate=accuracy, levels=3, rate=0.4, keep_weights=True, seed=3)
    rounds.run()
    return rounds


def test_masks_are_nested_and_tickets_hold_their_first_weights(tickets):
    first = tickets.ticket(0).state_dict()
    for level in range(1, 4):
        masks, ticket = tickets.masks(level), tickets.ticket(level).state_dict()
        assert all(not (mask & ~tickets.masks(level - 1)[name]).any() for name, mask in masks.items())
        for name, value in ticket.items():
            # norms, biases and their statistics too
            expected = first[name] * masks[name] if name in masks else first[name]
            assert torch.equal(value, expected)
    assert tickets.trained(0)[1].num_batches_tracked == STEPS


def test_the_smallest_of_what_was_trained_leave(tickets):
    for level in range(3):
        before, after, trained = tickets.masks(level), tickets.masks(level + 1), tickets.trained(level)
        gone = torch.cat([trained.get_parameter(n).abs()[before[n] & ~after[n]] for n in before])
        kept = torch.cat([trained.get_parameter(n).abs()[after[n]] for n in before])
        assert gone.max() <= kept.min() and len(gone) == math.ceil(0.4 * (len(gone) + len(kept)))


def test_what_is_dead_is_zero_when_it_is_evaluated(tickets):
    seen = []

    def look(model):
        seen.append({name: w.detach().clone() for name, w in model.named_parameters()})
        return 0.0

    rounds = Rounds(network, train, evaluate=look, levels=2, rate=0.4)
    rounds.run(("shuffle",))
    assert len(seen) == 5 and rounds.masks(2)["4.weight"].any()
    for level, weights in ((1, seen[1]), (2, seen[3])):
        assert all(not weights[name][~mask].any() for name, mask in rounds.masks(level).items())
        assert all(weights[name][mask].all() for name, mask in rounds.masks(level).items())


def test_without_removals_every_level_is_the_dense_training():
    rounds = Rounds(network, train, evaluate=accuracy, levels=2, rate=0.0, order="same", keep_weights=True)
    dense, *others = rounds.run()
    assert all(entry.metrics == dense.metrics for entry in others) and len(others) == 2
    plain = rounds.ticket(0)
    train(plain, Run())
    assert same(plain, rounds.trained(0)) and same(plain, rounds.trained(2))
    # batches in an order of their own are another training
    fresh = Rounds(network, train, levels=1, rate=0.0).run()
    assert fresh[0].metrics["loss"] == dense.metrics["loss"] != fresh[1].metrics["loss"]


def test_shuffles_keep_numbers_and_change_places(tickets):
    masks = tickets.masks(2)
    layerwise, all_over = control_masks("shuffle", masks, 0), control_masks("shuffle_all", masks, 0)
    even = control_masks("even", masks, 0)
    for name, mask in masks.items():
        assert int(mask.sum()) == int(layerwise[name].sum()) and not torch.equal(mask, layerwise[name])
        assert abs(float(even[name].float().mean()) - tickets.entries[2].remaining) < 1 / 36
    assert sum(int(m.sum()) for m in all_over.values()) == tickets.entries[2].weights
    assert [int(m.sum()) for m in all_over.values()] != [int(m.sum()) for m in masks.values()]
    again, other = control_masks("shuffle", masks, 0), control_masks("shuffle", masks, 1)
    assert all(torch.equal(layerwise[n], again[n]) for n in masks) and not torch.equal(
        other["4.weight"], again["4.weight"]
    )


def test_a_new_draw_has_the_mask_of_the_ticket(tickets):
    ticket, drawn = tickets.ticket(2), tickets.ticket(2, "reinit")
    for name, mask in tickets.masks(2).items():
        weight = drawn.get_parameter(name)
        assert not weight[~mask].any() and not (weight[mask] == ticket.get_parameter(name)[mask]).any()
    assert same(drawn, tickets.ticket(2, "reinit")) and not same(drawn, tickets.ticket(3, "reinit"))


def test_one_shot_levels_come_from_the_dense_network():
    rounds = Rounds(network, train, levels=3, rate=0.4, one_shot=True)
    rounds.run()
    dense = torch.cat([rounds.trained(0).get_parameter(n).abs().reshape(-1) for n in rounds.masks(0)])
    for level in (1, 2, 3):
        mask = torch.cat([m.reshape(-1) for m in rounds.masks(level).values()])
        assert dense[mask].min() >= dense[~mask].max()


# -- rewinding -----------------------------------------------------------------------------------------------------


def test_rewinding_to_the_beginning_is_plain_imp():
    options = {"levels": 2, "rate": 0.4, "evaluate": accuracy}
    plain = Rounds(network, train, **options).run(("reinit", "shuffle"))
    rewound = Rounds(network, train, method="lottery_rewind", start_at="0", **options).run(("reinit", "shuffle"))
    assert same_numbers(plain, rewound)


def test_weights_and_rates_go_back_to_step_k():
    rounds = Rounds(network, train, method="lottery_rewind", start_at="25%", steps=STEPS, levels=2, rate=0.4, seed=1)
    dense, first, second = rounds.run()
    start = Rounds(network, train, method="lottery_ticket", seed=1).ticket(0)
    train(start, Run(seed=1, last_step=2))
    ticket, masks = rounds.ticket(2), rounds.masks(2)
    for name, value in start.state_dict().items():
        assert torch.equal(ticket.state_dict()[name], value * masks[name] if name in masks else value)
    rate = 0.05 * (1 + math.cos(math.pi * 2 / STEPS))
    assert [e.metrics["first_rate"] for e in (dense, first, second)] == pytest.approx([rate] * 3)
    assert dense.steps == first.steps == STEPS - 2


def test_rewinding_to_the_end_is_one_shot_magnitude_pruning():
    rounds = Rounds(
        network, train, evaluate=accuracy, method="lottery_rewind", start_at=str(STEPS), steps=STEPS, levels=2, rate=0.4
    )
    entries = rounds.run()
    dense = Rounds(network, train).ticket(0)
    train(dense, Run())
    assert [entry.steps for entry in entries] == [0, 0, 0] and same(rounds.ticket(0), dense)
    for level in (1, 2):
        sparsity = 1 - entries[level].weights / entries[0].weights
        pruned = sc.Sparsifier(dense, method="gmp", sparsity=sparsity, scope="global", ramp="constant", end=1, every=1)
        pruned.step()
        dense.eval()
        assert accuracy(dense) == {"accuracy": entries[level].metrics["accuracy"]}
        dense.train()


def test_the_learning_rate_alone_can_go_back():
    rounds = Rounds(network, train, method="lottery_rewind", start_at="2", rewind="rate", levels=2, rate=0.4)
    dense, first, second = rounds.run()
    assert (dense.steps, first.steps, second.steps) == (STEPS, STEPS - 2, STEPS - 2)
    for level in (1, 2):
        before, ticket = rounds.trained(level - 1).state_dict(), rounds.ticket(level).state_dict()
        masks = rounds.masks(level)
        assert all(torch.equal(ticket[n], v * masks[n] if n in masks else v) for n, v in before.items())


def test_one_shot_levels_keep_what_the_weights_of_the_dense_network_are():
    options = {"method": "lottery_rewind", "start_at": "2", "rewind": "rate", "levels": 2, "rate": 0.4}
    rounds = Rounds(network, train, one_shot=True, **options)
    rounds.run()
    dense, ticket, masks = rounds.trained(0).state_dict(), rounds.ticket(2).state_dict(), rounds.masks(2)
    assert all(torch.equal(ticket[n], v * masks[n] if n in masks else v) for n, v in dense.items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start_at": "3%"}, "start_at=3% is a part of the training: give its length with steps"),
        ({"start_at": "early"}, "must be a step"),
        ({"start_at": "-1"}, "start_at is step -1"),
        ({"start_at": "500", "steps": 100}, "step 500, but a training has the steps 0 to 100"),
    ],
)
def test_steps_that_no_training_has_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        make_method("lottery_rewind", options)


# -- SAP -----------------------------------------------------------------------------------------------------------


def leaving(values, mask=None, **options) -> int:
    weight = torch.as_tensor(values, dtype=torch.float64).reshape(1, -1)
    live = torch.ones_like(weight, dtype=torch.bool) if mask is None else torch.tensor([mask])
    return int(make_method("sap", options).leaving(Contest("", weight, live)))


def test_sap_by_hand():
    assert leaving([1, 2, 3, 4], p=1.0, q=2.0) == 0
    assert leaving([5, 5, 5, 5]) == 0
    # one weight holds everything: the three others leave
    assert leaving([0, 0, 7, 0]) == 3
    # of dead ones none
    assert leaving([0, 0, 7, 0], mask=[True, False, True, False]) == 1


def test_sap_on_gaussian_weights():
    w = np.random.RandomState(0).randn(1000)
    assert leaving(w) == 154 and leaving(w, p=1.0, q=2.0) == 366
    # no more than beta, whatever gamma
    assert leaving(w, gamma=9.0) == 900 and leaving(w, gamma=9.0, beta=0.5) == 500 and leaving(w, gamma=0.0) == 0
    # eta = 1 leaves a quarter of what must stay
    r = math.ceil(float(retained(pq_index(torch.from_numpy(w)), torch.tensor(1000), 0.5, 1.0)) / 4)
    assert leaving(w, eta=1.0) == 1000 - r


def test_sap_takes_the_whole_number_of_its_formula():
    # of d weights r stay; in floating point d * (1 - r / d) is often less than d - r, such as 4.999... for 55 and 50
    generator = torch.Generator().manual_seed(0)
    lost = 0
    for d in range(2, 65):
        w = torch.randn(d, generator=generator, dtype=torch.float64)
        r = math.ceil(float(retained(pq_index(w), torch.tensor(d), 0.5, 1.0)))
        assert leaving(w) == d - r
        lost += math.floor(d * (1 - r / d)) < d - r
    assert lost > 10


@pytest.mark.parametrize("scope", ["global", "layer", "neuron"])
def test_sap_removes_the_smallest_of_every_scope(scope):
    rounds = Rounds(network, train, method="sap", scope=scope, levels=1, gamma=3.0, keep_weights=True)
    rounds.run()
    trained, masks = rounds.trained(0), rounds.masks(1)
    flat = {n: trained.get_parameter(n).detach().flatten(1) for n in masks}
    units = {
        "global": [torch.cat([w.reshape(-1) for w in flat.values()])],
        "layer": [w.reshape(-1) for w in flat.values()],
        "neuron": [row for w in flat.values() for row in w],
    }[scope]
    kept = {
        "global": [torch.cat([masks[n].reshape(-1) for n in flat])],
        "layer": [masks[n].reshape(-1) for n in flat],
        "neuron": [row for n in flat for row in masks[n].flatten(1)],
    }[scope]
    assert any(int((~mask).sum()) for mask in kept)
    for unit, mask in zip(units, kept, strict=True):
        assert int((~mask).sum()) == leaving(unit, gamma=3.0)
        assert not (~mask).any() or unit.abs()[~mask].max() <= unit.abs()[mask].min()


def test_sap_refuses_orders_that_give_no_index():
    for options in ({"p": 1.0, "q": 1.0}, {"p": 2.0}):
        with pytest.raises(OptionError, match="0 < p < q"):
            make_method("sap", options)
