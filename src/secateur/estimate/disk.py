"""Bytes on disk: the checkpoint, and beside it the folder of the run at its fullest."""

from __future__ import annotations

from secateur.estimate.job import Job
from secateur.estimate.leaving import leaving, removed_share
from secateur.estimate.memory import hidden_bytes, spills, state_bytes
from secateur.estimate.sizes import Sizes
from secateur.estimate.training import recovery_of, training_of
from secateur.methods import SearchMethod, UnitMethod, WeightMethod


def disk(sizes: Sizes, job: Job) -> dict[str, int]:
    """Bytes by what they are for, when all blocks are cut and the checkpoint is put together from them."""
    linear = sizes.linear
    plan, training, recovery = 0, training_of(sizes, job), recovery_of(sizes, job)
    if isinstance(job.method, WeightMethod | SearchMethod):
        plan = -(-linear // 8) + (int(linear * (1 - job.sparsity)) * sizes.itemsize if job.repairs else 0)
    elif job.method.refits or job.levels:
        # new values of the weights that read units
        plan = _read_bytes(sizes, job, sizes.itemsize)
    elif training is not None:
        # new values of all weights, whether they stay or not
        plan = -(-linear // 8) + linear * sizes.itemsize
    # the states before and after a block are both there for a moment; and a file is kept once it is needed
    hidden = state_bytes(sizes, job)
    states = (4 if spills(sizes, job) else 2) * hidden
    if job.walks_back and spills(sizes, job):
        states += hidden_bytes(sizes, job)
    # the files of all ranks lie side by side
    states *= job.ranks
    seen = 0
    if isinstance(job.method, UnitMethod) and not job.method.in_sequence:
        seen = sum(n.stored for block in sizes.blocks for n in job.needs(block, sizes.hidden))
    # scores that the end needs, and where a search is
    ranked = 4 * linear if job.ranks_globally or job.searched_tokens else 0
    if training is not None:
        # the last state and the next
        ranked = 2 * training.state_bytes
    if job.levels:
        # all levels, in float32
        ranked = job.levels * _read_bytes(sizes, job, 4)
    blocks = checkpoint_bytes(sizes, job) - sizes.outside_stored
    parts = {
        "checkpoint": checkpoint_bytes(sizes, job),
        "plan": 2 * plan,
        "cut blocks": blocks,
        "hidden states": states,
        "statistics": seen + ranked,
        # the same, and what was trained
        "recovery": 0 if recovery is None else 2 * recovery.state_bytes + checkpoint_bytes(sizes, job),
    }
    return {name: size for name, size in parts.items() if size}


def _read_bytes(sizes: Sizes, job: Job, itemsize: int) -> int:
    """Masks and values of what stays of the weights that read units."""
    read = sum(o * i for block in sizes.blocks for inputs in job.targets(block) for o, i in inputs.matrices)
    return -(-read // 8) + int(read * (1 - removed_share(sizes, job))) * itemsize


def checkpoint_bytes(sizes: Sizes, job: Job) -> int:
    """Bytes of the tensors of the pruned checkpoint."""
    linear_stored = sizes.linear * sizes.itemsize
    if isinstance(job.method, WeightMethod | SearchMethod):
        if job.format != "packed":
            return sizes.stored
        packed = -(-sizes.linear // 8) + int(linear_stored * (1 - job.sparsity))
        return sizes.stored - linear_stored + min(packed, linear_stored)
    return sizes.stored - leaving(sizes, job).stored


def speed_bound(sizes: Sizes, job: Job) -> float:
    """At most how many times faster the pruned model can be: multiplications before over those after."""
    before = sizes.linear + sizes.head
    return before / (before - leaving(sizes, job).multiplied)
