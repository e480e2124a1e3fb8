"""The engine of rounds: what is kept, going on, what a training function may do, and what is said when it doesn't."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from lotteries import STEPS, accuracy, network, same_numbers, train
from secateur.errors import CorruptFileError, OutputError, UsageError
from secateur.rounds import Rounds, Run
from sparse_training import batch, same

OPTIONS = {"evaluate": accuracy, "levels": 3, "rate": 0.4}
CONTROLS = ("reinit", "shuffle")


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    "options", [{}, {"one_shot": True}, {"method": "lottery_rewind", "start_at": "2", "rewind": "rate"}]
)
def test_a_lottery_that_is_killed_goes_on_to_the_same_bytes(tmp_path, options):
    options = OPTIONS | options
    whole = Rounds(network, train, folder=tmp_path / "whole", **options)
    whole.run(CONTROLS)
    calls = 0

    def dies(model, run):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return train(model, run)

    with pytest.raises(KeyboardInterrupt):
        Rounds(network, dies, folder=tmp_path / "parts", **options).run(CONTROLS)
    torch.rand(5)
    again = Rounds(network, dies, folder=tmp_path / "parts", resume=True, **options)
    assert len(again.entries) == 3
    assert same_numbers(again.run(CONTROLS), whole.entries) and calls == 11
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    # nothing is trained twice, and more levels may follow
    Rounds(network, None, folder=tmp_path / "parts", resume=True, **options).run(CONTROLS)
    more = Rounds(network, train, folder=tmp_path / "parts", resume=True, **options | {"levels": 4})
    assert [e.level for e in more.run()][-1] == 4


def test_controls_run_in_any_order_and_process(tmp_path):
    whole = Rounds(network, train, folder=tmp_path / "whole", **OPTIONS)
    whole.run(CONTROLS, at=[2])
    other = Rounds(network, train, folder=tmp_path / "other", **OPTIONS)
    other.level(3)
    apart = Rounds(network, train, folder=tmp_path / "other", resume=True, **OPTIONS)
    assert apart.control(2, "shuffle") == whole.control(2, "shuffle")
    assert apart.control(2, "reinit") == whole.control(2, "reinit") and same_numbers(other.entries, whole.entries)


def test_of_trained_networks_the_last_is_kept(tmp_path):
    rounds = Rounds(network, train, folder=tmp_path / "tickets", **OPTIONS)
    rounds.run()
    assert accuracy(rounds.trained(3).eval()) == {"accuracy": rounds.entries[3].metrics["accuracy"]}
    with pytest.raises(UsageError, match="level 1 wasn't kept: keep_weights=True"):
        rounds.trained(1)
    # masks take a bit per weight
    assert (tmp_path / "tickets/level-01/masks.safetensors").stat().st_size < 400


def test_the_plan_lays_the_mask_on_any_copy(tmp_path):
    rounds = Rounds(network, train, **OPTIONS)
    rounds.run()
    plan = sc.Plan.load(rounds.plan(2).save(tmp_path / "plan"))
    assert plan.method == "lottery_ticket" and same(sc.apply(plan, rounds.ticket(0)), rounds.ticket(2))


def test_several_seeds_give_means_and_spreads(tmp_path):
    found = sc.lottery(network, train, seeds=(0, 1), controls=["reinit"], at=[2], folder=tmp_path / "x", **OPTIONS)
    rows = found.rows("loss")
    assert [(r.level, r.branch) for r in rows] == [
        (0, "ticket"),
        (1, "ticket"),
        (2, "ticket"),
        (2, "reinit"),
        (3, "ticket"),
    ]
    losses = [e.metrics["loss"] for e in found.entries if e.level == 1]
    assert (
        rows[1].mean == pytest.approx(sum(losses) / 2)
        and rows[1].spread > 0
        and rows[1].remaining == pytest.approx(0.6, abs=1e-3)
    )
    assert not same(found.rounds[0].ticket(0), found.rounds[1].ticket(0))
    with pytest.raises(UsageError, match="no training gave 'acc'; there are accuracy, first_rate, loss"):
        found.rows("acc")
    with pytest.raises(UsageError, match="seeds must be different"):
        sc.lottery(network, train, seeds=(1, 1))


def test_a_network_in_place_of_a_function_begins_as_it_is():
    module = network()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    rounds = Rounds(module, train, **OPTIONS)
    rounds.run(["shuffle"])
    assert same(rounds.ticket(0), module) and all(torch.equal(before[n], t) for n, t in module.state_dict().items())
    with pytest.raises(UsageError, match="give a function that makes the network"):
        rounds.run(["reinit"])


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x).relu())

    def fit(model, run):
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()

    rounds = Rounds(Tied, fit, levels=2)
    assert [entry.weights for entry in rounds.run()] == [256, 204, 163]
    assert rounds.trained(2).two.weight is rounds.trained(2).one.weight or list(rounds.masks(2)) == ["one.weight"]


def test_dead_weights_hold_under_any_optimizer_and_wrapper():
    def fit(model, run):
        compiled = torch.optim.swa_utils.AveragedModel(model)
        for optimizer in (torch.optim.Adam(model.parameters()), torch.optim.RMSprop(model.parameters(), momentum=0.9)):
            for step in range(2):
                F.cross_entropy(compiled.module(batch(step)[0]) + model(batch(step)[0]), batch(step)[1]).backward()
                optimizer.step()
                for name, mask in run.masks.items():
                    weight = model.get_parameter(name)
                    assert not weight[~mask].any()
                    states = [s for s in optimizer.state[weight].values() if s.shape == weight.shape]
                    assert states and all(not s[~mask].any() for s in states)

    entries = Rounds(network, fit, levels=2, rate=0.5).run()
    assert [entry.steps for entry in entries] == [2, 2, 2]


def test_dead_weights_are_zero_whatever_their_gradients_were():
    def fit(model, run):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
        for name, mask in run.masks.items():
            model.get_parameter(name).grad[~mask] = float("inf")
        optimizer.step()
        for name, mask in run.masks.items():
            model.get_parameter(name).data[~mask] += float("nan")
        run.hold()

    rounds = Rounds(network, fit, levels=2, rate=0.5)
    rounds.run()
    assert all(bool(t.isfinite().all()) for t in rounds.trained(2).parameters())


def test_what_a_training_draws_is_its_own():
    def fit(model, run):
        train(model, run)
        return {"drawn": float(torch.rand(())), "seed": run.seed}

    torch.manual_seed(5)
    after = torch.rand(3)
    torch.manual_seed(5)
    first = Rounds(network, fit, levels=1).run()
    assert torch.equal(torch.rand(3), after)
    torch.rand(9)
    assert same_numbers(first, Rounds(network, fit, levels=1).run())


@pytest.mark.parametrize(
    ("fit", "options", "words"),
    [
        (lambda m, run: [None, m[4].weight.data[:8].fill_(0.01)][0], {}, "moved weights of 4.weight that were"),
        (lambda m, run: train(m, Run()), {"start_at": "2", "steps": STEPS}, "took 8 steps where it was asked"),
        (lambda m, run: None, {"start_at": "2"}, "took no step of an optimizer on its way to step 2"),
        (train, {"start_at": "9"}, "step 9 is gone back to, but the training has 8 steps"),
        (lambda m, run: "good", {}, "gives numbers by name, got 'good'"),
    ],
)  # fmt: skip
def test_a_training_that_does_something_else_is_told_so(fit, options, words):
    method = "lottery_rewind" if options else "lottery_ticket"
    with pytest.raises(UsageError, match=words):
        Rounds(network, fit, method=method, levels=1, rate=0.9, **options).run()


def test_a_training_without_an_optimizer_can_hold_masks_itself():
    def fit(model, run):
        model[4].weight.data.add_(0.1)
        run.hold()

    rounds = Rounds(network, fit, levels=1)
    rounds.run()
    assert not rounds.trained(1)[4].weight[~rounds.masks(1)["4.weight"]].any()


def test_a_start_that_ignores_where_to_stop():
    def fit(model, run):
        return train(model, Run(seed=run.seed, first_step=run.first_step))

    with pytest.raises(UsageError, match="asked for those from 0 to 2"):
        Rounds(network, fit, method="lottery_rewind", start_at="2", levels=1).run()


def test_folders_of_other_lotteries_are_refused(tmp_path):
    place = tmp_path / "tickets"
    Rounds(network, train, folder=place, **OPTIONS).level(1)
    with pytest.raises(OutputError, match="exists and is not empty"):
        Rounds(network, train, folder=place, **OPTIONS)
    for changed, words in (
        ({"rate": 0.3}, "was begun with rate=0.4, and rate=0.3"),
        ({"seed": 1}, "another seed"),
        ({"method": "sap", "rate": None}, "another method"),
        ({"exclude": ["0.weight"]}, "another weights"),
    ):
        options = {k: v for k, v in (OPTIONS | changed).items() if v is not None}
        with pytest.raises(UsageError, match=words):
            Rounds(network, train, folder=place, resume=True, **options)
    (place / "level-01/ticket.json").write_text(json.dumps({"level": 1}), encoding="utf8")
    with pytest.raises(CorruptFileError, match="isn't what a lottery writes"):
        _ = Rounds(network, train, folder=place, resume=True, **OPTIONS).entries
    shutil.rmtree(place / "level-01")
    (place / "start.safetensors").write_bytes(b"nothing")
    with pytest.raises(CorruptFileError, match=r"start\.safetensors is damaged"):
        Rounds(network, train, folder=place, resume=True, **OPTIONS).ticket(0)


def test_what_is_asked_wrongly_is_refused():
    with pytest.raises(
        UsageError, match="gmp doesn't train in rounds: take one of lottery_rewind, lottery_ticket, sap"
    ):
        Rounds(network, train, method="gmp")
    with pytest.raises(UsageError, match="did you mean 'shuffle'"):
        Rounds(network, train).control(1, "shufle")
    with pytest.raises(UsageError, match=r"levels 0 \(dense\) to 3, got 4"):
        Rounds(network, train, levels=3).level(4)
    with pytest.raises(UsageError, match="which is no torch module"):
        Rounds(lambda: 3, train)
    with pytest.raises(UsageError, match="network must be a module"):
        Rounds("net", train)


@pytest.mark.parametrize("scope", ["global", "layer", "neuron"])
def test_a_floor_holds_where_it_is_more_than_what_stays(scope):
    def tiny():
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))

    rounds = Rounds(tiny, lambda *_: None, levels=3, rate=0.4, scope=scope, floor=0.5)
    for entry in rounds.run():
        assert entry.layers["0.weight"] >= 32 and entry.layers["1.weight"] >= 16
    # nothing stays beyond it where nobody competes
    assert scope != "layer" or entry.layers == {"0.weight": 32, "1.weight": 16}


def test_layers_that_are_emptied_are_named_and_a_floor_helps():
    def tiny():
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))

    def shrink(model, run):
        model[1].weight.data.mul_(1e-3)
        run.hold()

    with pytest.warns(UserWarning, match=r"nothing is left of 1\.weight at level 1.*floor"):
        Rounds(tiny, shrink, levels=1, rate=0.5).run()
    rounds = Rounds(tiny, shrink, levels=1, rate=0.5, floor=0.25)
    assert rounds.run()[1].layers == {"0.weight": 34, "1.weight": 2}
