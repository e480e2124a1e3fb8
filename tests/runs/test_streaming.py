"""A checkpoint that is pruned block by block becomes, bit for bit, what the model in memory becomes."""

import dataclasses
import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur as sc
from families import FAMILY_CONFIGS, make_tiny, tiny_ids
from runs import plan_for, tokens_of
from secateur.errors import ModelLoadError, NonFiniteError, UnsupportedModelError, UsageError
from secateur.methods import make_method
from secateur.models import loading
from secateur.models.opening import open_source
from secateur.models.shards import parse_size
from secateur.models.sources import CheckpointSource, Source
from secateur.runs.applying import apply_plans
from secateur.runs.checking import outside_checked
from secateur.runs.folder import StepFolder
from secateur.runs.pipeline import Output, Resources, apply_step, prune_step
from secateur.runs.signals import StopRequest

IDS = tiny_ids(6)
METHODS = {
    "wanda": ("wanda", {}),
    "wanda 2:4": ("wanda", {"pattern": "2:4"}),
    "wanda, global": ("wanda", {"scope": "global"}),
    "sparsegpt": ("sparsegpt", {}),
    "magnitude, global": ("magnitude", {"scope": "global", "sparsity": 0.7}),
    "flap": ("flap", {"sparsity": 0.3}),
    "wanda_sp": ("wanda_sp", {"sparsity": 0.3}),
    "random_sp, query heads": ("random_sp", {"sparsity": 0.3, "heads": "query"}),
    "shortgpt": ("shortgpt", {"layers": 1}),
    "angular": ("angular", {"layers": 2}),
    "blockpruner": ("blockpruner", {"sublayers": 3}),
    "amp": ("amp", {"sparsity": 0.3}),
}
HEALED = {
    "magnitude, refit": ("magnitude", {"heal": "refit", "target": "dense"}),
    "flap, refit": ("flap", {"sparsity": 0.3, "heal": "refit"}),
    "wanda, refit to the stream": ("wanda", {"sparsity": 0.5, "heal": "refit", "target": "stream"}),
    "magnitude_sp, bias": ("magnitude_sp", {"sparsity": 0.3, "heal": "bias"}),
    "tyr": ("tyr", {"sparsity": 0.3, "levels": 3, "iterations": 2, "generations": 1, "offspring": 2}),
    "llm_pruner, refit": ("llm_pruner", {"sparsity": 0.3, "heal": "refit", "rounds": 2}),
    "loraprune": ("loraprune", {"sparsity": 0.3, "steps": 2, "batch": 2, "every": 1}),
    "osscar": ("osscar", {"sparsity": 0.3, "local_search": True}),
}


def step(path: Path) -> StepFolder:
    return StepFolder(path, StopRequest(), "")


def silent(*_: object) -> None:
    pass


def stream(folder: Path, work: Path, method: str, options: dict, *, limit: int | None = None, **output):
    source, _ = open_source(folder)
    assert isinstance(source, CheckpointSource)
    try:
        return prune_step(
            step(work),
            make_method(method, options),
            source,
            tokens_of(IDS),
            resources=Resources(torch.float32, 2 * IDS.shape[1], activation_memory=limit),
            output=Output(**output),
            seed=0,
            progress=silent,
        )
    finally:
        source.close()


def same(folder: Path, cut) -> None:
    loaded, _ = sc.load(folder, dtype="auto")
    ours, theirs = loaded.state_dict(), cut.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, cut(IDS).logits)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_a_skeleton_has_what_the_model_has(family, tmp_path):
    model = make_tiny(family)
    model.save_pretrained(tmp_path)
    source, _ = open_source(tmp_path)
    assert isinstance(source, CheckpointSource)
    assert all(p.is_meta for p in source.model.parameters())
    buffers = dict(source.model.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    assert all(torch.equal(source.tensor(name), p) for name, p in model.named_parameters())
    source.close()


# What is particular to a family (names, layouts, what is tied) and to a method (what it puts in a plan) meets in the
# first family with every method, and in every family with three methods: of each of these kinds in turn.
KINDS = (
    ("wanda", "wanda 2:4", "wanda, global", "blockpruner"),
    ("sparsegpt", "magnitude, global", "shortgpt", "angular"),
    ("flap", "wanda_sp", "random_sp, query heads", "amp"),
)
PAIRS = sorted(
    {(family, kind[number % len(kind)]) for number, family in enumerate(FAMILY_CONFIGS) for kind in KINDS}
    | {(next(iter(FAMILY_CONFIGS)), case) for case in METHODS}
)


def test_every_family_meets_every_kind_of_method():
    assert {case for kind in KINDS for case in kind} == set(METHODS)
    assert {family for family, _ in PAIRS} == set(FAMILY_CONFIGS) and {case for _, case in PAIRS} == set(METHODS)


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_streamed_equals_in_memory(family, case, tmp_path):
    check_streamed(family, *METHODS[case], tmp_path)


@pytest.mark.parametrize("family", ["llama-tied-bias", "gpt2"])
@pytest.mark.parametrize("case", HEALED)
def test_what_heals_streams_alike(family, case, tmp_path):
    check_streamed(family, *HEALED[case], tmp_path)


@pytest.mark.parametrize("case", [("wanda", {"sparsity": 0.5}), ("flap", {"sparsity": 0.3})])
def test_both_streams_of_hidden_states_go_to_files(case, tmp_path):
    method, options = case[0], {**case[1], "heal": "refit", "target": "dense"}
    model = make_tiny("llama")
    model.save_pretrained(tmp_path / "dense")
    plan = plan_for(method, model, IDS, **options)
    result = stream(tmp_path / "dense", tmp_path / "work", method, options, limit=1000)
    assert (tmp_path / "work" / "hidden" / "hidden.bin").is_file()
    assert (tmp_path / "work" / "hidden" / "dense" / "hidden.bin").is_file()
    assert plan.values and all(torch.equal(values, result.plan.values[name]) for name, values in plan.values.items())


def test_gradients_on_their_way_back_and_what_enters_every_block_go_to_files(tmp_path):
    model = make_tiny("llama")
    model.save_pretrained(tmp_path / "dense")
    plan = plan_for("llm_pruner", model, IDS, sparsity=0.3)
    result = stream(tmp_path / "dense", tmp_path / "work", "llm_pruner", {"sparsity": 0.3}, limit=1000)
    hidden = tmp_path / "work" / "round-0" / "hidden"
    assert {path.parent.name for path in hidden.rglob("hidden.bin")} >= {"down", *(f"into-{i:05d}" for i in range(3))}
    assert not plan.diff(result.plan)
    for name, scores in plan.scores.items():
        torch.testing.assert_close(result.plan.scores[name], scores)


def check_streamed(family, method, options, tmp_path):
    model = make_tiny(family)
    try:
        plan = plan_for(method, model, IDS, **options)
    except (UnsupportedModelError, UsageError) as refused:
        # what the family doesn't allow must be refused on disk just the same
        model.save_pretrained(tmp_path / "dense")
        with pytest.raises(type(refused), match=re.escape(str(refused))):
            stream(tmp_path / "dense", tmp_path / "work", method, options)
        return
    model.save_pretrained(tmp_path / "dense")
    result = stream(tmp_path / "dense", tmp_path / "work", method, options)
    assert not plan.diff(result.plan)
    assert all(torch.equal(bias, result.plan.biases[name]) for name, bias in plan.biases.items())
    same(result.folder, sc.apply(plan, model))
    # the same plan on disk, applied to the same checkpoint, gives the same files
    result.plan.save(tmp_path / "plan")
    source, _ = open_source(tmp_path / "dense")
    again = apply_step(
        step(tmp_path / "again"), sc.Plan.load(tmp_path / "plan"), source, output=Output(), progress=silent
    )
    source.close()
    weights = "model.safetensors"
    assert (again.folder / weights).read_bytes() == (result.folder / weights).read_bytes()
    assert again.plain == result.plain


@pytest.mark.parametrize("family", ["llama-tied-bias", "gpt2", "gpt_neox"])
def test_packed_and_sharded(family, tmp_path):
    model = make_tiny(family)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    result = stream(tmp_path / "dense", tmp_path / "work", "wanda", {}, format="packed", max_shard_size=20_000)
    shards = list(result.folder.glob("*.safetensors"))
    assert len(shards) > 1 and all(file.stat().st_size < 24_000 for file in shards)
    cut = sc.apply(plan_for("wanda", model, IDS), model)
    same(result.folder, cut)
    # a packed checkpoint is itself a source
    further = stream(result.folder, tmp_path / "further", "magnitude_sp", {"sparsity": 0.4})
    same(further.folder, sc.apply(plan_for("magnitude_sp", cut, IDS, sparsity=0.4), cut))


def test_a_non_uniform_checkpoint_is_a_source(tmp_path):
    model = make_tiny("llama")
    model.save_pretrained(tmp_path / "dense")
    first = stream(tmp_path / "dense", tmp_path / "1", "flap", {"sparsity": 0.3})
    assert not first.plain
    second = stream(first.folder, tmp_path / "2", "sparsegpt", {})
    cut = sc.apply(plan_for("flap", model, IDS, sparsity=0.3), model)
    same(second.folder, sc.apply(plan_for("sparsegpt", cut, IDS), cut))


def test_spilled_activations_change_nothing(tmp_path):
    make_tiny("llama").save_pretrained(tmp_path / "dense")
    whole = stream(tmp_path / "dense", tmp_path / "1", "sparsegpt", {})
    spilled = stream(tmp_path / "dense", tmp_path / "2", "sparsegpt", {}, limit=1000)
    assert (tmp_path / "2" / "hidden" / "hidden.bin").stat().st_size == IDS.numel() * 32 * 4
    for name in ("model.safetensors",):
        assert (whole.folder / name).read_bytes() == (spilled.folder / name).read_bytes()


def test_a_bare_base_model(tmp_path):
    model = make_tiny("gpt2")
    model.base_model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    source, _ = open_source(tmp_path / "base")
    assert isinstance(source, CheckpointSource)
    assert source.stored["transformer.h.0.attn.c_attn.weight"].name == "h.0.attn.c_attn.weight"
    assert all(torch.equal(source.tensor(name), p) for name, p in model.named_parameters())
    source.close()


def test_what_cannot_be_streamed_is_loaded_whole(tmp_path, monkeypatch):
    make_tiny("llama").save_pretrained(tmp_path)
    open_folder = loading.open_folder
    # as for experts, which transformers stacks
    monkeypatch.setattr(loading, "open_folder", lambda *a: dataclasses.replace(open_folder(*a), converted=True))
    source, _ = open_source(tmp_path)
    assert type(source) is Source and source.folder is None


def test_a_missing_shard_is_named(tmp_path):
    make_tiny("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ModelLoadError, match="missing"):
        open_source(tmp_path)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("300", 300), ("2kb", 2000)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 bananas", "0", "nan"])
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError, match="a size is a number with a unit"):
        parse_size(text)


def spoilt(folder: Path, copy: Path, name: str) -> Path:
    """A copy of a checkpoint in which one entry of a tensor is NaN."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


UP = "model.layers.1.mlp.up_proj.weight"
NOT_FINITE = {
    UP: rf"layer 1, {re.escape(UP)}: 1 of \d+ weights",
    "model.norm.weight": r"^model\.norm\.weight: 1 or more weights are NaN or inf",
    "model.embed_tokens.weight": r"^model\.embed_tokens\.weight: 1 or more weights are NaN or inf",
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_a_plan_applied_to_weights_that_are_not_finite_writes_nothing(name, tiny_checkpoint, tmp_path):
    model, _ = sc.load(tiny_checkpoint)
    plan = sc.plan(model, method="magnitude", sparsity=0.5)
    bad = spoilt(tiny_checkpoint, tmp_path / "bad", name)
    with pytest.raises(NonFiniteError, match=NOT_FINITE[name]):
        apply_plans([plan], bad, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


@pytest.mark.parametrize("name", NOT_FINITE)
def test_weights_that_are_not_finite_are_refused_and_nothing_is_left(name, tiny_checkpoint, tmp_path):
    bad = spoilt(tiny_checkpoint, tmp_path / "bad", name)
    job = {"model": str(bad), "out": str(tmp_path / "out"), "calibration": {"samples": 2, "length": 32}}
    with pytest.raises(NonFiniteError, match=NOT_FINITE[name]):
        sc.run({**job, "steps": [{"method": "wanda"}]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_what_is_found_outside_the_blocks_ends_the_work_on_them(tiny_checkpoint, tmp_path):
    source, _ = open_source(spoilt(tiny_checkpoint, tmp_path / "bad", "model.norm.weight"))
    steps = []
    with (
        pytest.raises(NonFiniteError, match=r"^model\.norm"),
        outside_checked(source, lambda *step: steps.append(step)) as report,
    ):
        while len(steps) < 1000:
            report("prune", len(steps) + 1, 1000)
            time.sleep(0.01)
    assert len(steps) < 1000
    source.close()
