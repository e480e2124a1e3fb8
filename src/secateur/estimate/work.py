"""The work of one step: operations and bytes moved, and the time that they take on a machine."""

from __future__ import annotations

from secateur.estimate.disk import checkpoint_bytes
from secateur.estimate.job import Job
from secateur.estimate.machine import Machine
from secateur.estimate.memory import spills, state_bytes
from secateur.estimate.sizes import BlockSizes, Sizes
from secateur.estimate.training import Training, recovery_of, training_of
from secateur.methods import IterativeMethod, StructuredMethod, WeightMethod

# passes over memory of isfinite (four results, each read again) and of a conversion, in entries read or written
_CHECKS, _CONVERSIONS = 8, 2
# per token of one block: entries read and written beside the products, by the residual stream (norms, sums, the
# check for NaN), by the FFN (activation function, gate) and by attention (rotation, repeated heads, softmax)
_AROUND_HIDDEN, _AROUND_FFN, _AROUND_ATTENTION = 24, 6, 12
# a quantised file is loaded as a whole and passes through memory about this often
_LOADING = 50
# entries read and written for a score: float32 copy, |W|, product
_SCORING = 8
# of a group, at most
VARIANTS = 5
# entries read and written, per word, for a prediction that is compared in float32
_COMPARED = 8
# inputs: of queries, keys and values, and of what puts heads together
_OF_ATTENTION = 2


def flops(sizes: Sizes, job: Job) -> dict[str, int]:
    """Operations by what they are for (a multiplication with its addition is two)."""
    passes = [_passes(job, last=layer + 1 == len(sizes.blocks)) for layer in range(len(sizes.blocks))]
    found = {
        "forwards": sum(
            n * forward_flops(block, sizes, job)
            - _unread_flops(block, job)
            + _stage_flops(block, sizes, job, last=layer + 1 == len(sizes.blocks))
            for layer, (n, block) in enumerate(zip(passes, sizes.blocks, strict=True))
        ),
        "variants": _variant_flops(sizes, job),
        "statistics": 0,
        "factorisations": 0,
        "solving": 0,
    }
    # forwards through all of the model, and the gradient back through half of it on average
    matrices = [outputs * inputs for block in sizes.blocks for outputs, inputs in block.matrices]
    searched = job.search_steps(matrices) * job.searched_tokens
    found["forwards"] += searched * (2 * (sizes.linear + sizes.head) + sizes.linear + 2 * sizes.head)
    # the gradient of every weight of the blocks takes as much as that of the inputs
    if isinstance(job.method, IterativeMethod):
        looked_at = job.method.rounds() * job.round_tokens
        found["forwards"] += looked_at * (2 * (sizes.linear + sizes.head) + 4 * sizes.linear + 2 * sizes.head)
    for block in sizes.blocks:
        deciding = job.repeats * list(job.needs(block, sizes.hidden))
        for needs in (*deciding, *job.later_needs(block, sizes.hidden)):
            found["statistics"] += needs.update_flops
            found["factorisations"] += needs.solve_flops
        found["statistics"] += sum(needs.update_flops for needs in job.allocation_needs(block, sizes.hidden))
        found["solving"] += job.solve_flops(block)
    found["forwards"] += _gradient_flops(sizes, job)
    # whole models, the head among them
    tried = job.trial_tokens + job.tried_tokens(len(sizes.blocks))
    found["forwards"] += tried * 2 * (sizes.linear + sizes.head)
    if recovery := recovery_of(sizes, job):
        found["heal"] = recovery.flops() + recovery.measured_flops()
    return {name: count for name, count in found.items() if count}


def _gradient_flops(sizes: Sizes, job: Job) -> int:
    """Of the head, forward and back, where gradients come back through the blocks, and of training adapters."""
    if job.walks_back:
        return 4 * job.tokens * sizes.head
    training = training_of(sizes, job)
    return training.flops() if training is not None else 0


def _variant_flops(sizes: Sizes, job: Job) -> int:
    """Of measuring what variants lose: those of a block go through it and through all blocks behind it."""
    through, variants = 0, 0
    for block in sizes.blocks:
        variants += VARIANTS * sum(inputs.reader for inputs in block.inputs)
        through += variants * block.linear
    return 2 * job.variant_tokens * (through + variants * sizes.head)


def forward_flops(block: BlockSizes, sizes: Sizes, job: Job) -> int:
    """Of all tokens through one block: its matrices, and attention to the half of a window that came before."""
    return job.tokens * (2 * block.linear + 2 * job.length * sizes.attention)


def _unread_flops(block: BlockSizes, job: Job) -> int:
    """Of the products with the input that comes last: a forward that only looks at inputs ends there."""
    products = sum(2 * job.tokens * o * i for last in block.inputs[-1:] for o, i in last.matrices)
    return job.unread * products


def _stage_flops(block: BlockSizes, sizes: Sizes, job: Job, *, last: bool) -> int:
    """Of the forwards before all stages of a block but the last, which end at what their stage reads.

    Less what later forwards, one in the ``last`` block and two in others, needn't compute of an attention that is
    settled.
    """
    if not job.in_stages:
        return 0
    products = [sum(o * i for o, i in inputs.matrices) for inputs in block.inputs]
    attention = 2 * job.length * sizes.attention
    before = sum(2 * sum(products[:stage]) + (attention if stage else 0) for stage in range(len(products) - 1))
    if len(products) > _OF_ATTENTION:
        before -= (1 if last else 2) * (2 * sum(products[:_OF_ATTENTION]) + attention)
    return job.tokens * before


def _passes(job: Job, *, last: bool) -> int:
    """How often text goes through a block: again after the cut, for methods that look at what the cut blocks give.

    An allocator has it go through the dense block before.
    """
    return int(job.allocates) + job.passes[1 if last else 0]


def seconds(sizes: Sizes, job: Job, machine: Machine) -> dict[str, float]:
    """Expected time by stage; reading goes on in the background, so that only what computing doesn't hide counts."""
    count = flops(sizes, job)
    around = sum(
        _passes(job, last=layer + 1 == len(sizes.blocks)) * _around(block, sizes, job)
        for layer, block in enumerate(sizes.blocks)
    )
    statistics = sum(
        needs.moved
        for block in sizes.blocks
        for needs in (
            *(job.repeats * list(job.needs(block, sizes.hidden))),
            *job.later_needs(block, sizes.hidden),
            *job.allocation_needs(block, sizes.hidden),
        )
    )
    found = {
        "check": _CHECKS * (sizes.stored + sizes.entries) / 2 / machine.moved,
        "forwards": count.get("forwards", 0) / machine.flops + around / machine.moved,
        "variants": count.get("variants", 0) / machine.flops,
        "statistics": count.get("statistics", 0) / machine.float32_flops + statistics / machine.moved,
        "decide": _deciding(sizes, job, machine, count),
        "write": _written(sizes, job) / machine.written,
    }
    if not (sizes.streamed or sizes.loaded):
        found["load"] = _LOADING * sizes.stored / machine.moved
    reading = (sizes.stored if sizes.streamed else 0) / machine.read
    if not found["variants"]:
        del found["variants"]
    if recovery := recovery_of(sizes, job):
        found["heal"] = _trained(recovery, machine)
    hidden = found["forwards"] + found["statistics"] + found["decide"]
    found["read"] = max(reading - hidden, reading / max(len(sizes.blocks), 1))
    return found


def training_seconds(training: Training, machine: Machine) -> dict[str, float]:
    """Expected time of a training alone by stage; models are read and converted one after the other."""
    models = [training.sizes, *([training.teacher] if training.teacher is not None else [])]
    converted = _CONVERSIONS * sum(sizes.stored + 4 * sizes.entries for sizes in models)
    return {
        "load": sum(sizes.stored for sizes in models) / machine.read + converted / machine.moved,
        "heal": _trained(training, machine),
        "write": training.sizes.stored / machine.written,
    }


def measuring_seconds(sizes: Sizes, machine: Machine, gone: float, windows: int, length: int) -> float:
    """Expected time of one forward of ``windows`` through a model of which a token skips ``gone`` multiplications."""
    attention = len(sizes.blocks) * 2 * length * sizes.attention
    operations = 2 * (sizes.linear + sizes.head - gone) + attention
    around = sum(_around_token(block, sizes) for block in sizes.blocks)
    moved = sizes.itemsize * around + 4 * _COMPARED * sizes.vocabulary
    return windows * length * (operations / machine.flops + moved / machine.moved)


def _trained(training: Training, machine: Machine) -> float:
    around = sum(_around_token(block, training.sizes) for block in training.sizes.blocks)
    operations = training.flops() + training.measured_flops()
    return operations / machine.trained_flops + training.moved(around) / machine.moved


def _around(block: BlockSizes, sizes: Sizes, job: Job) -> float:
    entries = job.tokens * _around_token(block, sizes) + _CONVERSIONS * block.entries
    return entries * job.dtype.itemsize


def _around_token(block: BlockSizes, sizes: Sizes) -> int:
    """Entries that a token moves in one block beside the products."""
    return _AROUND_HIDDEN * sizes.hidden + _AROUND_FFN * block.outputs + _AROUND_ATTENTION * sizes.attention


def _deciding(sizes: Sizes, job: Job, machine: Machine, count: dict[str, int]) -> float:
    taken = count.get("factorisations", 0) / machine.factor_flops + count.get("solving", 0) / machine.float32_flops
    if isinstance(job.method, WeightMethod) and job.method.sweeps:
        # within blocks of columns, one column after the other
        taken += sizes.linear / machine.swept
    if isinstance(job.method, WeightMethod):
        return taken + sizes.linear * (1 / machine.ranked + 4 * _SCORING / machine.moved)
    if isinstance(job.method, StructuredMethod):
        readers = sum(o * i for block in sizes.blocks for inputs in job.targets(block) for o, i in inputs.matrices)
        # squares and sums in float64
        return taken + readers * 8 * _SCORING / machine.moved
    return taken


def _written(sizes: Sizes, job: Job) -> int:
    """Cut blocks go to the folder of the run first, and to the checkpoint from there."""
    checkpoint = checkpoint_bytes(sizes, job)
    states = len(sizes.blocks) * state_bytes(sizes, job) * (3 if spills(sizes, job) else 1)
    return checkpoint + (checkpoint - sizes.outside_stored) + states
