"""Oracles of adapt_pruner: counts by hand, shares by the recursion, uniform Taylor pruning, and resumed runs."""

import math

import numpy as np
import pytest
import torch

import secateur as sc
from families import make_tiny, tiny_ids
from runs import plan_for
from secateur.allocate import normalised
from secateur.allocate.iterative import due, taken
from secateur.allocate.units import Limits, bundles
from secateur.errors import BudgetError, OptionError, UsageError
from secateur.methods import make_method
from secateur.recipes import growing, make_recipe
from secateur.report.build import removed_fraction
from secateur.search import token_loss
from secateur.structure import Cost, Group, Slices

IDS = tiny_ids()


def group(kind: str, units: int, width: int, parts: int = 1) -> Group:
    index = torch.arange(units * width * parts).reshape(units, -1)
    slices = (Slices("reader.weight", 1, index),)
    return Group("layers.0.x", kind, 0, units, Cost(params=width), slices=slices, reader="reader", parts=parts)


def leaving(one: Group, gone: int, before: float, after: float) -> int:
    scores = torch.arange(one.units, dtype=torch.float64)
    ordered = [b for b in reversed(bundles(one, scores, Limits())) if int(b.units[0]) >= gone]
    found = due(one, ordered, gone, before, after)
    # the lowest scores go first
    assert [int(d.bundle.units[0]) for d in found] == list(range(gone, gone + len(found)))
    return len(found)


# -- shares ----------------------------------------------------------------------------------------------------------


def test_steps_by_hand():
    method, importance = make_method("adapt_pruner"), np.array([1.0, 0.0, -1.0])
    one = method.advance(np.zeros(3), importance)
    assert one == pytest.approx([0, 0.02, 0.04])
    assert method.advance(np.zeros(3), 1e-3 * importance - 0.7) == pytest.approx(one)
    # the first is held at 0; a step starts from where the last one ended
    assert method.advance(one, importance) == pytest.approx([0, 0.04, 0.08])
    assert method.advance(np.array([0.0, 0.5, 0.98]), importance)[2] == 0.99
    assert make_method("adapt_pruner", {"amplitude": 0.0}).advance(np.full(3, 0.1), importance) == pytest.approx(0.12)


def test_importances_are_normalised_before_they_count():
    raw = np.array([-0.9, -0.5, -0.7])
    found = normalised(raw)
    assert abs(found.mean()) < 1e-6 and abs(found).max() == 1
    assert found == pytest.approx(normalised(5 * raw + 3))
    assert (normalised([0.3, 0.3, 0.3]) == 0).all()


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e6])
def test_what_rounding_leaves_of_equal_importances_is_no_difference(scale):
    # sums over all tokens of a calibration set, whose mean is not the number itself
    for value in np.random.default_rng(0).uniform(-1, 1, 20):
        assert not normalised(np.full(7, scale * value)).any()
    assert normalised(scale * np.array([-0.9, -0.5, -0.7])) == pytest.approx([-1, 1, 0])


@pytest.mark.parametrize(("metric", "kept"), [("cosine", -1.0), ("euclidean", 0.0), ("manhattan", 0.0)])
def test_a_block_that_does_nothing_counts_least(metric, kept):
    before = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    method = make_method("adapt_pruner", {"metric": metric})
    turned = before.roll(1, dims=-1)
    assert method.importance(before, before) == pytest.approx(10 * kept, abs=1e-4)
    assert method.importance(before, turned) > method.importance(before, before)
    official = make_method("adapt_pruner", {"metric": metric, "official_sign": True})
    sign = 1 if metric == "cosine" else -1
    assert official.importance(before, turned) == sign * method.importance(before, turned)


def test_an_identity_block_loses_most():
    model = make_tiny("llama")
    with torch.no_grad():
        for part in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            part.weight.zero_()
    plan = plan_for("adapt_pruner", model, IDS, sparsity=0.3)
    left = [sum(len(kept) for name, kept in plan.keep.items() if f".{layer}." in name) for layer in range(3)]
    assert left[1] == min(left) and left[1] < left[0] and left[1] < left[2]


# -- counts ----------------------------------------------------------------------------------------------------------


def test_neurons_by_hand():
    neurons = group("neuron", 1536, 1)
    assert leaving(neurons, 0, 0.0, 0.02) == 31
    assert leaving(neurons, 31, 0.02, 0.04) == 31
    assert leaving(neurons, 62, 0.04, 0.04) == 0


def test_heads_leave_when_their_last_channel_is_due():
    # three key-value heads of 64 channels, each with three query heads
    heads = group("kv_head", 3, 64, parts=3)
    assert leaving(heads, 0, 0.0, 0.33) == 1
    assert leaving(heads, 0, 0.0, 0.32) == 0
    assert leaving(heads, 1, 0.33, 0.66) == 0 and leaving(heads, 1, 0.33, 0.67) == 1


def test_the_last_step_is_taken_in_part():
    neurons, other = group("neuron", 10, 1), group("neuron", 10, 1)
    worst_first = list(reversed(bundles(neurons, torch.arange(10.0), Limits())))
    every = due(neurons, worst_first, 0, 0.0, 0.4) + due(other, worst_first, 0, 0.0, 0.2)
    assert [round(d.time, 3) for d in every] == [0.25, 0.5, 0.75, 1.0, 0.5, 1.0]
    # three of six are enough: those that are due first
    chosen = taken(every, removed=0, target=3, finest=1)
    assert [int(b.units[0]) for b in chosen] == [0, 1, 0]
    assert taken(every, removed=2, target=2.4, finest=1) == []


def uniform_taylor(model, sparsity: float, steps: int) -> dict[str, set[int]]:
    """Neurons that iterative Taylor pruning removes, the same share of every block at each step; heads stay."""
    names = ("gate_proj", "up_proj", "down_proj")
    gone: dict[str, set[int]] = {f"layers.{layer}.mlp": set() for layer in range(3)}
    width, step = 40, 0
    while step / steps < sparsity:
        step += 1
        weights = {(n, layer): getattr(model.model.layers[layer].mlp, n).weight for n in names for layer in range(3)}
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model.zero_grad()
        token_loss(model, (IDS,)).mean().backward()
        for layer in range(3):
            salience = {n: (weights[n, layer] * weights[n, layer].grad).abs().double() for n in names}
            score = salience["gate_proj"].sum(1) + salience["up_proj"].sum(1) + salience["down_proj"].sum(0)
            left = [u for u in score.argsort().tolist() if u not in gone[f"layers.{layer}.mlp"]]
            number = width - len(gone[f"layers.{layer}.mlp"]) - int(width * (1 - step / steps) + 1e-9)
            gone[f"layers.{layer}.mlp"] |= set(left[:number])
            with torch.no_grad():
                units = sorted(gone[f"layers.{layer}.mlp"])
                weights["gate_proj", layer][units] = 0
                weights["up_proj", layer][units] = 0
                weights["down_proj", layer][:, units] = 0
    return gone


def test_without_amplitude_it_is_uniform_taylor_pruning():
    model = make_tiny("llama")
    anatomy = sc.anatomy(model)
    neuron = anatomy["layers.0.mlp"].cost.params
    # 4 of 10 steps; heads stay, since none has half of its two due
    sparsity = 3 * 16 * neuron / anatomy.blocks.params
    plan = plan_for("adapt_pruner", model, IDS, sparsity=sparsity, amplitude=0.0, steps=10)
    expected = uniform_taylor(make_tiny("llama"), 0.4, 10)
    assert {name: set(plan.removed(name).tolist()) for name in expected} == expected
    assert all(not len(plan.removed(f"layers.{layer}.attention")) for layer in range(3))


def test_importances_are_taken_anew(monkeypatch):
    from secateur.methods.structure import adapt_pruner

    seen = []
    advance = adapt_pruner.AdaptPruner.advance

    def watched(self, sparsities, importance):
        seen.append(importance.copy())
        return advance(self, sparsities, importance)

    monkeypatch.setattr(adapt_pruner.AdaptPruner, "advance", watched)
    often = plan_for("adapt_pruner", make_tiny("llama"), IDS, sparsity=0.4, steps=8)
    assert len({tuple(one) for one in seen}) == len(seen) > 2
    seen.clear()
    plan_for("adapt_pruner", make_tiny("llama"), IDS, sparsity=0.4, steps=8, refresh=100)
    assert len({tuple(one) for one in seen}) == 1
    seen.clear()
    drawn = plan_for("adapt_pruner", make_tiny("llama"), IDS, sparsity=0.4, steps=8, step_windows=2)
    assert drawn.diff(often)


def test_shares_that_come_to_rest_leave_the_rest_to_all_alike(make_llama):
    # of two blocks one counts most, and is never due
    model = make_llama()
    plan = plan_for("adapt_pruner", model, IDS, sparsity=0.6, steps=10, amplitude=0.1)
    assert removed_fraction(plan, sc.anatomy(model)) == pytest.approx(0.6, abs=0.005)
    assert {name.split(".")[1] for name in plan.keep if len(plan.removed(name))} == {"0", "1"}


def test_blocks_at_the_ends_stay_whole():
    plan = plan_for("adapt_pruner", make_tiny("llama"), IDS, sparsity=0.2, first=1, last=1)
    assert {name.split(".")[1] for name in plan.keep} == {"1"}


# -- resumed ---------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """What no handler expects."""


def job(tiny_checkpoint, out, **step):
    data = {"samples": 4, "length": 32}
    one = {"method": "adapt_pruner", "sparsity": 0.3, "options": {"steps": 8}, **step}
    return {"model": str(tiny_checkpoint), "out": str(out), "calibration": data, "steps": [one]}


def test_a_crash_between_steps_ends_in_the_same_bytes(tiny_checkpoint, tmp_path, monkeypatch):
    from secateur.runs.folder import DiskKeeper

    sc.run(job(tiny_checkpoint, tmp_path / "whole"))
    note = DiskKeeper.note

    def crashing(self, name, number, value):
        note(self, name, number, value)
        if number == 1:
            raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(DiskKeeper, "note", crashing)
        sc.run(job(tiny_checkpoint, tmp_path / "again"))
    sc.run(job(tiny_checkpoint, tmp_path / "again"), resume=True)
    for name in ("model.safetensors", "plan/plan.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


# -- Adapt-Accel -----------------------------------------------------------------------------------------------------


def test_stages_have_equal_parts_of_the_parameters_and_growing_parts_of_the_data():
    assert growing(20, "linear")[0] == pytest.approx(2 / 420)
    for growth in ("linear", "constant", "cosine"):
        shares = growing(20, growth)
        assert sum(shares) == pytest.approx(1) and len(shares) == 20
        assert shares == sorted(shares)
    assert growing(3, "cosine")[0] == pytest.approx(1 - math.cos(math.pi / 6))
    step = {"method": "adapt_pruner", "sparsity": 1 - 143.1 / 376.1, "stages": 20, "heal": "full:steps=420,loss=ce"}
    steps = make_recipe({"steps": [step]}, "test").steps
    left = 376.1
    for stage, one in enumerate(steps, start=1):
        left *= 1 - one.sparsity
        assert left == pytest.approx(376.1 - (376.1 - 143.1) * stage / 20)
        assert one.heal == f"full:loss=ce,steps={2 * stage},done={stage * (stage - 1)},total=420"
    assert 376.1 * (1 - steps[0].sparsity) == pytest.approx(364.45)


def test_stages_without_training_and_with_a_repair():
    steps = make_recipe({"steps": [{"method": "flap", "sparsity": 0.3, "stages": 2}]}, "test").steps
    assert [one.heal for one in steps] == [None, None]
    repaired = {"method": "flap", "sparsity": 0.3, "stages": 2, "heal": "refit+lora:steps=3", "growth": "constant"}
    steps = make_recipe({"steps": [repaired]}, "test").steps
    assert [one.heal for one in steps] == ["refit+lora:steps=2,done=0,total=3", "refit+lora:steps=1,done=2,total=3"]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"method": "wanda", "sparsity": 0.5, "stages": 2}, "stages are for methods that remove heads and neurons"),
        ({"method": "flap", "sparsity": 0.5, "stages": 2, "budget": "kv_bytes"}, "one budget that is counted"),
        (
            {"method": "adapt_pruner", "stages": 4, "heal": "lora:steps=3"},
            "3 steps of training are too few for 4 stages",
        ),
        ({"method": "adapt_pruner", "growth": "linear"}, "give their number with --stages"),
    ],
)
def test_stages_that_can_not_be(step, message):
    with pytest.raises(UsageError, match=message):
        make_recipe({"steps": [step]}, "test")


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, OptionError, r"sparsity must lie in \[0, 1\)"),
        ({"sparsity": 0.97}, BudgetError, "can't remove 97.0% of the params: with at least 1 unit"),
        ({"sparsity": 0.5, "first": 2}, BudgetError, "can't remove 50.0%"),
        ({"metric": "angle"}, OptionError, "metric must be one of"),
        ({"amplitude": math.inf}, OptionError, "amplitude must be a finite number, got inf"),
        ({"amplitude": math.nan}, OptionError, "amplitude must"),
    ],
)
def test_mistakes_in_a_sentence(options, error, message):
    with pytest.raises(error, match=message):
        plan_for("adapt_pruner", make_tiny("llama"), IDS, **options)


def test_a_remainder_of_neurons_leaves_first():
    # 40 neurons in 16, 16 and 8: only the 8 can go
    plan = plan_for("adapt_pruner", make_tiny("llama"), IDS, sparsity=0.1, round_to=16, min_keep=25)
    assert {len(kept) for name, kept in plan.keep.items() if name.endswith("mlp")} == {32}
    with pytest.raises(BudgetError, match=r"can't remove 20\.0% of the params: with at least 25 unit"):
        plan_for("adapt_pruner", make_tiny("llama"), IDS, sparsity=0.2, round_to=16, min_keep=25)


def test_a_head_that_never_leaves_is_made_up_for():
    # one key-value head a block, of which a share of 30 % is none
    model = make_tiny("falcon-mqa")
    plan = plan_for("adapt_pruner", model, IDS, sparsity=0.3)
    assert removed_fraction(plan, sc.anatomy(model)) == pytest.approx(0.3, abs=0.01)
    assert all(len(kept) for kept in plan.keep.values())
