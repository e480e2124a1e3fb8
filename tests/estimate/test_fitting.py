"""What doesn't fit is refused with the option that makes it fit, and that option does."""

import json
from dataclasses import replace

import pytest
import torch

from secateur.errors import ResourceError
from secateur.estimate import build, remedies
from secateur.estimate.disk import disk
from secateur.estimate.job import Job
from secateur.estimate.memory import memory
from secateur.estimate.outline import outline
from secateur.estimate.work import flops
from secateur.methods import make_method
from secateur.ranks import Ranks
from secateur.recipes import make_recipe
from secateur.report.numbers import format_bytes

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 1000,
    "dtype": "bfloat16",
}


@pytest.fixture
def sizes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return outline(tmp_path)[0]


def remedy(sizes, job, limit):
    return remedies.for_memory(sizes, job, lambda j: memory(sizes, j, 0).total, limit)


def needed(sizes, job):
    return memory(sizes, job, 0).total


def test_hidden_states_that_are_too_many_go_to_a_file(sizes):
    job = Job(make_method("wanda"), samples=1024, length=1024, dtype=torch.bfloat16)
    spilled = replace(job, activation_memory=10**9)
    assert needed(sizes, job) > needed(sizes, spilled)
    assert remedy(sizes, job, needed(sizes, spilled)).startswith("--activation-memory 1GB would make it fit")


def test_half_the_dtype_comes_before_less_data(sizes):
    job = Job(make_method("wanda"), samples=8, length=512, dtype=torch.float32)
    assert remedy(sizes, job, needed(sizes, job) - 1).startswith("--dtype bfloat16 would")
    half = replace(job, dtype=torch.bfloat16)
    assert remedy(sizes, half, needed(sizes, half) - 1).startswith("--length 256 would")
    assert remedy(sizes, replace(half, samples=16), needed(sizes, half)).startswith("--samples 8 would")


def test_a_hessian_that_is_too_large_asks_for_another_method(sizes):
    job = Job(make_method("sparsegpt", {"pattern": "2:4"}), samples=8, length=128, dtype=torch.bfloat16)
    plain = replace(job, method=make_method("wanda", {"pattern": "2:4"}))
    assert remedy(sizes, job, needed(sizes, plain)).startswith("--method wanda would make it fit")


def test_options_are_put_together_when_none_is_enough(sizes):
    job = Job(make_method("sparsegpt"), samples=512, length=512, dtype=torch.float32)
    least = replace(job, method=make_method("wanda"), dtype=torch.bfloat16, activation_memory=64 * 10**6)
    said = remedy(sizes, job, needed(sizes, least))
    assert said.startswith("--activation-memory 64MB with --dtype bfloat16 with --method wanda would make it fit (")


def test_what_never_fits_says_what_was_tried(sizes):
    job = Job(make_method("wanda"), samples=8, length=128, dtype=torch.bfloat16)
    assert remedy(sizes, job, 1000) == "no option makes it fit"
    said = remedy(sizes, replace(job, dtype=torch.float32), 1000)
    assert said == f"no option makes it fit, not even --dtype bfloat16 ({format_bytes(needed(sizes, job))})"


def test_a_full_disk_asks_for_packed_weights_or_another_place(sizes):
    job = Job(make_method("magnitude"), samples=1, length=1, dtype=torch.bfloat16)
    packed = sum(disk(sizes, replace(job, format="packed")).values())
    assert remedies.for_disk(sizes, job, packed).startswith("--format packed would make it fit")
    assert remedies.for_disk(sizes, job, packed - 1) == "give --out a place on a larger disk"


def test_check_refuses_memory_and_disk(sizes, monkeypatch, tmp_path):
    recipe = make_recipe({"model": "big", "steps": [{"method": "magnitude"}]}, "test")
    found = build.estimate_run(recipe, sizes, torch.float32, place=tmp_path)
    assert found.fits_memory and found.fits_disk
    build.check(found)
    with pytest.raises(ResourceError, match=r"pruning big would take .* of memory, and 1 B are there: "):
        build.check(build.estimate_run(recipe, sizes, torch.float32, memory_limit=1))
    monkeypatch.setattr(build, "free_disk", lambda place: 1000)
    with pytest.raises(ResourceError, match=r"of disk, and 1.0 kB are free: give --out a place on a larger disk"):
        build.check(build.estimate_run(recipe, sizes, torch.float32, place=tmp_path))


class Four(Ranks):
    """The first of six ranks, four of which are on this machine."""

    size, here = 6, 4


def test_ranks_of_a_machine_share_its_memory(sizes, monkeypatch):
    recipe = make_recipe({"model": "big", "steps": [{"method": "magnitude"}]}, "test")
    monkeypatch.setattr(build, "resident_bytes", lambda: 0)
    needed = build.estimate_run(recipe, sizes, torch.float32).memory_bytes
    monkeypatch.setattr(build, "available_memory", lambda: 4 * needed)
    found = build.estimate_run(recipe, sizes, torch.float32, ranks=Four())
    build.check(found)
    assert found.available_memory == found.memory_bytes == needed
    assert found.line().startswith(f"{format_bytes(needed)} of memory in each of 4 ranks, ")
    monkeypatch.setattr(build, "available_memory", lambda: 4 * needed - 1)
    build.check(build.estimate_run(recipe, sizes, torch.float32))
    with pytest.raises(ResourceError, match=r"of memory in each of 4 ranks, and .* are there for each: "):
        build.check(build.estimate_run(recipe, sizes, torch.float32, ranks=Four()))


def test_ranks_share_the_windows_and_keep_their_states_side_by_side(sizes):
    # seven for four: two windows for three of them, one for the last
    job = Job(make_method("wanda"), samples=7, length=1024, dtype=torch.bfloat16, ranks=4)
    alone = replace(job, samples=2, ranks=1)
    assert memory(sizes, job, 0) == memory(sizes, alone, 0) and flops(sizes, job) == flops(sizes, alone)
    states = 2 * 2 * 1024 * 1024 * 2
    assert disk(sizes, alone)["hidden states"] == states
    assert disk(sizes, job) == disk(sizes, alone) | {"hidden states": 4 * states}


def test_steps_add_up_on_disk_and_in_time_but_not_in_memory(sizes):
    steps = [{"method": "magnitude_sp", "sparsity": 0.5}, {"method": "magnitude"}]
    recipe = make_recipe({"model": "big", "format": "packed", "steps": steps}, "test")
    found = build.estimate_run(recipe, sizes, torch.float32)
    one, two = found.steps
    assert found.memory_bytes == max(one.memory_bytes, two.memory_bytes)
    assert found.disk_bytes == sum(one.disk.values()) + sum(two.disk.values())
    assert found.seconds == pytest.approx(sum(one.seconds.values()) + sum(two.seconds.values()))
    # half of the units leave, then half of the weights that are left are bits
    assert found.bytes_after < 0.5 * found.bytes_before
    assert found.speed_bound > 1.5


def test_a_pattern_that_does_not_divide_is_left_to_the_run(sizes):
    recipe = make_recipe({"model": "big", "steps": [{"method": "magnitude", "pattern": "2:5"}]}, "test")
    assert build.estimate_run(recipe, sizes, torch.float32).seconds > 0
