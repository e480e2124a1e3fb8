"""The recipe of a sweep: which points it has, and what is refused before anything runs."""

from __future__ import annotations

import pytest

from secateur.errors import OptionError, RecipeError, UnknownMethodError, UsageError
from secateur.recipes import make_recipe
from secateur.sweep.axes import Choice, Range, point_name
from secateur.sweep.sources import statistics_of
from secateur.sweep.spec import load_sweep, make_sweep


def points(grid, **recipe):
    return make_sweep({"model": "m", **recipe, "sweep": {"grid": grid}}, "r.yaml").points


def test_a_grid_is_every_combination():
    found = points({"method": ["wanda", "magnitude"], "sparsity": [0.3, 0.5], "seed": [0, 1]})
    assert [p.values for p in found] == [
        {"method": m, "sparsity": s, "seed": n} for m in ("wanda", "magnitude") for s in (0.3, 0.5) for n in (0, 1)
    ]
    assert [(p.recipe.steps[0].method, p.recipe.steps[0].sparsity, p.recipe.calibration.seed) for p in found] == [
        tuple(p.values.values()) for p in found
    ]
    assert found[0].name == "wanda-sparsity=0.3-seed=0"
    assert len({p.name for p in found}) == len({p.key for p in found}) == 8


def test_several_grids_give_the_points_of_all_of_them_once():
    found = points(
        [
            {"method": "wanda", "sparsity": [0.3, 0.5]},
            {"method": "wanda", "sparsity": 0.5},
            {"method": "wanda", "pattern": "2:4"},
        ]
    )
    assert [p.name for p in found] == ["wanda-sparsity=0.3", "wanda-sparsity=0.5", "wanda-pattern=2_4"]


def test_axes_reach_every_part_of_a_recipe():
    (point,) = points(
        {"samples": 8, "calibration.length": 64, "use_variant": True, "dtype": "float32", "sparsity": 0.4},
        steps=[{"method": "wanda", "options": {"pattern": ""}}],
        calibration={"source": "self"},
    )
    step, calibration = point.recipe.steps[0], point.recipe.calibration
    assert (calibration.samples, calibration.length, calibration.source) == (8, 64, "self")
    assert step.options == {"pattern": "", "use_variant": True} and step.sparsity == 0.4
    assert point.recipe.dtype == "float32"


def test_a_repair_is_an_axis_and_another_one_another_point():
    found = points({"method": "wanda", "heal": ["none", "refit"], "target": ["current", "dense"]})
    assert [(p.recipe.steps[0].heal, p.recipe.steps[0].target) for p in found] == [
        ("none", "current"), ("none", "dense"), ("refit", "current"), ("refit", "dense"),
    ]  # fmt: skip
    assert len({p.key for p in found}) == 4
    with pytest.raises(OptionError, match="shortgpt takes no heal"):
        points({"method": "shortgpt", "heal": ["refit"]})


@pytest.mark.parametrize(
    ("step", "shared"),
    [
        ({"method": "flap"}, True),
        ({"method": "flap", "heal": "refit"}, True),
        ({"method": "magnitude_sp", "heal": "bias"}, True),
        ({"method": "magnitude", "heal": "refit"}, False),
        ({"method": "wanda"}, False),
        ({"method": "wanda", "options": {"scope": "global"}}, True),
        ({"method": "llm_pruner"}, True),
        ({"method": "llm_pruner", "options": {"rounds": 2}}, False),
        ({"method": "llm_pruner", "options": {"criterion": "l1"}}, False),
    ],
)
def test_points_share_what_is_taken_from_the_dense_model(step, shared):
    (point,) = points({"sparsity": [0.3]}, steps=[step])
    assert bool(statistics_of(point)) == shared


def test_steps_are_named_by_their_number():
    (point,) = points(
        {"steps.2.sparsity": 0.3, "steps.1.min_keep": 2}, steps=[{"method": "flap"}, {"method": "magnitude"}]
    )
    assert point.recipe.steps[0].options == {"min_keep": 2} and point.recipe.steps[1].sparsity == 0.3


def test_what_is_measured_does_not_follow_the_axes():
    sweep = make_sweep(
        {
            "model": "m",
            "calibration": {"length": 64},
            "sweep": {"grid": {"method": "wanda", "length": [32], "seed": 7}},
        },
        "r",
    )
    assert (sweep.base.calibration.length, sweep.base.calibration.seed) == (64, 0)


@pytest.mark.parametrize(
    ("sweep", "error", "said"),
    [
        ({"gird": {}}, RecipeError, "unknown key 'gird' in sweep; did you mean 'grid'?"),
        ({}, RecipeError, "give either a grid or a search"),
        ({"grid": {"method": ["flap"]}, "search": {"sparsity": [0.1, 0.2]}}, RecipeError, "give either"),
        ({"grid": {}}, RecipeError, "'method' is missing in step 1"),
        ({"grid": []}, RecipeError, "sweep.grid is empty"),
        ({"grid": {"method": ["flap"], "sparsity": []}}, RecipeError, "axis 'sparsity' has no values"),
        ({"grid": {"method": ["flap"], "sparsity": [[0.1]]}}, RecipeError, "a number, a word, true or false"),
        ({"grid": {"method": ["flap"], "sparsty": [0.1]}}, RecipeError, "'sparsty'; did you mean 'sparsity'?"),
        ({"grid": {"method": ["flap"], "min_kep": [1]}}, RecipeError, "'min_kep'; did you mean 'min_keep'?"),
        ({"grid": {"method": ["flpa"]}}, UnknownMethodError, "did you mean 'flap'?"),
        ({"grid": {"method": ["flap"], "sparsity": [0.2, 1.3]}}, OptionError, "point flap-sparsity=1.3: .*in .0, 1"),
        ({"grid": {"method": ["flap", "wanda"], "min_keep": [2]}}, OptionError, "wanda has no option 'min_keep'"),
        ({"grid": {"method": ["flap"], "samples": [0]}}, RecipeError, "calibration.samples"),
        ({"grid": {"method": ["flap"], "steps.2.sparsity": [0.1]}}, RecipeError, "names step 2, but the recipe has 1"),
        ({"grid": {"method": ["flap"], "samples": 1, "calibration.samples": 2}}, RecipeError, "are the same"),
        ({"grid": {"method": ["wanda"], "sparsity": 0.3, "pattern": "2:4"}}, RecipeError, "contradicts pattern 2:4"),
        ({"grid": {"method": ["flap"]}, "retries": -1}, RecipeError, "sweep.retries"),
        ({"search": {"trails": 3, "method": ["flap"]}}, RecipeError, "'trails'; did you mean 'trials'?"),
        ({"search": {"trials": 0, "method": ["flap"]}}, RecipeError, "sweep.search.trials"),
        ({"search": {"trials": 3}}, RecipeError, "has no axis"),
        ({"search": {"method": "flap", "sparsity": [0.7, 0.2]}}, RecipeError, "low must be below high"),
        ({"search": {"method": "flap", "sparsity": [0.2, 1.3]}}, OptionError, "sparsity must lie in"),
        (
            {"search": {"method": "flap", "sparsity": {"low": 0.2, "high": 0.3, "setp": 1}}},
            RecipeError,
            "did you mean 'step'?",
        ),
        ({"search": {"method": "flap", "objective": "perplxity:x"}}, UsageError, "did you mean 'perplexity'?"),
    ],
)
def test_mistakes_are_one_sentence_that_names_the_file(sweep, error, said):
    with pytest.raises(error, match=said) as caught:
        make_sweep({"model": "m", "sweep": sweep}, "r.yaml")
    assert str(caught.value).startswith("r.yaml") and str(caught.value).count("r.yaml") == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"model": "m", "swep": {}}, "has no key 'sweep'.*there is 'swep'"),
        ({"sweep": {"grid": {"method": ["flap"]}}}, "'model' is missing"),
        ({"modle": "m", "sweep": {"grid": {"method": ["flap"]}}}, "unknown key 'modle'; did you mean 'model'?"),
        ({"model": "m", "steps": [], "sweep": {"grid": {"method": ["flap"]}}}, "steps must be a list"),
        ({"model": "m", "calibration": 3, "sweep": {"grid": {"method": ["flap"]}}}, "must be mappings"),
        ({"model": "m", "steps": [{}, {}], "sweep": {"grid": {"method": ["flap"]}}}, "say which is meant"),
    ],
)
def test_mistakes_in_the_rest_of_the_recipe(recipe, said):
    with pytest.raises(RecipeError, match=said):
        make_sweep(recipe, "r.yaml")


def test_a_sweep_is_no_recipe_of_a_single_run():
    with pytest.raises(RecipeError, match="run it with 'secateur sweep'"):
        make_recipe({"model": "m", "steps": [{"method": "flap"}], "sweep": {}}, "r.yaml")


def test_the_space_of_a_search():
    space = {
        "method": ["flap", "wanda_sp"],
        "sparsity": [0.2, 0.7],
        "samples": [8, 16, 32],
        "length": [32, 64],
        "min_keep": {"choices": [1, 4]},
        "seed": {"low": 0, "high": 8, "step": 2},
        "round_to": 1,
    }
    sweep = make_sweep(
        {"model": "m", "sweep": {"search": {"trials": 3, "objective": "perplexity:x.txt", **space}}}, "r"
    )
    assert sweep.size == 3 and sweep.axes == list(space)
    assert sweep.space["method"] == Choice(("flap", "wanda_sp"))
    assert sweep.space["sparsity"] == Range(low=0.2, high=0.7)
    assert sweep.space["samples"] == Choice((8, 16, 32))
    assert sweep.space["length"] == Range(low=32, high=64) and Range(low=32, high=64).whole
    assert sweep.space["min_keep"] == Choice((1, 4))
    assert sweep.base.evaluate == ["perplexity:x.txt"]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"method": "wanda", "pattern": "2:4"}, "wanda-pattern=2_4"),
        ({"use_variant": True}, "use_variant=true"),
        ({"method": "wanda", "sparsity": 0.30000000000000004}, "wanda-sparsity=0.30000000000000004"),
    ],
)
def test_names_of_points(values, name):
    assert point_name(values) == name


def test_names_of_points_are_names_of_folders_and_differ():
    names = [point_name({"source": source}) for source in ("../a.txt", ".._a.txt", "a/b", "a_b", "x" * 300, "x" * 301)]
    assert len(set(names)) == len(names)
    assert not any("/" in name or name.startswith(".") or len(name) > 120 for name in names)


def test_a_file_is_read_like_a_recipe(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("model: m\nsweep: {grid: {method: wanda, pattern: [2:4, 4:8]}}\n", encoding="utf8")
    assert [p.recipe.steps[0].pattern for p in load_sweep(path).points] == ["2:4", "4:8"]
