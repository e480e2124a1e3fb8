"""Trainings from recipes: what they leave, that they are the plain loop, and that they go on to the bit."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import process_jobs
import rank_jobs
import secateur as sc
from forking import Forked
from ranks import run_ranks
from secateur.errors import MissingExtraError, NonFiniteError, OutputError
from secateur.loop import Rate, examples_of, step_seed
from secateur.plans import Plan
from secateur.runs import states
from secateur.train.asked import training_methods
from secateur.trainer import make_train_recipe, networks, run_training, tracking
from secateur.trainer.curve import TrainingCurve
from secateur.trainer.examples import Pictures, load_examples
from secateur.trainer.networks import open_network
from secateur.trainer.training import train

DIGITS = {"images": "sklearn:digits?split=train", "test": "sklearn:digits?limit=100"}
MLP = {"name": "perceptron", "options": {"sizes": [64, 32, 10]}}
RESNET = {"name": "resnet20", "options": {"channels": 1, "width": 4, "blocks": 1}}
GMP = {"method": "gmp", "sparsity": 0.9, "every": 2}
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
SMALL = {"model": MLP, "data": DIGITS, "steps": 9, "batch": 16, "optimizer": SGD}


def recipe(**changes: Any) -> Any:
    return make_train_recipe({**SMALL, **changes}, "the recipe")


class Crash(BaseException):
    """What no handler expects."""


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Keep the state after every step, and end behind this one."""
    monkeypatch.setattr(states, "SECONDS_BETWEEN_STATES", 0.0)
    finished = states.StateKeeper.finished

    def crash(self: Any, curve: Any, state: Any, *, last: bool) -> None:
        finished(self, curve, state, last=last)
        if curve.steps == step:
            raise Crash

    monkeypatch.setattr(states.StateKeeper, "finished", crash)


# what is left


def test_a_training_leaves_weights_with_zeros_a_plan_and_a_report(tmp_path):
    out = tmp_path / "out"
    done = run_training(recipe(sparsifier=GMP), out=out, html=True)
    plan, weights = Plan.load(out / "plan"), load_file(out / "model.safetensors")
    assert set(plan.masks) == {"1.weight", "3.weight"}
    for name, mask in plan.masks.items():
        assert torch.equal(weights[name] != 0, mask)
    found = {finding.check: finding.status for finding in sc.verify(out)}
    assert found["zeros"] == found["finite values"] == found["plan"] == "passed" and "failed" not in found.values()
    save_file({**weights, "1.weight": torch.ones_like(weights["1.weight"])}, out / "model.safetensors")
    [zeros] = [finding for finding in sc.verify(out) if finding.check == "zeros"]
    assert zeros.problems == [
        f"1.weight: {int((~plan.masks['1.weight']).sum())} entries that the plan removes are not zero"
    ]
    kept = sum(int(mask.sum()) for mask in plan.masks.values())
    assert kept == round(0.1 * (64 * 32 + 32 * 10)) == pytest.approx((1 - done.trained.sparsity) * 2368)
    report = json.loads((out / "report.json").read_text(encoding="utf8"))
    [section] = report["trainings"]
    assert len(section["losses"]) == len(section["sparsities"]) == len(section["rates"]) == 9
    assert section["sparsities"] == sorted(section["sparsities"]) and section["sparsities"][-1] == report["achieved"]
    assert [step for step, _ in section["measured"]] == list(range(10))
    metrics = {metric["name"]: metric["values"] for metric in report["metrics"]}
    assert metrics["accuracy"]["trained"] == section["measured"][-1][1]["accuracy"]
    # two for a multiply-accumulate of what is left
    assert metrics["operations of inference"] == {"start": 2 * 2368, "trained": 2 * kept}
    page = (out / "report.html").read_text(encoding="utf8")
    assert "Sparsity of the layers" in page and "learning rate" in page
    assert not (tmp_path / "out.run").exists()


def test_the_lines_of_the_readme_load_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = "from secateur.trainer.networks import perceptron\ndef small():\n    return perceptron((64, 8, 10))\n"
    Path("made.py").write_text(lines, encoding="utf8")
    done = run_training(recipe(model="made.py:small", sparsifier=GMP, steps=4), out="out")
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, Any] = {}
    exec(done.report.loading, names)
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(names["module"](x), done.network.module(x))
    assert done.report.loading in Path("out/README.md").read_text(encoding="utf8")


def test_a_training_without_masks_is_dense(tmp_path):
    done = run_training(recipe(), out=tmp_path / "out", html=True)
    assert all(finding.ok for finding in sc.verify(tmp_path / "out"))
    assert done.trained.plan is None and not (tmp_path / "out" / "plan").exists()
    assert done.trained.curve.sparsities == [] and "Training report" in (tmp_path / "out" / "report.html").read_text()
    assert "Trained from `perceptron`" in (tmp_path / "out" / "README.md").read_text(encoding="utf8")


@pytest.mark.parametrize("method", training_methods())
def test_every_method_trains(method):
    every = {"every": 2} if "every" in sc.describe(method)["options"] else {}
    sparsifier = {"method": method, "sparsity": 0.5, **every}
    asked = recipe(sparsifier=sparsifier, model=RESNET, steps=8, optimizer={"name": "adamw", "lr": 1e-2})
    network = open_network(asked)
    done = train(network.module, load_examples(asked, network.module, None), asked)
    assert done.sparsity == pytest.approx(0.5, abs=0.01) and done.plan is not None
    for name, mask in done.plan.masks.items():
        assert not network.module.get_parameter(name)[~mask].any()


@pytest.mark.parametrize(("pattern", "format"), [("2:4", "packed"), ("", "dense")])
def test_a_language_model(pattern, format, tiny_checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a text that says little and says it again. " * 400, encoding="utf8")
    data = {"text": str(text), "length": 32, "windows": 4}
    how = {"model": str(tiny_checkpoint), "data": data, "batch": 4, "optimizer": {"name": "adamw", "lr": 1e-2}}
    sparsifier = {"method": "gmp", "every": 2, **({"pattern": pattern} if pattern else {"sparsity": 0.5})}
    done = run_training(recipe(**how, sparsifier=sparsifier, format=format), out=tmp_path / "out")
    model, tokenizer = sc.load(tmp_path / "out")
    assert tokenizer is not None and all(finding.ok for finding in sc.verify(tmp_path / "out"))
    assert done.trained.plan is not None
    for name, mask in done.trained.plan.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)
    if pattern:
        mask = next(iter(done.trained.plan.masks.values()))
        assert (mask.reshape(-1, 4).sum(1) == 2).all()
        assert "packed" in (tmp_path / "out" / "config.json").read_text(encoding="utf8")
    (_, before), (_, after) = done.trained.curve.measured[0], done.trained.curve.measured[-1]
    assert after["perplexity"] < before["perplexity"]


# the plain loop


def test_it_is_the_plain_loop():
    asked = recipe(sparsifier=GMP, smoothing=0.1, clip=0.5, schedule={"shape": "linear", "warmup": 0.3})
    network = open_network(asked)
    examples = load_examples(asked, network.module, None)
    train(network.module, examples, asked)
    assert isinstance(examples, Pictures)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = networks.perceptron((64, 32, 10))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    sparsifier = sc.Sparsifier(plain, optimizer, method="gmp", sparsity=0.9, every=2, steps=9)
    for step in range(9):
        numbers = examples_of(step, 16, 1000, 0)
        scores = plain(examples.x[numbers])
        F.cross_entropy(scores, examples.y[numbers], label_smoothing=0.1).backward()
        sparsifier.mask_gradients()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = 0.1 * (step + 1) / 3 if step < 3 else 0.1 * (1 - (step - 3) / 6)
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    for mine, theirs in zip(network.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)


def test_parts_of_a_batch_add_up_to_it():
    found = []
    for micro in (0, 4):
        asked = recipe(sparsifier=GMP, micro=micro)
        network = open_network(asked)
        train(network.module, load_examples(asked, network.module, None), asked)
        found.append(network.module.state_dict())
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "rates"),
    [
        ({"shape": "constant", "warmup": 0.4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"shape": "linear", "floor": 0.5}, [1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55]),
        ({"shape": "steps", "milestones": (0.5, 0.8), "gamma": 0.1}, [1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01]),
    ],
)
def test_learning_rates(shape, rates):
    rate = Rate(1.0, 10, **shape)
    assert [rate(step) for step in range(10)] == pytest.approx(rates)


def test_augmentation_moves_and_turns_pictures_by_the_number_of_the_step():
    x = torch.arange(2 * 16.0).reshape(2, 1, 4, 4) + 1
    pictures = Pictures(x, torch.zeros(2).long(), x, torch.zeros(2).long(), "", ("flip", "crop=1"))

    def seen(step: int) -> torch.Tensor:
        torch.manual_seed(step_seed(step, 0))
        return pictures._augmented(x)

    assert torch.equal(seen(3), seen(3)) and any(not torch.equal(seen(3), seen(step)) for step in range(4, 8))
    padded = [F.pad(one, (1,) * 4) for picture in x for one in (picture, picture.flip(-1))]
    windows = [w for one in padded for w in one.unfold(1, 4, 1).unfold(2, 4, 1).reshape(-1, 4, 4)]
    for step in range(6):
        assert all(any(torch.equal(one[0], window) for window in windows) for one in seen(step))


# stopped, killed, and gone on with


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsifier": GMP, "data": {**DIGITS, "augment": ["flip", "crop=1"]}},
        {"sparsifier": {"method": "rigl", "every": 2}, "model": RESNET, "optimizer": {"name": "adam", "lr": 1e-3}},
        {"sparsifier": {"method": "snfs", "every": 3}},
        {"sparsifier": {"method": "snip", "sparsity": 0.8}, "optimizer": {"name": "rmsprop", "lr": 1e-3}},
        {},
    ],
    ids=["gmp", "rigl", "snfs", "snip", "dense"],
)
def test_a_training_that_crashed_goes_on_to_the_bit(changes, tmp_path, monkeypatch):
    whole = run_training(recipe(**changes), out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        crash_at(patch, 5)
        with pytest.raises(Crash):
            run_training(recipe(**changes), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = run_training(recipe(**changes), out=tmp_path / "out", resume=True)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert first == second
    mine, theirs = again.trained.curve, whole.trained.curve
    assert (mine.losses, mine.sparsities, mine.measured) == (theirs.losses, theirs.sparsities, theirs.measured)
    if whole.trained.plan is not None and again.trained.plan is not None:
        assert again.trained.plan.diff(whole.trained.plan).rows == {}
        assert again.trained.flops == whole.trained.flops


RECIPE = """
model: {name: resnet20, options: {channels: 1, width: 4, blocks: 1}}
data: {images: "sklearn:digits?split=train", test: "sklearn:digits?limit=50"}
steps: 4
batch: 8
optimizer: {name: sgd, lr: 0.1, momentum: 0.9}
sparsifier: {method: granet, sparsity: 0.9, every: 1}
out: out
"""


def test_a_process_that_is_killed_goes_on_to_the_same_bytes(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.yaml").write_text(RECIPE, encoding="utf8")
    with Forked(["train", "train.yaml", "--quiet"], before=process_jobs.die_in_training) as process:
        assert process.wait() == -signal.SIGKILL
    assert not Path("out").exists() and Path("out.run").is_dir()
    refused = cli("train", "train.yaml")
    assert refused.code == 1 and "holds an unfinished run: add --resume" in refused.err
    other = cli("train", "train.yaml", "--resume", "--seed", 1)
    assert other.code == 1 and "can't go on" in other.err
    done = cli("train", "train.yaml", "--resume", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["trainings"][0]["sparsities"][-1] == pytest.approx(0.9, abs=0.01)
    assert not Path("out.run").exists()
    shutil.move("out", "resumed")
    whole = cli("train", "train.yaml")
    assert whole.code == 0 and "out/README.md says how to load it" in whole.out
    assert Path("out/model.safetensors").read_bytes() == Path("resumed/model.safetensors").read_bytes()
    again = cli("train", "train.yaml")
    assert again.code == 1 and "out exists and is not empty" in again.err and again.err.count("\n") == 1


def test_ranks_share_every_step(tmp_path):
    changes = {**SMALL, "sparsifier": {"method": "rigl", "every": 2}, "micro": 8}
    run_training(make_train_recipe(changes, "the recipe"), out=tmp_path / "one")
    run_ranks(rank_jobs.train, 2, changes, tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "report.json").read_text())["trainings"][0] for name in ("one", "two"))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4) and two["sparsities"] == one["sparsities"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-3, atol=1e-4)
        assert torch.equal(second[name] != 0, weight != 0)
    assert not (tmp_path / "two.run").exists()


# networks of others


def test_a_classifier_of_transformers(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=10)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    done = run_training(recipe(model=str(tmp_path / "vit"), sparsifier=GMP), out=tmp_path / "out")
    assert done.trained.sparsity == pytest.approx(0.9, abs=0.01)
    fresh = {"name": str(tmp_path / "vit"), "start": "random"}
    drawn = [open_network(recipe(model=fresh, seed=seed)).module.classifier.weight for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_models_of_timm(monkeypatch):
    made: list[Any] = []

    def create_model(name: str, **options: Any) -> nn.Module:
        made.append((name, options))
        return networks.perceptron((64, 10))

    timm = types.SimpleNamespace(list_models=lambda: ["resnet18", "vit_tiny"], create_model=create_model)
    monkeypatch.setitem(sys.modules, "timm", timm)
    open_network(recipe(model={"name": "timm:resnet18", "options": {"num_classes": 10}}))
    assert made == [("resnet18", {"pretrained": False, "num_classes": 10})]
    with pytest.raises(sc.SecateurError, match=r"no model 'resnet81'; did you mean 'resnet18'\?"):
        open_network(recipe(model="timm:resnet81"))


# what is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": True}, "steps: must be a number, not true"),
        (
            {"sparsifier": {"method": "gmp", "every": 1, "sparsity": 0.3, "pattern": "2:4"}},
            "sparsity 0.3 contradicts pattern 2:4",
        ),
        ({"bacth": 3}, "unknown key 'bacth'; did you mean 'batch'?"),
        ({"data": {"imges": "x"}}, "unknown key 'imges' in data; did you mean 'images'?"),
        ({"data": {"images": "x"}}, "data: pictures need test"),
        ({"data": {"images": "x", "test": "y", "augment": ["blur"]}}, "augment takes flip and crop=PIXELS, got 'blur'"),
        ({"data": {"images": "x", "text": "y"}}, "give images or text"),
        ({"data": {"images": "x?sise=3", "test": "y"}}, "no setting 'sise'; did you mean 'size'?"),
        ({"epochs": 3}, "by steps or by epochs"),
        ({"optimizer": {"name": "sdg"}}, "optimizer.name.*got 'sdg'"),
        ({"optimizer": {"name": "sgd", "momentun": 0.9}}, "sgd has no option 'momentun'; did you mean 'momentum'?"),
        ({"optimizer": {"name": "sgd", "momentum": -1}}, "sgd can't be made with .*: Invalid momentum value: -1"),
        (
            {"optimizer": {"name": "adamw", "betas": [0.9]}},
            r"adamw can't be made with \{'betas': \[0.9\]\}: tuple index",
        ),
        ({"optimizer": {"name": "adamw", "betas": 0.9}}, r"adamw can't be made with \{'betas': 0.9\}"),
        (
            {"optimizer": {"name": "sgd", "fused": True, "foreach": True}},
            "sgd can't be made with .*`fused` and `foreach` cannot be",
        ),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr: input should be a finite number, got inf"),
        ({"epochs": float("inf"), "steps": None}, "epochs: input should be a finite number, got inf"),
        ({"schedule": {"shape": "steps"}}, "milestones are for the shape steps, which needs them"),
        ({"schedule": "cosin"}, "schedule.shape.*got 'cosin'"),
        ({"sparsifier": {"method": "gnp"}}, "unknown method 'gnp'; did you mean 'gmp'?"),
        ({"sparsifier": {"method": "gmp", "evry": 3}}, "gmp has no option 'evry'; did you mean 'every'?"),
        ({"sparsifier": {"method": "gmp", "sparsity": 1.5}}, r"sparsity must lie in \[0, 1\), got 1.5"),
        ({"sparsifier": {"method": "gmp", "begin": 8, "every": 1}}, "ends at step 6, before it begins at step 8"),
        ({"sparsifier": {"method": "flap"}}, "flap doesn't prune while a network is trained"),
        ({"format": "packed"}, "packed checkpoints are those of language models"),
        ({"steps": [{"method": "flap"}]}, "run it with 'secateur prune --recipe'"),
        ({"lottery": {}}, "run it with 'secateur lottery'"),
    ],
)
def test_bad_recipes_are_refused_before_anything_is_loaded(changes, said):
    with pytest.raises(sc.SecateurError, match=said) as caught:
        recipe(**changes)
    assert str(caught.value).startswith("the recipe") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "perceptrn"}, "there is no network 'perceptrn'; did you mean 'perceptron'?"),
        (
            {"model": {"name": "perceptron", "options": {"size": [1]}}},
            "has no option 'size'; did you mean 'sizes'?",
        ),
        (
            {"model": {"name": "perceptron", "options": {"sizes": [63, 10]}}},
            "doesn't run on images of 100x1x8x8",
        ),
        ({"model": {"name": "perceptron", "options": {"sizes": [64, 9]}}}, "hold class 9, and the network tells 9"),
        ({"data": {**DIGITS, "test": "sklearn:wine"}}, "there is sklearn:digits, not sklearn:wine"),
        ({"data": {**DIGITS, "test": "sklearn:digits?size=4"}}, "images to train on are 1x8x8 and those of test 1x4x4"),
        ({"sparsifier": {**GMP, "exclude": ["*"]}}, "has no weights to prune"),
        ({"track": ["wandb"]}, "track: wandb is not installed"),
        ({"batch": 10, "micro": 4}, "batch 10 can't be shared by 1 rank in forwards of 4 images"),
        ({"device": "cuda:7"}, "device cuda:7 can't be used"),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_nothing_is_left(changes, said, tmp_path):
    with pytest.raises(sc.SecateurError, match=said) as caught:
        run_training(recipe(**changes), out=tmp_path / "out")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_loss_that_breaks_leaves_nothing(tmp_path):
    with pytest.raises(NonFiniteError, match=r"try a lower learning rate \(lr\) than 1e\+30"):
        run_training(recipe(optimizer={"name": "sgd", "lr": 1e30}, measure=9), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# trackers


def test_a_finished_training_is_kept_when_it_cannot_be_written(tmp_path):
    def in_the_way(stage, done, total):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "notes.txt").touch()

    with pytest.raises(OutputError, match=r"exists.*with --resume goes on from there"):
        run_training(recipe(steps=2), out=tmp_path / "out", progress=in_the_way)
    (tmp_path / "out" / "notes.txt").unlink()
    again = run_training(recipe(steps=2), out=tmp_path / "out", resume=True)
    assert again.trained.curve.steps == 2 and not (tmp_path / "out.run").exists()


def test_trackers_are_told_of_every_step(tmp_path, monkeypatch):
    from accelerate import tracking as accelerate

    told: dict[int, dict[str, float]] = {}

    class Tracker:
        def __init__(self, run: str, logging_dir: str) -> None:
            assert run == "out" and logging_dir == str(tmp_path / "out.logs")

        def log(self, values: dict[str, float], step: int) -> None:
            told.setdefault(step, {}).update(values)

        def finish(self) -> None:
            told[-1] = {}

    monkeypatch.setattr(accelerate, "TensorBoardTracker", Tracker)
    with pytest.raises(MissingExtraError, match="pip install tensorboard"):
        run_training(recipe(track=["tensorboard"]), out=tmp_path / "out")
    monkeypatch.setattr(tracking, "check_trackers", lambda names: None)
    monkeypatch.setattr("secateur.trainer.run.check_trackers", lambda names: None)
    done = run_training(recipe(track=["tensorboard"], sparsifier=GMP, measure=3), out=tmp_path / "out")
    assert [told[step]["loss"] for step in range(1, 10)] == done.trained.curve.losses
    assert [told[step]["sparsity"] for step in range(1, 10)] == done.trained.curve.sparsities
    assert {step for step in told if "test accuracy" in told[step]} == {0, 3, 6, 9} and -1 in told
    # gone on with behind step 3, which was told already
    told.clear()
    with tracking.tracking(["tensorboard"], "out", tmp_path / "out.logs", {}, lambda step: 0.1) as watch:
        watch(TrainingCurve(losses=[1.0] * 4, measured=[(0, {"accuracy": 0.1}), (3, {"accuracy": 0.2})]))
    assert told == {4: {"loss": 1.0, "learning rate": 0.1}, -1: {}}
