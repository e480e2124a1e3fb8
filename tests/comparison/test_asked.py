"""What may be asked of a comparison, and which points it has."""

from __future__ import annotations

import pytest

from secateur.comparison.asked import ask, split
from secateur.errors import SecateurError, UsageError

RECIPE = {"model": "m", "steps": [{}], "calibration": {"samples": 2, "length": 32}}


def asked(methods, sparsities=(0.2, 0.4), seeds=(0, 1, 2), **recipe):
    return ask({**RECIPE, **recipe}, methods, sparsities, seeds)


def test_commas_stand_between_methods_and_between_options():
    assert split("flap, osscar:damping=0.1,fill=false,wanda:pattern=2:4") == [
        "flap",
        "osscar:damping=0.1,fill=false",
        "wanda:pattern=2:4",
    ]
    assert split("perplexity:a.txt,speed:batch=1,prompt=8,size") == [
        "perplexity:a.txt",
        "speed:batch=1,prompt=8",
        "size",
    ]
    # a task may have settings of its own kind, and several words are taken as they are
    assert split("lm_eval:t?limit=3&fewshot=0,macs") == ["lm_eval:t?limit=3&fewshot=0", "macs"]
    assert split(["perplexity:a,b.txt"]) == ["perplexity:a,b.txt"]
    with pytest.raises(UsageError, match="empty word"):
        split("flap,,osscar")


def test_only_what_is_random_runs_with_every_seed():
    found = asked("random_sp,flap,osscar:damping=0.1", seeds=(0, 5))
    assert found.random == {"random_sp"}
    assert {key: [p.values["seed"] for p in points] for key, points in found.points.items()} == {
        ("random_sp", 0.2): [0, 5],
        ("random_sp", 0.4): [0, 5],
        **{(name, s): [0] for name in ("flap", "osscar:damping=0.1") for s in (0.2, 0.4)},
    }
    assert found.sweep.size == 8
    # a seed that has no say with these options
    few = asked("llm_pruner,llm_pruner:criterion=random,slicegpt,slicegpt:orientation=pca", seeds=(0, 5))
    assert few.random == {"llm_pruner:criterion=random", "slicegpt"}
    # every one of a training's steps follows from the seed
    assert asked("magnitude_sp,flap", steps=[{"heal": "lora:steps=2"}]).random == {"magnitude_sp", "flap"}
    # windows that the seed draws differ for those that read them
    assert asked("magnitude_sp,flap", calibration={"random_windows": True}).random == {"flap"}
    # text that the model writes itself depends on the seed, for those that read it
    drawn = asked("magnitude_sp,flap", calibration={"source": "self"})
    assert drawn.random == {"flap"}
    assert asked("magnitude_sp,flap", calibration={"source": "self"}, steps=[{"heal": "refit"}]).random == {
        "magnitude_sp",
        "flap",
    }


def test_options_of_one_method_go_before_those_of_all():
    found = asked("wanda_sp,wanda_sp:heal=bias", steps=[{"heal": "refit"}])
    steps = {name: points[0].recipe.steps[0] for (name, _), points in found.points.items()}
    assert {name: step.heal for name, step in steps.items()} == {"wanda_sp": "refit", "wanda_sp:heal=bias": "bias"}


@pytest.mark.parametrize("common", ["lora:steps=3,batch=1", "bias+lora:steps=3,batch=1"])
def test_the_training_of_all_follows_a_repair_of_one(common):
    found = asked("wanda_sp,wanda_sp:heal=refit,wanda_sp:heal=norms,wanda_sp:heal=none", steps=[{"heal": common}])
    steps = {name: points[0].recipe.steps[0].heal for (name, _), points in found.points.items()}
    assert steps == {
        "wanda_sp": common,
        "wanda_sp:heal=refit": "refit+lora:steps=3,batch=1",
        # but neither another training nor what wants none
        "wanda_sp:heal=norms": "norms",
        "wanda_sp:heal=none": "none",
    }


@pytest.mark.parametrize(
    ("methods", "more", "said"),
    [
        ("flap", {}, "name two methods or more to compare, got 'flap'"),
        ("flap,wanda_sp,flap", {}, "method flap is named twice"),
        ("flap,flpa", {}, "did you mean 'flap'?"),
        ("flap,osscar:dampng=1", {}, "did you mean 'damping'?"),
        ("flap,osscar:damping=-1", {}, "damping must lie in"),
        ("flap,osscar:damping", {}, "a method is NAME or NAME:KEY=VALUE"),
        ("flap,osscar:samples=3", {}, "osscar:samples=3: samples is the same for all methods of a comparison"),
        ("flap,osscar:sparsity=0.3", {}, "sparsity is the same for all methods"),
        ("flap,spa_l1", {}, "spa_l1 removes coupled channels of a traced module"),
        ("flap,shortgpt", {"steps": [{"heal": "refit"}]}, "shortgpt takes no heal"),
        ("flap,wanda", {"steps": [{"allocate": "owl"}]}, "flap removes heads and neurons"),
        ("flap,osscar", {"sparsities": (0.2, 1.2)}, "sparsities must lie in (0, 1), got '0.2, 1.2'"),
        ("flap,osscar", {"sparsities": ()}, "sparsities must lie in (0, 1)"),
        ("flap,osscar", {"seeds": (-1,)}, "seeds are whole numbers of at least 0"),
    ],
)
def test_misuse_is_one_sentence(methods, more, said):
    with pytest.raises(SecateurError) as caught:
        asked(methods, **more)
    assert said in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2
