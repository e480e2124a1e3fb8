"""Estimates against numbers worked out by hand for a tiny Llama, and against what the code then really holds.

The Llama: 2 blocks, hidden 32, 4 query heads on 2 key-value heads of 8, 64 neurons, 512 tokens, float32, untied head.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from runs import plan_for
from secateur.allocators import chosen_allocation
from secateur.estimate.disk import checkpoint_bytes, disk, speed_bound
from secateur.estimate.job import Job
from secateur.estimate.leaving import removed_share
from secateur.estimate.machine import Machine, try_machine
from secateur.estimate.memory import hidden_bytes, memory
from secateur.estimate.sizes import Sizes, sizes_of
from secateur.estimate.work import flops, forward_flops, seconds
from secateur.methods import SublayerMethod, make_method
from secateur.models.opening import open_source
from secateur.models.rotation import WORDS
from secateur.models.sources import Source
from secateur.observe import Cross, Gram, Lost, Moments, SequenceMoments, SumSquares
from secateur.observe.driver import BlockWalk
from secateur.solver import obs_sweep, sweep_flops

LINEAR = 3 * 1024 + 3 * 2048  # q, o: 32 x 32, k, v: 16 x 32; gate, up, down: 64 x 32
BLOCK = 4 * (LINEAR + 2 * 32)
OUTSIDE = 4 * (2 * 512 * 32 + 32)
TOKENS = 4 * 16
# 24 of 32 directions stay in all matrices but the last, products between bases come, and the embedding is narrower
SLICED = 2 * LINEAR // 4 - 2048 // 4 - (3 * 24 * 24 + 24 * 32) + 512 * 8


@pytest.fixture
def sizes(tiny_checkpoint) -> Sizes:
    source, _ = open_source(tiny_checkpoint)
    source.close()
    return sizes_of(source)


def job(method: str, **options: object) -> Job:
    return Job(make_method(method, options), samples=4, length=16, dtype=torch.float32)


def test_sizes_are_those_of_the_checkpoint(sizes):
    block = sizes.blocks[0]
    assert len(sizes.blocks) == 2 and sizes.streamed
    assert (block.linear, block.stored, block.widest) == (LINEAR, BLOCK, 2048)
    assert (sizes.outside_stored, sizes.stored) == (OUTSIDE, OUTSIDE + 2 * BLOCK)
    assert (sizes.hidden, sizes.attention, sizes.vocabulary, sizes.head) == (32, 32, 512, 512 * 32)
    # q, k, v read one tensor, and so do gate and up
    assert [(i.channels, len(i.matrices), i.reader) for i in block.inputs] == [
        (32, 3, False),
        (32, 1, True),
        (32, 2, False),
        (64, 1, True),
    ]


@pytest.mark.parametrize(
    ("method", "passes"), [("magnitude", 0), ("flap", 2), ("shortgpt", 2), ("wanda", 3), ("sparsegpt", 3)]
)
def test_sequential_methods_run_every_block_twice_but_the_last(sizes, method, passes):
    once = TOKENS * (2 * LINEAR + 2 * 16 * 32)
    # to the inputs and no further: down_proj isn't run when nothing is cut yet
    unread = 2 * 2 * TOKENS * 64 * 32 if passes == 3 else 0
    assert flops(sizes, job(method)).get("forwards", 0) == passes * once - unread


@pytest.mark.parametrize(
    ("method", "allocate", "passes"),
    [
        ("magnitude", "owl", 2),
        ("magnitude", "erk", 0),
        ("wanda", "owl", 5),
        ("wanda", "influence", 5),
        ("wanda", "erk", 3),
    ],
)
def test_an_allocator_sees_every_block_once_before(sizes, method, allocate, passes):
    alone = job(method)
    asked = replace(alone, allocation=chosen_allocation(allocate, alone.method))
    once = TOKENS * (2 * LINEAR + 2 * 16 * 32)
    assert flops(sizes, asked).get("forwards", 0) == passes * once - asked.unread * 2 * 2 * TOKENS * 64 * 32
    held = memory(sizes, asked, 0).process.get("hidden states", 0)
    assert held == (TOKENS * 32 * 4 if passes else 0)


@pytest.mark.parametrize(("target", "dense"), [("current", 0), ("stream", 1)])
def test_a_forward_before_a_stage_ends_at_what_the_stage_reads(sizes, tiny_llama, target, dense):
    mine = job("wanda", heal="refit", target=target, true_sequential=True)
    attention, read = 2 * 16 * 32, [0, 2048, 3072, LINEAR - 2048]
    before = [2 * read[0], *(2 * products + attention for products in read[1:3])]
    # with the stream the output of the block is looked at too
    last = 2 * (LINEAR if dense else read[3]) + attention
    through = 2 * LINEAR + attention
    # the attention isn't computed for the last stage, nor on the way to the next block
    spared = 3 * (2 * read[2] + attention)
    assert flops(sizes, mine)["forwards"] == TOKENS * (2 * (sum(before) + last + dense * through) + through - spared)
    assert memory(sizes, mine, 0).process["hidden states"] == (2 + dense) * TOKENS * 32 * 4
    counted = []
    real = BlockWalk._run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockWalk, "_run", lambda *args: counted.append(args[-1].shape[0]) or real(*args))
        plan_for("wanda", tiny_llama, torch.arange(16).repeat(4, 1), heal="refit", target=target, true_sequential=True)
    assert sum(counted) == 4 * (2 * (4 + dense) + 1)


def test_variants_go_through_their_block_and_those_behind_it(sizes):
    asked = job("flap", budget="params=0.8,macs=0.9", variant_tokens=32)
    # five of heads and five of neurons, in the first block and in the second
    assert flops(sizes, asked)["variants"] == 2 * 32 * (10 * LINEAR + 20 * LINEAR + 20 * sizes.head)
    assert removed_share(sizes, asked) == pytest.approx(0.2)
    assert "variants" not in flops(sizes, job("flap", budget="params=0.8", variants="scores"))


@pytest.mark.parametrize(
    ("method", "options", "passes", "streams"),
    [
        ("magnitude", {"heal": "refit"}, 3, 1),
        ("wanda", {"heal": "refit", "target": "dense"}, 5, 2),
        ("magnitude", {"heal": "refit", "scope": "global"}, 3, 1),
        ("wanda", {"heal": "refit", "scope": "global"}, 5, 1),
        ("flap", {"heal": "refit"}, 5, 1),
        ("flap", {"heal": "refit", "target": "dense"}, 7, 2),
        ("alps", {"target": "stream"}, 5, 2),
        ("magnitude_sp", {"heal": "bias"}, 2, 1),
        ("osscar", {}, 3, 1),
        ("tyr", {"generations": 0}, 3, 1),
        ("tyr", {"generations": 0, "accumulation": "none"}, 2, 1),
    ],
)
def test_text_goes_through_a_block_as_often_as_it_really_does(sizes, tiny_llama, method, options, passes, streams):
    mine = job(method, **options)
    once = TOKENS * (2 * LINEAR + 2 * 16 * 32)
    unread = mine.unread * 2 * 2 * TOKENS * 64 * 32
    assert flops(sizes, mine).get("forwards", 0) == passes * once - unread
    assert hidden_bytes(sizes, mine) == streams * TOKENS * 32 * 4
    counted = []
    real = BlockWalk._run

    def run(self, block, layer, batch, hidden):
        counted.append(hidden.shape[0])
        return real(self, block, layer, batch, hidden)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockWalk, "_run", run)
        plan_for(method, tiny_llama, torch.zeros(4, 16, dtype=torch.int64) + torch.arange(16), **options)
    assert sum(counted) == passes * 4


def test_gradients_come_back_through_one_block_at_a_time(sizes):
    mine = job("llm_pruner", criterion="param_mix")
    once = TOKENS * (2 * LINEAR + 2 * 16 * 32)
    # up, up again and back; of the head no gradient of its weights
    assert flops(sizes, mine)["forwards"] == 2 * 4 * once + 3 * 2 * TOKENS * sizes.head - 2 * TOKENS * sizes.head
    found = memory(sizes, mine, 0).process
    assert found["hidden states"] == (2 + 2) * TOKENS * 32 * 4
    entries = LINEAR + 2 * 32
    turning = {"at work": 4 * sizes.head + 16 * 512 * 16}
    descending = {"statistics": 2 * 4 * entries, "at work": 16 * (4 * 64 + 8 * 32) * 4 + 8 * entries}
    assert {name: found.get(name) for name in descending} in (descending, {"statistics": None, **turning})
    # nothing of all this for scores of weights alone
    assert "forwards" not in flops(sizes, job("llm_pruner", criterion="l2"))
    assert disk(sizes, mine)["hidden states"] == 2 * TOKENS * 32 * 4


def test_training_has_the_whole_model_and_no_gradients_of_it(sizes):
    mine, true = (job("loraprune", metric=metric, batch=2, rank=4) for metric in ("lora", "grad"))
    found, more = (memory(sizes, one, 0).process for one in (mine, true))
    assert found["whole model"] == sizes.stored and "hidden states" not in found
    adapters = 2 * 4 * (2 * (32 + 32) + 2 * (16 + 32) + 3 * (32 + 64))
    assert found["adapters"] == 4 * 4 * adapters
    assert more["statistics"] == 4 * 2 * LINEAR and "statistics" not in found
    tokens = 300 * 2 * 16
    attention = 2 * 2 * 16 * 32
    merged = 2 * 4 * 2 * LINEAR
    alone = tokens * (4 * 2 * LINEAR + 3 * attention + 4 * sizes.head + 6 * adapters) + merged
    assert flops(sizes, mine)["forwards"] == alone
    assert flops(sizes, true)["forwards"] == alone + tokens * 2 * 2 * LINEAR
    assert disk(sizes, mine)["plan"] == 2 * (2 * LINEAR // 8 + 4 * 2 * LINEAR)


def test_models_without_sublayers_are_tried_on_the_tokens_that_are_looked_at(sizes):
    def found(method, **options):
        return memory(sizes, job(method, **options), 0).process

    # four models and the dense one, before a block and behind it
    alone = found("blockpruner", tokens=16)
    assert alone["tried models"] == 2 * (4 + 1) * 16 * 32 * 4
    assert alone["head"] == OUTSIDE
    assert alone["at work"] == 3 * 4 * 512 * 16
    assert "hidden states" not in alone
    assert found("blockpruner")["tried models"] == 4 * alone["tried models"]
    # twelve states on 16 tokens, or two survivors on 64
    search = {"starts": 12, "offspring": 3, "last_tokens": 64}
    assert found("evopress", first_tokens=16, **search)["tried models"] == 2 * (12 + 1) * 16 * 32 * 4
    assert found("evopress", first_tokens=2, **search)["tried models"] == 2 * (2 + 1) * 64 * 32 * 4
    # what is tried together is held within the limit, and a window at least
    for limit, tried in ((50_000, 50_000), (10, 2 * (4 + 1) * 16 * 32 * 4)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SublayerMethod, "hidden_bytes", limit // 2)
            assert found("blockpruner")["tried models"] == tried


def test_tables_of_words_are_turned_while_others_are_written(sizes):
    # of 512 words the embedding as it was and as it becomes, beside rows in float64
    rows = 2 * 8 * WORDS * 32
    table = 512 * 32 * 4
    alone, both = (job("slicegpt", slice_head=head) for head in (False, True))
    assert memory(sizes, alone, 0).process["at work"] == 2 * table + rows
    assert memory(sizes, both, 0).process["at work"] == 4 * table + rows
    # in a model that is there they are part of it
    loaded = replace(sizes, streamed=False, loaded=True)
    assert memory(loaded, both, 0).process["at work"] < 4 * table


def test_a_search_over_levels_has_its_trials_and_its_supernet(sizes):
    how = {"offspring": 3, "stage_tokens": "16,32", "survivors": "2", "levels": 3, "sparsity": 0.5}
    alone, searching = job("tyr", generations=0, **how), job("tyr", generations=2, **how)
    # two searches of two generations: three candidates on 16 tokens, two of them and the parent on 32
    assert (alone.trial_tokens, searching.trial_tokens) == (0, 2 * 2 * (3 * 16 + 3 * 32))
    work = [flops(sizes, one) for one in (alone, searching)]
    trials = searching.trial_tokens * 2 * (sizes.linear + sizes.head)
    assert work[1]["forwards"] == 2 * work[0]["forwards"] + trials
    assert work[1]["statistics"] == 2 * work[0]["statistics"]
    # masks and half of the values of o_proj and down_proj, of three levels
    read = 2 * (32 * 32 + 64 * 32)
    assert disk(sizes, searching)["statistics"] == 3 * (read // 8 + read // 2 * 4)
    # three models on 32 tokens each, before a block and after it, and the block as it is beside what it becomes
    found = memory(sizes, searching, 0).process
    assert found["tried models"] == 2 * 3 * 32 * sizes.hidden * 4
    assert found["at work"] >= found["working copy"] == 4 * sizes.blocks[0].entries


def test_forward_operations_are_those_that_torch_counts(sizes, tiny_llama):
    ids = torch.zeros(4, 16, dtype=torch.int64)
    # torch counts no attention in the kernel that a CPU runs, and here that to all tokens, of which half are masked
    tiny_llama.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        tiny_llama.model(ids)
    blocks = sum(counted.get_flop_counts()["LlamaModel.layers.0"].values())
    attention = 4 * TOKENS * 16 * 32
    assert blocks == forward_flops(sizes.blocks[0], sizes, job("wanda")) + attention // 2


def test_work_of_sparsegpt_by_hand(sizes):
    found = flops(sizes, job("sparsegpt"))
    assert found["statistics"] == 2 * (3 * (2 * TOKENS * 32**2 * 7 // 12) + 2 * TOKENS * 64**2 * 7 // 12)
    assert found["factorisations"] == 2 * (3 * (4 * 32**3 // 3) + 4 * 64**3 // 3)
    # a single block of columns: nothing is left for products
    assert found.get("solving", 0) == 0
    assert sweep_flops(10, 384) == 10 * 384 * 256


def test_work_of_solvers_by_hand(sizes):
    matrices = {(32, 32): 2, (16, 32): 2, (64, 32): 2, (32, 64): 1}
    refit = sum(n * 2 * 11 * o * i * i for (o, i), n in matrices.items())
    assert flops(sizes, job("magnitude", heal="refit"))["solving"] == 2 * refit
    admm = sum(n * (2 * i**3 + 2 * 21 * o * i * i) for (o, i), n in matrices.items())
    assert flops(sizes, job("admm"))["solving"] == 2 * admm
    assert flops(sizes, job("admm", heal="refit"))["solving"] == 2 * (admm + refit)
    # thirty steps, and an inverse for every three of them
    alps = sum(n * (10 * 2 * i**3 + 2 * 30 * o * i * i) for (o, i), n in matrices.items())
    assert flops(sizes, job("alps"))["solving"] == 2 * (alps + refit)
    columns = sum(2 * i**3 // 3 + 4 * o * i * i for o, i in ((32, 32), (32, 64)))
    assert flops(sizes, job("flap", heal="refit"))["solving"] == 2 * columns


def test_sweep_products_are_those_that_torch_runs():
    weight, factor = torch.randn(8, 64), torch.eye(64)
    mapping = {torch.ops.aten.addmm_: lambda c, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counted:
        obs_sweep(weight, factor, lambda scores: scores > 1, block=16)
    # blocks of 16 before 48, 32, 16 and 0 columns: 2 * 8 * 16 * 96
    assert counted.get_total_flops() == 2 * 8 * 16 * 96 == sweep_flops(8, 64, block=16)


@pytest.mark.parametrize("kind", [Gram, SumSquares, Moments, SequenceMoments, Cross, Lost])
def test_statistics_take_what_they_say(kind):
    statistic = kind()
    for _ in range(2):
        # a pair of inputs comes side by side
        statistic.update(torch.randn(2, 16, 24 * (2 if kind in (Cross, Lost) else 1)))
    held = sum(t.numel() * t.element_size() for t in statistic.state().values() if t.dim())
    needs = kind.needs(24, tokens=TOKENS, batch=32, length=16)
    # one number per sequence aside; and SumSquares has half of the sums that a statistic may have
    assert held in (needs.state, needs.state // 2, needs.state + 4 * 8)
    assert held == needs.state or kind is not Gram


def test_memory_of_sparsegpt_by_hand(sizes):
    found = memory(sizes, job("sparsegpt"), 1000).process
    # so narrow a model peaks while it is observed
    assert found["statistics"] == 4 * (3 * 32**2 + 64**2)
    assert found["process"] == 1000
    assert found["blocks as stored"] == 2 * BLOCK
    assert found["working copy"] == BLOCK
    assert found["hidden states"] == TOKENS * 32 * 4 == hidden_bytes(sizes, job("sparsegpt"))
    # a part of the weights outside the blocks, whose entries take four bytes
    assert found["weights being checked"] == 1048576 * 4
    wide = replace(sizes, blocks=tuple(replace(b, inputs=_widened(b.inputs)) for b in sizes.blocks))
    gram = 4 * 1024 * (3 * 32**2 + 64**2)
    found = memory(wide, job("sparsegpt"), 0).process
    deciding = {
        "statistics": 2 * gram,
        "at work": 5 * 4 * (64 * 32) ** 2,
        "decision": 1024 * (LINEAR + 4 * LINEAR // 2),
    }
    assert {name: found[name] for name in deciding} == deciding


def _widened(inputs):
    return tuple(
        replace(i, channels=32 * i.channels, matrices=tuple((32 * o, 32 * c) for o, c in i.matrices)) for i in inputs
    )


def test_a_model_in_memory_is_counted_once(tiny_llama):
    loaded = sizes_of(Source(tiny_llama))
    assert "model" not in memory(loaded, job("magnitude"), 0).process
    to_load = sizes_of(Source(tiny_llama), streamed=False)
    assert memory(to_load, job("magnitude"), 0).process["model"] == OUTSIDE + 2 * BLOCK


def test_hidden_states_that_spill_take_two_batches_of_memory_and_four_times_their_size_on_disk(sizes):
    wide = replace(job("wanda"), samples=1024)
    spilled = replace(wide, activation_memory=1000)
    assert memory(sizes, wide, 0).process["hidden states"] == 1024 * 16 * 32 * 4
    assert memory(sizes, spilled, 0).process["hidden states"] == 2 * 2048 * 32 * 4
    assert disk(sizes, spilled)["hidden states"] == 4 * 1024 * 16 * 32 * 4


def test_on_another_device_memory_is_split(sizes):
    host = memory(sizes, job("sparsegpt"), 1000)
    split = memory(sizes, replace(job("sparsegpt"), device="cuda"), 1000)
    assert host.device == {} and host.device_total == 0
    assert split.device["working copy"] == BLOCK
    assert set(split.device) & set(split.process) <= {"at work"}
    assert split.total < host.total + split.device["at work"]


@pytest.mark.parametrize(
    ("method", "options", "format", "size"),
    [
        ("magnitude", {}, "dense", OUTSIDE + 2 * BLOCK),
        ("magnitude", {}, "packed", OUTSIDE + 2 * BLOCK - 2 * 4 * LINEAR // 2 + 2 * LINEAR // 8),
        ("wanda", {"pattern": "3:4"}, "packed", OUTSIDE + 2 * BLOCK - 3 * 2 * 4 * LINEAR // 4 + 2 * LINEAR // 8),
        ("magnitude_sp", {"sparsity": 0.25}, "dense", OUTSIDE + 2 * BLOCK - 2 * 4 * LINEAR // 4),
        ("shortgpt", {"sparsity": 0.5}, "dense", OUTSIDE + BLOCK),
        ("shortgpt", {"layers": 1}, "dense", OUTSIDE + BLOCK),
        ("evopress", {"layers": 1}, "dense", OUTSIDE + 2 * BLOCK - 4 * LINEAR),
        # embedding, norms and head become smaller too
        ("minitron_hidden", {"sparsity": 0.25}, "dense", 3 * (OUTSIDE + 2 * BLOCK) // 4),
        ("llm_pruner", {"sparsity": 0.25, "granularity": "channel"}, "dense", 3 * (OUTSIDE + 2 * BLOCK) // 4),
        ("llm_pruner", {"ratio": 0.25, "granularity": "channel"}, "dense", 3 * (OUTSIDE + 2 * BLOCK) // 4),
        # the second layer alone loses half
        ("llm_pruner", {"ratio": 0.5, "first": 1, "last": 0}, "dense", OUTSIDE + 2 * BLOCK - 4 * LINEAR // 2),
        (
            "loraprune",
            {"ratio": 0.5, "first": 0.5, "last": 0, "steps": 2, "batch": 2, "warmup": 0, "cooldown": 0},
            "dense",
            OUTSIDE + 2 * BLOCK - 4 * LINEAR // 2,
        ),
        ("prunenet", {"sparsity": 0.25, "budget": "neurons", "episodes": 1}, "dense", OUTSIDE + 2 * BLOCK - 6 * 2048),
        ("vocab", {"sparsity": 0.25}, "dense", OUTSIDE + 2 * BLOCK - 4 * 2 * 128 * 32),
        ("slicegpt", {"sparsity": 0.25}, "dense", OUTSIDE + 2 * BLOCK - 4 * SLICED),
    ],
)
def test_the_checkpoint_by_hand_and_as_it_is_written(sizes, tiny_checkpoint, tmp_path, method, options, format, size):
    wanted = replace(job(method, **options), format=format)
    assert checkpoint_bytes(sizes, wanted) == size
    sc.run(
        {
            "model": str(tiny_checkpoint),
            "out": str(tmp_path / "out"),
            "format": format,
            "calibration": {"samples": 4, "length": 16},
            "steps": [{"method": method, "options": options}],
        }
    )
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    # the header, and units that can't be split
    assert written == pytest.approx(size, rel=0.06)


def test_disk_holds_cut_blocks_and_the_checkpoint_together(sizes):
    found = disk(sizes, job("sparsegpt"))
    plan = 2 * LINEAR // 8 + 4 * 2 * LINEAR // 2
    assert found == {
        "checkpoint": OUTSIDE + 2 * BLOCK,
        "cut blocks": 2 * BLOCK,
        "plan": 2 * plan,
        "hidden states": 2 * TOKENS * 32 * 4,
    }


def test_speed_is_bounded_by_what_is_left_to_multiply(sizes):
    head = 512 * 32
    assert speed_bound(sizes, job("wanda")) == 1
    assert speed_bound(sizes, job("shortgpt", layers=1)) == (2 * LINEAR + head) / (LINEAR + head)
    assert speed_bound(sizes, job("evopress", layers=1)) == speed_bound(sizes, job("shortgpt", layers=1))
    assert speed_bound(sizes, job("flap", sparsity=0.25)) == (2 * LINEAR + head) / (1.5 * LINEAR + head)
    assert speed_bound(sizes, job("minitron_hidden", sparsity=0.25)) == pytest.approx(4 / 3)
    assert speed_bound(sizes, job("vocab", sparsity=0.5)) == (2 * LINEAR + head) / (2 * LINEAR + head // 2)


def test_ranking_is_timed_where_a_rule_can_be_tried(sizes, tmp_path):
    # of 64 channels none are left over by fours, some by fives, and obc has no rule
    for method, ranks in (
        (job("magnitude", pattern="2:4"), True),
        (job("magnitude", pattern="3:5"), False),
        (job("obc"), False),
    ):
        tried = try_machine(sizes, method, place=tmp_path)
        assert (tried.ranked != tried.moved / 32) == ranks


def test_time_is_work_over_rates(sizes):
    machine = Machine(
        flops=1e3,
        float32_flops=1e6,
        trained_flops=1e4,
        factor_flops=1e6,
        swept=1e6,
        moved=1e30,
        read=1e30,
        written=1e6,
        ranked=1e30,
    )
    found = seconds(sizes, job("wanda"), machine)
    assert found["forwards"] == pytest.approx(flops(sizes, job("wanda"))["forwards"] / 1e3)
    hidden = 2 * TOKENS * 32 * 4
    assert found["write"] == pytest.approx((OUTSIDE + 2 * BLOCK + 2 * BLOCK + hidden) / 1e6)
    slow_disk = seconds(sizes, job("wanda"), replace(machine, read=1.0))
    # what computing doesn't hide
    assert slow_disk["read"] == pytest.approx(sizes.stored - found["forwards"], rel=1e-3)
    faster = seconds(sizes, job("wanda"), replace(machine, flops=2e3))
    assert faster["forwards"] == pytest.approx(found["forwards"] / 2)


def test_work_of_what_looks_at_the_whole_model_again_and_again(sizes):
    gradual = replace(job("adapt_pruner", sparsity=0.2, step_windows=2, refresh=2), format="dense")
    head, linear = 512 * 32, 2 * LINEAR
    # five rounds of two windows, forward and back to every weight of the blocks and every input
    assert flops(sizes, gradual)["forwards"] == 5 * 32 * (2 * (linear + head) + 4 * linear + 2 * head)
    peak = memory(sizes, gradual, 0)
    assert peak.process["whole model"] == 4 * (linear + 2 * 2 * 32 + 2 * 512 * 32 + 32 + linear)
    # the graph of both windows, and three times their predictions
    assert peak.process["at work"] == 2 * 16 * 4 * (2 * (4 * 64 + 8 * 32) + 3 * 512)
    assert checkpoint_bytes(sizes, gradual) == sizes.stored - int(0.2 * 4 * linear)


def test_work_of_a_policy(sizes):
    # singular values of 64 x 32 in four episodes and at the beginning, and of o_proj, which counts along
    found = flops(sizes, job("prunenet", episodes=4))
    assert found == {"solving": 2 * 5 * 10 * (64 * 32 * 32 + 32 * 32 * 32)}
    assert not job("prunenet").observes


def test_a_method_with_shares_of_its_own_looks_at_blocks_before(sizes):
    method = make_method("cfsp")
    plain = replace(job("cfsp"), allocation=chosen_allocation(None, method))
    once = TOKENS * (2 * LINEAR + 2 * 16 * 32)
    assert flops(sizes, plain)["forwards"] == 4 * once == 2 * flops(sizes, job("cfsp"))["forwards"]
