"""Estimates of recovery training: operations as torch counts them, memory and disk by hand, and what makes it fit.

The tiny Llama of ``test_numbers``: 2 blocks, hidden 32, 64 neurons, 512 tokens, float32, untied head.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from families import tiny_ids
from secateur.errors import ResourceError, UsageError
from secateur.estimate import build, remedies
from secateur.estimate.disk import checkpoint_bytes, disk
from secateur.estimate.job import Job
from secateur.estimate.machine import Machine
from secateur.estimate.memory import memory
from secateur.estimate.memory import training_memory as memory_of
from secateur.estimate.sizes import Sizes, sizes_of
from secateur.estimate.training import Training, recovery_of, training_alone
from secateur.estimate.work import flops, seconds
from secateur.healing.recovery import parse_recovery
from secateur.healing.recovery.trainer import Windows, recover
from secateur.methods import make_method
from secateur.models.opening import open_source

LINEAR, HEAD = 2 * (3 * 1024 + 3 * 2048), 512 * 32
ENTRIES = LINEAR + 2 * 2 * 32 + 2 * HEAD + 32
SHORT = "steps=3,batch=2,length=16,rank=2"
ADAPTERS = 2 * 2 * (2 * (32 + 32) + 2 * (16 + 32) + 3 * (32 + 64))
# q, k and v of the first block, and their adapters: what they read needs no gradient where nothing before it is trained
FIRST, ADAPTED = 2 * (32 * 32 + 2 * 16 * 32), 2 * 3 * 2 * 32
# a block isn't computed again behind the last input that a gradient needs: that of down_proj, or of its adapter's half
DOWN, UP = 2 * 2 * 32 * 64, 2 * 2 * 2 * 32


@pytest.fixture
def sizes(tiny_checkpoint) -> Sizes:
    source, _ = open_source(tiny_checkpoint)
    source.close()
    return sizes_of(source)


def job(heal: str, method: str = "flap", **options: object) -> Job:
    found = make_method(method, {"sparsity": 0.0, **options})
    # auto is a matter of the machine
    recovery = replace(parse_recovery(heal), dtype="float32")
    return Job(found, samples=4, length=16, dtype=torch.float32, recovery=recovery)


@pytest.mark.parametrize(
    ("heal", "method", "less", "attentions"),
    [
        (f"norms:{SHORT}", "flap", 0, 4),
        (f"full:{SHORT},loss=ce", "flap", 0, 3),
        (f"full:{SHORT},checkpointing=true", "flap", DOWN, 5),
        (f"lora:{SHORT}", "flap", FIRST + ADAPTED, 4),
        (f"lora:{SHORT},checkpointing=true,micro=1", "flap", UP, 5),
        (f"lora:{SHORT}", "magnitude", 2 * FIRST, 4),
    ],
)
def test_operations_are_those_that_torch_counts(sizes, make_llama, heal, method, less, attentions):
    model, teacher = (make_llama(max_position_embeddings=1024) for _ in range(2))
    for one in (model, teacher):
        # torch counts no attention in the kernel that a CPU runs
        one.set_attn_implementation("eager")
    mine = job(heal, method)
    names = [matrix.module for matrix in sizes.anatomy.matrices]
    masks = {f"{name}.weight": model.get_parameter(f"{name}.weight") != 0 for name in names}
    with FlopCounterMode(display=False) as counted:
        recover(
            model,
            Windows(tiny_ids(8), tiny_ids(0)),
            mine.recovery,
            teacher=None if "loss=ce" in heal else teacher,
            modules=names,
            masks=masks if method == "magnitude" else None,
        )
    # here to all tokens, of which half are masked
    masked = attentions * 2 * 2 * 16 * 32
    found = recovery_of(sizes, mine)
    assert counted.get_total_flops() == found.flops() + found.tokens * (masked - less)


def taken(sizes: Sizes, heal: str, method: str = "flap", **options: object) -> dict[str, int]:
    return {name: size for name, size in recovery_of(sizes, job(heal, method, **options)).memory().items() if size}


def test_memory_has_the_student_its_teacher_and_what_is_trained(sizes):
    # a tiny model's walk through its blocks takes more: what is mapped and checked has least sizes
    found = taken(sizes, f"lora:{SHORT}", sparsity=0.25)
    assert (found["whole model"], found["teacher"]) == (4 * (ENTRIES - LINEAR // 4), 4 * ENTRIES)
    # weights, gradients and two moments
    assert found["adapters"] == 4 * 4 * ADAPTERS
    # two blocks and the predictions of 32 tokens; random numbers and what is left of the inputs of adapters
    inputs = 2 * (6 * 32 + 64)
    graph = 32 * (2 * 4 * (4 * 64 + 8 * 32) + 16 * 512 + 8 * inputs)
    assert found["at work"] == graph + 3 * 4 * 2048
    less = taken(sizes, f"lora:{SHORT},checkpointing=true,dropout=0,loss=ce", sparsity=0.25)
    assert less["at work"] == 32 * (4 * (2 * 32 + 4 * 64 + 8 * 32) + 16 * 512) + 3 * 4 * 2048
    assert "teacher" not in less
    full = taken(sizes, f"full:{SHORT}")
    assert full["gradients and moments"] == 12 * ENTRIES and "adapters" not in full
    masked = taken(sizes, f"lora:{SHORT}", "magnitude")
    assert masked["at work"] == found["at work"] + 5 * LINEAR


def test_what_weights_are_cast_to_is_kept_and_moved(sizes):
    def alone(kind: str, more: str = "") -> Training:
        return training_alone(sizes, parse_recovery(f"{kind}:{SHORT},dropout=0{more}"), teacher=sizes)

    def at_work(training: Training) -> int:
        return training.memory()["at work"]

    half, whole = alone("lora", ",dtype=bfloat16"), alone("lora", ",dtype=float32")
    kept = 32 * (2 * (4 * 64 + 8 * 32) + 4 * 512)
    # of activations and predictions the half is left; what the weights of both heads are cast to comes in addition
    assert at_work(half) - at_work(whole) == -2 * kept + 2 * (LINEAR + 2 * HEAD)
    # three forwards; the teacher's blocks are cast in each
    assert half.moved(0) - whole.moved(0) == 4 * 3 * 2 * LINEAR
    again, everything = alone("lora", ",dtype=bfloat16,checkpointing=true"), alone("full", ",dtype=bfloat16")
    assert again.moved(0) - whole.moved(0) == 2 * (half.moved(0) - whole.moved(0))
    assert everything.moved(0) - alone("full", ",dtype=float32").moved(0) == 2 * (half.moved(0) - whole.moved(0))


def test_disk_and_time_have_it_too(sizes):
    mine, none = job(f"lora:{SHORT},held_out=2", sparsity=0.25), job(f"lora:{SHORT}", sparsity=0.25)
    none = replace(none, recovery=None)
    assert disk(sizes, mine) == disk(sizes, none) | {"recovery": 2 * 3 * 4 * ADAPTERS + checkpoint_bytes(sizes, mine)}
    training = recovery_of(sizes, mine)
    # three steps, each of which is a tenth of all at least: before, behind every one; and of the teacher once
    left, attention = 2 * (0.75 * LINEAR + HEAD), 2 * 2 * 16 * 32
    looked = 2 * 16 * (4 * (left + attention) + 2 * (LINEAR + HEAD) + attention)
    assert flops(sizes, mine) == flops(sizes, none) | {"heal": training.flops() + int(looked)}
    rates = dict.fromkeys(Machine.__dataclass_fields__, 1e30)
    machine = Machine(**{**rates, "trained_flops": 1e3})
    assert seconds(sizes, mine, machine)["heal"] == pytest.approx(flops(sizes, mine)["heal"] / 1e3)
    moved = seconds(sizes, mine, replace(machine, trained_flops=1e30, moved=1.0))["heal"]
    dropout = seconds(sizes, replace(mine, recovery=replace(mine.recovery, dropout=0.0)), replace(machine, moved=1.0))
    assert moved > dropout["heal"] - flops(sizes, mine)["heal"] / 1e3 > 0


def test_the_peak_of_a_step_is_that_of_its_training(sizes):
    large = job("full:steps=3,batch=512,length=64")
    found = memory(sizes, large, 1000).process
    own = {name: size for name, size in recovery_of(sizes, large).memory().items() if size}
    # blocks that were read for planning are gone
    assert found == {"process": 1000, **own, "heap": found["heap"]}
    # a model that was loaded as a whole isn't
    loaded = memory(replace(sizes, streamed=False), large, 1000).process
    assert loaded == {**found, "model": sizes.stored}
    split = memory(sizes, replace(large, device="cuda"), 1000)
    assert set(split.device) == set(own)


def test_what_makes_a_training_fit(sizes):
    def needed(one: Job) -> int:
        return memory(sizes, one, 0).total

    def with_(**options: object) -> Job:
        return replace(large, recovery=replace(large.recovery, **options))

    large = job("full:steps=3,batch=4,length=4096")
    kept, alone = with_(checkpointing=True), with_(checkpointing=True, micro=1)
    for changed, text in (
        (kept, "checkpointing=true in --heal"),
        (with_(micro=2), "micro=2 in --heal"),
        (alone, "checkpointing=true in --heal with micro=1 in --heal"),
        (replace(alone, recovery=replace(alone.recovery, loss="ce")), "loss=ce in --heal"),
    ):
        said = remedies.for_memory(sizes, large, needed, needed(changed))
        assert f"{text} would make it fit" in said


def test_a_training_alone_is_counted_as_one_behind_a_cut(sizes):
    options = parse_recovery(f"lora:{SHORT},dtype=float32")
    alone, behind = training_alone(sizes, options, teacher=sizes), recovery_of(sizes, job(f"lora:{SHORT}"))
    assert alone == behind
    # without a teacher the loss is that of the text
    assert training_alone(sizes, options) == replace(alone, teacher=None)
    masked = training_alone(sizes, options, teacher=sizes, masked=True)
    assert masked == recovery_of(sizes, job(f"lora:{SHORT}", "magnitude"))
    found = build.estimate_training("small", alone)
    assert found.steps[0].flops == {"heal": flops(sizes, job(f"lora:{SHORT}"))["heal"]}
    assert found.steps[0].disk == {"checkpoint": sizes.stored, "recovery": 2 * 3 * 4 * ADAPTERS}
    assert set(found.steps[0].seconds) == {"load", "heal", "write"} and found.seconds > 0
    with pytest.raises(UsageError, match="the loss kl compares with a dense model"):
        training_alone(sizes, replace(options, loss="kl"))


def test_ranks_share_the_windows_and_with_fsdp_what_is_trained(sizes):
    alone = training_alone(sizes, parse_recovery("full:steps=3,batch=4,length=16,dtype=float32"), teacher=sizes)
    shared = replace(alone, ranks=2)
    assert (shared.tokens, shared.together) == (alone.tokens // 2, alone.together // 2)
    assert shared.flops() == alone.flops() // 2
    assert shared.memory() == alone.memory() | {"at work": alone.memory()["at work"] // 2}
    sharded = replace(shared, options=replace(shared.options, fsdp=True)).memory()
    assert sharded == shared.memory() | {"gradients and moments": 6 * ENTRIES}


def test_a_training_that_does_not_fit_is_told_what_would(sizes, monkeypatch):
    large = training_alone(sizes, parse_recovery("full:steps=3,batch=4,length=4096,dtype=float32"), teacher=sizes)
    monkeypatch.setattr(build, "resident_bytes", lambda: 0)

    def said(**options: object) -> str:
        lighter = large.lighter(replace(large.options, **options))
        monkeypatch.setattr(build, "available_memory", lambda: memory_of(lighter, 0).total)
        with pytest.raises(ResourceError, match=r"^training small would take ") as refused:
            build.check(build.estimate_training("small", large))
        return str(refused.value).partition("are there: ")[2].partition(" would make")[0]

    assert said(checkpointing=True) == "--set checkpointing=true"
    assert said(micro=2) == "--set micro=2"
    assert said(checkpointing=True, micro=1) == "--set checkpointing=true with --set micro=1"
    assert said(checkpointing=True, micro=1, loss="ce").endswith(" with --loss ce")


def test_targets_that_there_are_not_are_refused_before_anything_runs(sizes):
    with pytest.raises(UsageError, match="no module of the blocks is called 'o_porj'; did you mean 'o_proj'"):
        flops(sizes, job("lora:targets=o_porj"))
