"""Numbers of the allocators that were worked out by hand, from the formulas of their papers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from families import make_tiny, tiny_ids
from runs import plan_for
from secateur.allocators import Part, get_allocator, parse_allocator
from secateur.allocators.adapt import Adapt, normalised
from secateur.allocators.cfsp import CFSP
from secateur.allocators.owl import OWL, outlier_percentage
from secateur.allocators.progression import Progression
from secateur.errors import BudgetError
from secateur.models.decoders import decoder_anatomy
from secateur.models.surgery import apply_plan
from secateur.observe import Angle
from sublayers import plan_without


def blocks(count, size=10_000, role="up"):
    """One square matrix per block."""
    side = math.isqrt(size)
    return [Part(f"layers.{layer}.m", layer, role, (side, side)) for layer in range(count)]


def numbers(*values):
    return [torch.tensor(float(value), dtype=torch.float64) for value in values]


# -- OWL -------------------------------------------------------------------------------------------------------------


def test_owl_spreads_the_sparsities_by_outliers():
    found = OWL(lam=0.08).sparsities(blocks(4), numbers(2, 5, 3, 10), 0.7)
    assert found == pytest.approx([0.76, 0.70, 0.74, 0.60])


def test_owl_counts_what_exceeds_m_times_the_mean():
    scores = [torch.tensor([1.0, 1, 1, 9]), torch.tensor([[2.0, 2], [2, 2]])]
    assert outlier_percentage(scores, 2.0) == 12.5


def test_owl_gives_equal_blocks_the_same():
    assert OWL().sparsities(blocks(3), numbers(4, 4, 4), 0.6) == pytest.approx([0.6] * 3)


def test_owl_defaults_are_those_of_its_readme():
    assert (OWL().m, OWL().lam) == (5.0, 0.08)


def test_owl_shifts_whole_numbers_of_a_pattern():
    # offsets of 2 * lam / M on the scale of sparsities, half of it to either side
    found = OWL(lam_pattern=1.0).for_pattern(4).sparsities(blocks(2), numbers(1, 2), 0.5)
    assert found == pytest.approx([0.75, 0.25])


# -- progression -----------------------------------------------------------------------------------------------------


def test_progression_is_arithmetic():
    found = Progression(beta=0.1, attention=0).sparsities(blocks(4), [], 0.7)
    assert found == pytest.approx([0.55, 0.65, 0.75, 0.85])


@pytest.mark.parametrize(("sparsity", "most"), [(0.7, 0.2), (0.5, 1 / 3), (0.2, 2 / 15)])
def test_progression_refuses_a_beta_that_leaves_the_interval(sparsity, most):
    allowed = Progression(beta=most, attention=0).sparsities(blocks(4), [], sparsity)
    assert allowed.min() == pytest.approx(0 if sparsity <= 0.5 else 2 * sparsity - 1)
    assert allowed.max() == pytest.approx(1 if sparsity >= 0.5 else 2 * sparsity)
    with pytest.raises(BudgetError, match=f"can be at most {most:.4g}"):
        Progression(beta=most * 1.01, attention=0).sparsities(blocks(4), [], sparsity)


def test_slope_is_beta_as_a_fraction_of_the_largest():
    by_slope = Progression(slope=0.5, attention=0).sparsities(blocks(4), [], 0.7)
    assert by_slope == pytest.approx(Progression(beta=0.1, attention=0).sparsities(blocks(4), [], 0.7))


def test_progression_weighs_blocks_by_their_parameters():
    parts = [Part("a", 0, "up", (100, 10)), Part("b", 1, "up", (300, 10))]
    found = Progression(beta=0.2, attention=0).sparsities(parts, [], 0.5)
    assert np.average(found, weights=[1, 3]) == pytest.approx(0.5)
    assert found[1] - found[0] == pytest.approx(0.2)


def test_kinds_shift_queries_and_keys_against_values_and_outputs():
    roles = ("q", "k", "v", "o", "gate", "up", "down")
    parts = [Part(role, 0, role, (10, 10)) for role in roles]
    found = dict(zip(roles, Progression(attention=0.2).sparsities(parts, [], 0.7), strict=True))
    assert found["q"] == found["k"] == pytest.approx(0.76)
    assert found["v"] == found["o"] == pytest.approx(0.64)
    assert found["gate"] == found["up"] == found["down"] == pytest.approx(0.7)
    with pytest.raises(BudgetError, match=r"leave \[0, 1\]: lower slope"):
        Progression(slope=0.9, attention=0.2).sparsities([*parts, Part("x", 1, "q", (10, 10))], [], 0.7)


class ByTenths:
    """Trials whose best slope is 0.3, and that say what they were asked."""

    def __init__(self):
        self.asked = []

    def losses(self, candidates, tokens, seed):
        assert all(len(set(levels)) == 1 for levels in candidates)
        self.asked += [levels[0] for levels in candidates]
        return [abs(levels[0] - 3) for levels in candidates]


def test_beta_auto_takes_the_slope_that_does_least():
    search, trials = parse_allocator("progression:beta=auto,attention=0").working(), ByTenths()
    found = search.at(blocks(5), search.run(blocks(5), 0.6, trials), 0.6)
    assert trials.asked == list(range(9))
    assert found == pytest.approx(Progression(slope=0.3, attention=0).sparsities(blocks(5), [], 0.6))
    assert search.name == "progression" and search.options()["beta"] == "auto"
    # slopes that would leave the interval beside what attention adds are not tried
    parts, narrow = [*blocks(5, role="q"), Part("v", 0, "v", (100, 100))], ByTenths()
    wide = parse_allocator("progression:beta=auto,attention=0.5").working()
    wide.run(parts, 0.6, narrow)
    assert 0 < len(narrow.asked) < 9


# -- CFSP ------------------------------------------------------------------------------------------------------------


def test_cfsp_follows_the_published_scale():
    angles = numbers(0.10, 0.30)
    w = [1 / (1 + math.exp(-13.1072 * z)) for z in (-0.1, 0.1)]
    keep = [value / (sum(w) / 2) * 0.5 for value in w]
    assert CFSP().sparsities(blocks(2), angles, 0.5) == pytest.approx([1 - k for k in keep])


@pytest.mark.parametrize(("sparsity", "largest"), [(0.5, 0.97619), (0.2, 0.990476)])
def test_cfsp_draws_a_keep_of_one_back(sparsity, largest):
    keep = 1 - CFSP(alpha=40).sparsities(blocks(4), numbers(0.1, 0.2, 0.3, 0.9), sparsity)
    assert keep.max() == pytest.approx(largest, abs=1e-5)
    assert keep.mean() == pytest.approx(1 - sparsity) and keep.min() > 0


def test_cfsp_gives_equal_angles_the_same():
    assert CFSP().sparsities(blocks(3), numbers(0.4, 0.4, 0.4), 0.3) == pytest.approx([0.3] * 3)


@pytest.mark.parametrize(("after", "angle"), [([3.0, 0], 0), ([-1.0, 0], 1), ([0, 2.0], 0.5), ([0, 0.0], 1 / 3)])
def test_the_angle_of_known_pairs(after, angle):
    seen = Angle()
    seen.update(torch.tensor([[[1.0, 0, *after]]]))
    assert seen.mean == pytest.approx(angle)


def test_doubling_the_calibration_set_changes_no_angle():
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    once, twice, merged = Angle(), Angle(), Angle()
    once.update(x)
    for _ in range(2):
        twice.update(x)
    merged.update(x[:1])
    rest = Angle()
    rest.update(x[1:])
    merged.merge(rest)
    assert once.mean == pytest.approx(twice.mean) == pytest.approx(merged.mean)


# -- Adapt-Pruner ----------------------------------------------------------------------------------------------------


def test_adapt_without_amplitude_is_uniform():
    assert Adapt(amplitude=0).sparsities(blocks(3), numbers(-1, 0, -0.5), 0.37) == pytest.approx([0.37] * 3)


def test_adapt_normalises_importances():
    found = normalised([-0.9, -0.5, -0.7])
    assert found.mean() == pytest.approx(0) and abs(found).max() == 1
    assert found == pytest.approx(normalised([5 * value + 3 for value in (-0.9, -0.5, -0.7)]))
    assert (normalised([0.3, 0.3]) == 0).all()


def test_adapt_steps_and_clips():
    importance = np.array([1.0, 0.0, -1.0])
    assert Adapt().after(1, importance) == pytest.approx([0, 0.02, 0.04])
    assert Adapt().after(2, importance) == pytest.approx([0, 0.04, 0.08])
    # one that gains by every step stays at 0, and none exceeds 0.99
    assert Adapt(amplitude=0.03).after(40, importance) == pytest.approx([0, 0.8, 0.99])


def test_adapt_removes_most_where_nothing_turns():
    found = Adapt().sparsities(blocks(3), numbers(-0.2, -0.6, -1.0), 0.4)
    # the block whose output is its input goes first; importance 1 takes back what a step gives
    assert found == pytest.approx([0.0, 0.4, 0.8])


# -- blocks that have lost both of their sub-layers ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapt", "cfsp", "influence", "owl"])
def test_blocks_with_nothing_to_lose_have_no_part_in_the_scale(name):
    allocator, (_, *left) = get_allocator(name)(), blocks(4)
    # the first block passes on what it gets, which is less than any other does
    found = allocator.sparsities(left, numbers(-1.0, 0.1, 0.3, 0.2), 0.4)
    assert found == pytest.approx(allocator.sparsities(blocks(3), numbers(0.1, 0.3, 0.2), 0.4))


@pytest.mark.parametrize("name", ["global", "owl"])
def test_blocks_without_matrices_are_measured_too(name):
    model = make_tiny("llama")
    for sublayer in ("layers.1.mlp", "layers.1.attention"):
        units = decoder_anatomy(model)[sublayer].units
        plan = plan_without(model, ["layers.0.mlp"])
        keep = {sublayer: torch.empty(0, dtype=torch.int64)}
        model = apply_plan(replace(plan, groups={sublayer: units}, keep=keep), model)
    plan = plan_for("wanda", model, tiny_ids(), spread=name, sparsity=0.5)
    assert {mask.split(".")[2] for mask in plan.masks} == {"0", "2"}


# -- ERK and names ---------------------------------------------------------------------------------------------------


def test_erk_keeps_by_perimeter_over_area():
    parts = [Part("a", 0, "", (10, 30)), Part("b", 0, "", (40, 60))]
    keep = 1 - parse_allocator("erk").sparsities(parts, [], 0.9)
    assert keep[0] / keep[1] == pytest.approx((40 / 300) / (100 / 2400))
    assert (keep * [300, 2400]).sum() == pytest.approx(270)


def test_text_becomes_options():
    assert parse_allocator("owl:m=3,lam=0.1") == OWL(m=3.0, lam=0.1)
    assert parse_allocator("progression: beta = 0.01") == Progression(beta=0.01)
    assert get_allocator("uniform").name == "uniform"
