"""What every registered allocator must do, whatever it observes."""

import dataclasses
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import secateur as sc
from secateur.allocate import UniformAllocator
from secateur.allocators import Part, describe_allocator, get_allocator, list_allocators, parse_allocator
from secateur.errors import OptionError, UsageError
from secateur.methods import UnitMethod, WeightMethod, get_method, list_methods, make_method
from secateur.models.decoders import matrix_roles
from secateur.report.build import removed_fraction

ALLOCATORS = list_allocators()
ONE_PER_BLOCK = [name for name in ALLOCATORS if get_allocator(name).measures and name not in ("global", "search")]
# what takes minutes as it is meant
QUICK = {"search": "search:generations=2,offspring=2,first_tokens=32,last_tokens=64"}
BAD = [
    (name, field.name, (field.metadata["le"] if field.metadata["le"] is not None else field.metadata["ge"] - 3) + 1)
    for name in ALLOCATORS
    for field in dataclasses.fields(get_allocator(name))
    if field.metadata["le"] is not None or field.metadata["ge"] is not None
]


def plan(model, tokenizer, allocate, method="wanda", **arguments):
    given = {"sparsity": 0.6} | arguments
    return sc.plan(
        model, tokenizer, method=method, allocate=QUICK.get(allocate, allocate), samples=4, length=32, **given
    )


def removed(made) -> tuple[int, int]:
    """(zeros, weights) of all masks."""
    return sum(int((~mask).sum()) for mask in made.masks.values()), sum(m.numel() for m in made.masks.values())


@pytest.fixture(scope="module")
def deep(make_llama):
    """Four blocks; the last matrices of the others' q, k, v must not be alike."""
    return make_llama(num_hidden_layers=4)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_the_whole_is_met_and_the_plan_says_how(name, deep, tiny_tokenizer):
    before = {key: value.clone() for key, value in deep.state_dict().items()}
    for method, steps in (("magnitude", 1), ("wanda", 16)):
        made = plan(deep, tiny_tokenizer, name, method)
        zeros, weights = removed(made)
        # half of the smallest step that a matrix can take: an entry, or one in every row
        assert abs(zeros - 0.6 * weights) <= steps / 2
        allocation = made.provenance[0].allocation
        assert allocation is not None and allocation.allocator == name
        assert allocation.sparsities == {k.removesuffix(".weight"): made.sparsity(k) for k in made.masks}
    again = plan(deep, tiny_tokenizer, name)
    assert not again.diff(made) and again.provenance == made.provenance
    assert all(torch.equal(value, before[key]) for key, value in deep.state_dict().items())


@pytest.mark.parametrize("name", ALLOCATORS)
@given(st.floats(0.05, 0.9), st.integers(0, 1000))
def test_sparsities_meet_the_whole_within_the_interval(name, sparsity, seed):
    random = Random(seed)
    parts = [Part(f"{layer}.{role}", layer, role, (random.randint(2, 40), random.randint(2, 40)))
             for layer in range(5) for role in ("q", "o", "down")]  # fmt: skip
    chosen = get_allocator(name)()
    found = chosen.sparsities(parts, measured_by(chosen, 5, random), sparsity)
    assert np.average(found, weights=[part.size for part in parts]) == pytest.approx(sparsity, abs=1e-9)
    assert found.min() >= 0 and found.max() <= 1


def measured_by(chosen, blocks, random):
    """Numbers such as its measure() gives, in any order."""
    if not chosen.measures:
        return []
    if chosen.name == "global":
        values = [[random.gauss(0, 1 + layer) for _ in range(30)] for layer in range(3 * blocks)]
        rows = torch.tensor([sorted(row) for row in values], dtype=torch.float64)
        return list(rows.split(3))
    return [torch.tensor(random.random(), dtype=torch.float64) for _ in range(blocks)]


@pytest.mark.parametrize("name", ONE_PER_BLOCK)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_blocks_keep_more_for_more_importance_whatever_their_order(name, values, random):
    chosen = get_allocator(name)()
    parts = [Part(str(layer), layer, "up", (10, 10)) for layer in range(len(values))]
    order = random.sample(range(len(values)), len(values))

    def sparsities(numbers):
        return chosen.sparsities(parts, [torch.tensor(n, dtype=torch.float64) for n in numbers], 0.5)

    found = sparsities(values)
    assert sparsities([values[i] for i in order]) == pytest.approx(found[order], abs=1e-7)
    by_value = found[np.argsort(values, kind="stable")]
    assert (np.diff(by_value) <= 1e-9).all()


@pytest.mark.parametrize("name", ALLOCATORS)
def test_sparsity_zero_removes_nothing(name, deep, tiny_tokenizer):
    assert plan(deep, tiny_tokenizer, name, sparsity=0.0).is_identity


def test_patterns_of_blocks_are_mixed(deep, tiny_tokenizer):
    made = plan(deep, tiny_tokenizer, "owl", sparsity=None, pattern="2:4")
    zeros, weights = removed(made)
    assert zeros == weights / 2
    found = made.provenance[0].allocation.sparsities
    assert {round(4 * s) / 4 for s in found.values()} == set(found.values()) and len(set(found.values())) > 1
    for name, mask in made.masks.items():
        per_group = (~mask).reshape(-1, 4).sum(dim=1)
        assert (per_group == round(4 * found[name.removesuffix(".weight")])).all()


WEIGHTS = [m for m in list_methods() if issubclass(get_method(m), WeightMethod)]


@pytest.mark.parametrize("method", WEIGHTS)
def test_every_method_for_weights_follows_to_the_weight(method, deep, tiny_tokenizer):
    options = {} if "scope" not in get_method(method).option_fields() else {"scope": "layer"}
    if make_method(method).decides_globally:
        with pytest.raises(UsageError, match="spreads the sparsity itself"):
            plan(deep, tiny_tokenizer, "progression", method)
    made = plan(deep, tiny_tokenizer, "progression", method, options=options)
    zeros, weights = removed(made)
    chosen = make_method(method, options)
    steps = min(chosen.step((m.shape[0], m.shape[1])) for m in sc.anatomy(deep).matrices)
    assert abs(zeros - 0.6 * weights) <= max(steps / 2, 0.5)
    given = made.provenance[0].allocation.sparsities
    assert given == {name.removesuffix(".weight"): made.sparsity(name) for name in made.masks}


SHARING = [name for name in ALLOCATORS if get_allocator(name).shares]
FOLLOWING = [m for m in list_methods() if issubclass(get_method(m), UnitMethod)]
FOLLOWING = [m for m in FOLLOWING if isinstance(make_method(m).allocator(), UniformAllocator)]


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("method", ["wanda_sp", "cfsp"])
def test_heads_and_neurons_follow_shares_of_blocks(name, method, deep, tiny_tokenizer):
    made = plan(deep, tiny_tokenizer, name, method, sparsity=0.4)
    anatomy = sc.anatomy(deep)
    assert removed_fraction(made, anatomy) == pytest.approx(0.4, abs=2 * anatomy["layers.0.mlp"].cost.params / 40_000)
    allocation = made.provenance[0].allocation
    assert allocation is not None and allocation.allocator == name
    assert (len(set(allocation.sparsities.values())) > 1) == (name != "uniform")
    neuron = anatomy["layers.0.mlp"].cost.params
    for layer in range(4):
        mine = [g for g in anatomy if g.layer == layer and g.name in made.keep]
        gone = sum(len(made.removed(g.name)) * g.cost.params for g in mine)
        size = sum(g.units * g.cost.params for g in mine)
        assert abs(gone - allocation.sparsities[f"layers.{layer}"] * size) <= neuron / 2 + 1
    again = plan(deep, tiny_tokenizer, name, method, sparsity=0.4)
    assert not again.diff(made) and again.provenance == made.provenance


@pytest.mark.parametrize("method", FOLLOWING)
def test_every_method_whose_blocks_lose_alike_follows(method, deep, tiny_tokenizer):
    made = plan(deep, tiny_tokenizer, "progression:slope=1", method, sparsity=0.4)
    sizes = [sum(len(kept) for n, kept in made.keep.items() if f".{layer}.mlp" in n) for layer in range(4)]
    assert sizes[0] > sizes[3]


def test_a_slope_is_tried_out(deep, tiny_tokenizer):
    found = plan(deep, tiny_tokenizer, "progression:beta=auto", "magnitude")
    zeros, weights = removed(found)
    assert abs(zeros - 0.6 * weights) <= 1 / 2
    assert found.provenance[0].allocation.options["beta"] == "auto"
    slopes = [f"progression:slope={k / 10}" for k in range(9)]
    assert any(not found.diff(plan(deep, tiny_tokenizer, slope, "magnitude")) for slope in slopes)


def test_a_repairing_method_follows_too(deep, tiny_tokenizer):
    made = plan(deep, tiny_tokenizer, "owl", "sparsegpt", options={"block_size": 24})
    zeros, weights = removed(made)
    assert abs(zeros - 0.6 * weights) <= 2
    assert made.values


@pytest.mark.parametrize(
    ("method", "options", "allocate", "message"),
    [
        ("flap", {}, "owl", "gives single matrices their sparsity, and flap removes heads and neurons"),
        ("wanda_sp", {}, "progression:beta=auto", "take an allocator that gives blocks theirs"),
        ("flap", {}, "cfsp", "flap with these options spreads the sparsity over blocks itself"),
        ("wanda_sp", {"budget": "kv_bytes"}, "cfsp", "leaves the numbers of heads and neurons to an integer programme"),
        ("tyr", {}, "cfsp", "tyr finds the numbers of heads and neurons itself"),
        ("shortgpt", {}, "erk", "shortgpt removes whole blocks"),
        ("icbs", {}, "owl", "icbs searches at one sparsity: take a method for weights that doesn't"),
        ("wanda", {"scope": "global"}, "owl", "wanda with scope=global spreads the sparsity itself"),
        ("sparsegpt", {}, "global", "sparsegpt has no scores before it prunes"),
        ("wanda", {}, "owll", "unknown allocator 'owll'; did you mean 'owl'?"),
        ("wanda", {}, "owl:n=3", "owl has no option 'n'"),
        ("wanda", {}, "owl:m", "an allocator is NAME or NAME:KEY=VALUE,KEY=VALUE, each key once, got 'owl:m'"),
        ("wanda", {}, "owl:m=1,m=2", "each key once"),
        ("wanda", {}, "progression:beta=much", "progression: beta must be a number or auto, got 'much'"),
        ("wanda", {}, "owl:m=x", "owl: m must be of type float, got 'x'"),
    ],
)
def test_what_cant_be_followed_is_refused_in_one_sentence(method, options, allocate, message, deep, tiny_tokenizer):
    with pytest.raises(UsageError) as caught:
        plan(deep, tiny_tokenizer, allocate, method, sparsity=None, options=options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_traced_networks_have_other_words():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    with pytest.raises(UsageError, match="allocate= is for language models"):
        sc.plan(net, method="spa_l1", example_inputs=(torch.zeros(1, 4),), allocate="owl")


def test_data_is_asked_for_where_an_allocator_needs_it(deep):
    with pytest.raises(UsageError, match="needs the model's tokenizer"):
        sc.plan(deep, None, method="magnitude", sparsity=0.5, allocate="owl", length=32)
    assert sc.plan(deep, None, method="magnitude", sparsity=0.5, allocate="erk").masks


@pytest.mark.parametrize(("name", "option", "value"), BAD)
def test_options_out_of_range_are_refused(name, option, value):
    with pytest.raises(OptionError, match=f"{name}: {option} must lie in"):
        parse_allocator(f"{name}:{option}={value}")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("option", ["cfsp:alpha", "progression:beta"])
def test_options_without_a_range_are_finite(option, value):
    name, _, key = option.partition(":")
    with pytest.raises(OptionError, match=f"{name}: {key} must be a finite number, got {value}"):
        parse_allocator(f"{option}={value}")


@pytest.mark.parametrize("name", ALLOCATORS)
def test_an_allocator_explains_itself(name):
    described = describe_allocator(name)
    assert described["summary"].endswith(".") and described["observes"] in ("nothing", "inputs", "blocks")
    assert all(option["help"] for option in described["options"].values())


def test_roles_of_matrices(make_llama):
    roles = matrix_roles(make_llama())
    assert list(roles.values())[:7] == ["q", "k", "v", "gate", "up", "o", "down"]
    assert roles["model.layers.1.self_attn.o_proj"] == "o" and len(roles) == 14


def test_statistics_of_the_dense_model_are_found_again(deep, tiny_tokenizer, tmp_path, monkeypatch):
    from secateur.observe.driver import BlockWalk

    first = plan(deep, tiny_tokenizer, "owl", "magnitude", statistics=tmp_path)
    # what shortgpt has seen of the blocks serves the allocators that look at blocks
    sc.plan(deep, tiny_tokenizer, method="shortgpt", sparsity=0.5, samples=4, length=32, statistics=tmp_path)
    monkeypatch.setattr(BlockWalk, "observe", lambda *_, **__: pytest.fail("observed again"))
    monkeypatch.setattr(BlockWalk, "observe_block", lambda *_, **__: pytest.fail("observed again"))
    assert plan(deep, tiny_tokenizer, "owl", "magnitude", statistics=tmp_path).provenance == first.provenance
    for name in ("influence", "adapt"):
        assert plan(deep, tiny_tokenizer, name, "magnitude", statistics=tmp_path).masks


def test_a_score_of_one_matrix_standardised_is_uniform():
    scores = torch.randn(40, 40, generator=torch.Generator().manual_seed(0)).abs()
    parts = [Part(name, 0, "", (40, 40)) for name in "ab"]
    chosen, method = parse_allocator("global"), make_method("magnitude")

    def measured(*weights):
        from secateur.allocators import BlockWeights
        from secateur.methods import Target

        targets = tuple(Target(n, "weight", 0, w) for n, w in zip("ab", weights, strict=True))
        return [chosen.measure(BlockWeights(targets, {}), method)]

    # another scale is no difference
    assert chosen.sparsities(parts, measured(scores, 7 * scores), 0.4) == pytest.approx([0.4, 0.4], abs=1e-3)
    # a tail of few large entries raises the spread, and more of the others lie below the threshold
    skewed = chosen.sparsities(parts, measured(scores, scores**4), 0.4)
    z = [(s - s.mean()) / s.std(correction=0) for s in (scores.double(), scores.double() ** 4)]
    together = torch.cat([one.flatten() for one in z])
    threshold = together.sort().values[int(0.4 * len(together))]
    assert skewed == pytest.approx([float((one < threshold).double().mean()) for one in z], abs=2e-3)
