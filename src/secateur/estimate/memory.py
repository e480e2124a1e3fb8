"""Peak resident memory: what is there all the time, and the stage of the work that takes the most on top.

A block lives through these stages: it is read (with the next one behind it), copied in the compute dtype, run on one
batch after the other, and decided upon, one matrix at a time. Before the first block, the rows of the embedding that
the text needs are mapped. B sequences, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from secateur.estimate.job import Job, on_processor
from secateur.estimate.sizes import BlockSizes, Sizes
from secateur.estimate.training import Training, graph_entries, recovery_of, training_of
from secateur.methods import RotationMethod, StructuredMethod, SublayerMethod, WeightMethod
from secateur.models.rotation import WORDS
from secateur.search import TRIED_BYTES
from secateur.structure.lexicon import VOCABULARY

# outside tensors are looked at beside all else, in parts of 2^20 entries
_CHECKED = 1 << 20
# bytes per entry of the matrix at work on top of its float32 copy: scores, the running count of ties, booleans
_SCORING = 4 + 8 + 6
# the matrix that is being repaired, its mask, and the new values that stay
_REPAIRING = 4 + 1 + 4 + 4
# conjugate gradients on a mask: what is aimed at, where they begin, the solution, residual, direction, its image
_REFITTING = 6 * 4
# squares of an input in float64 while columns are refitted: H and G, H damped and scaled, its factor, part of it
_COLUMN_SQUARES = 6 * 8
# float64 weights and their squares
_UNIT_SCORING = 8 + 8
# around every row of a mapped embedding the kernel maps this much, where the file is in its cache
_PAGES = 1 << 16
# What the heap keeps of freed tensors, as a fraction of all that comes and goes. The C library hands allocations above
# 32 MB back at once, so that there is an end to it.
_SLACK, _MOST_SLACK = 0.1, 1 << 28
# per token and word: bytes of logits, their float32 copy, their softmax and its gradient; and where the loss is taken
# in pieces, entries of logits, of those without a window's last, and of their gradient
_WHOLE, _PIECED = 16, 3
# tokens whose predictions are kept while models are tried out
_TRIED = 4096
# what lies on the device that computes
_ON_DEVICE = (
    "working copy",
    "whole model",
    "teacher",
    "tried models",
    "head",
    "adapters",
    "gradients and moments",
    "hidden states",
    "statistics",
    "at work",
)


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for, at the peak: of the ``process``, and of another ``device`` where one computes."""

    process: dict[str, int]
    device: dict[str, int]

    @property
    def total(self) -> int:
        """Of the process."""
        return sum(self.process.values())

    @property
    def device_total(self) -> int:
        """Of the device."""
        return sum(self.device.values())


def memory(sizes: Sizes, job: Job, baseline: int) -> Memory:
    """The peak of one step; ``baseline`` is what the process takes before anything is read."""
    block = max(sizes.blocks, key=lambda b: b.entries)
    steady = {"process": baseline, **_model(sizes, block), **_walk(sizes, job, block)}
    stages = [_entering(sizes, job), _observing(sizes, job, block), _deciding(sizes, job, block), _ending(sizes, job)]
    stages += [_trying(sizes, job), _leaving_out(sizes, job), _turning_words(sizes, job)]
    if job.searched_tokens:
        stages.append({**_backward(sizes, job, block, job.searched_tokens, _WHOLE), "decision": 2 * sizes.linear})
    if job.walks_back:
        stages += [_turning(sizes, job), _descending(job, sizes, block)]
    if training := training_of(sizes, job):
        stages.append(training.memory())
    if job.round_tokens:
        stages.append(_backward(sizes, job, block, job.round_tokens, _PIECED * job.dtype.itemsize))
    stages = [{**steady, **stage} for stage in stages]
    if recovery := recovery_of(sizes, job):
        # what the walk through the blocks had is gone by then, but for a model that was there before
        there = {name: size for name, size in _model(sizes, block).items() if not sizes.streamed}
        stages.append({"process": baseline, **there, **recovery.memory()})
    return _placed(max(stages, key=lambda stage: sum(stage.values())), job.device, _entering(sizes, job))


def training_memory(training: Training, baseline: int) -> Memory:
    """The peak of a training alone."""
    return _placed({"process": baseline, **training.memory()}, training.device, {})


def _placed(peak: dict[str, int], device: str, host: dict[str, int]) -> Memory:
    """A peak as it lies in the process and on its device; beside another device the process has ``host``."""
    parts = {name: size for name, size in peak.items() if size}
    there: dict[str, int] = {}
    if not on_processor(device):
        there = {name: parts.pop(name) for name in _ON_DEVICE if name in parts}
        parts |= host
    comes_and_goes = sum(size for name, size in parts.items() if name not in ("process", "model"))
    parts["heap"] = min(int(_SLACK * comes_and_goes), _MOST_SLACK)
    return Memory(parts, there)


def hidden_bytes(sizes: Sizes, job: Job) -> int:
    """The hidden states of all calibration tokens, in every stream.

    A walk back needs those that enter every block, those behind the last one, and the gradients that come down.
    """
    if job.trains or isinstance(job.method, SublayerMethod):
        # models that are tried out go through the blocks on their own
        return 0
    states = len(sizes.blocks) + 2 if job.walks_back else job.states
    return states * job.tokens * sizes.hidden * job.dtype.itemsize


def state_bytes(sizes: Sizes, job: Job) -> int:
    """Of the hidden states what an interrupted run goes on from: those between two blocks."""
    return job.streams * job.tokens * sizes.hidden * job.dtype.itemsize if hidden_bytes(sizes, job) else 0


def spills(sizes: Sizes, job: Job) -> bool:
    """Whether they go to a file."""
    # each of them has the limit for itself
    return job.activation_memory is not None and hidden_bytes(sizes, job) > job.states * job.activation_memory


def _model(sizes: Sizes, block: BlockSizes) -> dict[str, int]:
    if not sizes.streamed:
        return {"model": 0 if sizes.loaded else sizes.stored}
    ahead = min(2, len(sizes.blocks))
    return {"blocks as stored": ahead * block.stored, "weights being checked": _CHECKED * sizes.itemsize}


def _walk(sizes: Sizes, job: Job, block: BlockSizes) -> dict[str, int]:
    if not job.observes or job.trains:
        return {}
    hidden = hidden_bytes(sizes, job)
    if spills(sizes, job):
        # one batch on its way in, one on its way out
        hidden = 2 * job.states * job.batch * sizes.hidden * job.dtype.itemsize
    return {"working copy": block.entries * job.dtype.itemsize, "hidden states": hidden}


def _entering(sizes: Sizes, job: Job) -> dict[str, int]:
    if not job.observes or not sizes.streamed:
        return {}
    # Heaps' law for how many different words a text has
    rows = min(sizes.vocabulary, job.tokens, int(10 * job.tokens**0.6))
    return {"embedding rows": min(sizes.embedding, rows * _PAGES)}


def _observing(sizes: Sizes, job: Job, block: BlockSizes) -> dict[str, int]:
    if not job.observes or job.trains:
        return {}
    needs = max(
        (list(job.needs(block, sizes.hidden)), list(job.later_needs(block, sizes.hidden))),
        key=lambda many: sum(n.state for n in many),
    )
    # the widest outputs before, after and beside the activation function, the residual stream in float32 and beside
    # it, and the inputs that are held until the first batch ends
    per_token = (3 * (block.outputs or sizes.hidden) + 3 * sizes.hidden) * job.dtype.itemsize + 2 * 4 * sizes.hidden
    held = sum(inputs.channels for inputs in job.targets(block)) * job.dtype.itemsize
    before = list(job.allocation_needs(block, sizes.hidden))
    return {
        "statistics": max(sum(n.state for n in needs), sum(n.state for n in before)),
        "at work": job.batch * (per_token + held) + max((n.update for n in [*needs, *before]), default=0),
    }


def _deciding(sizes: Sizes, job: Job, block: BlockSizes) -> dict[str, int]:
    needs = [*job.needs(block, sizes.hidden)]
    if job.method.refits_later:
        needs = max((needs, [*job.later_needs(block, sizes.hidden)]), key=lambda many: sum(n.state for n in many))
    statistics = sum(n.state + n.derived for n in needs)
    solving = max((n.solve for n in needs), default=0)
    targets = [matrix for inputs in job.targets(block) for matrix in inputs.matrices]
    largest = max((outputs * inputs for outputs, inputs in targets), default=0)
    copy = 0 if sizes.itemsize == 4 else 4
    if isinstance(job.method, WeightMethod):
        work = largest * (copy + (_REPAIRING if job.repairs else _SCORING) + (_REFITTING if job.method.refits else 0))
        work += max((job.method.solve_bytes(outputs, inputs) for outputs, inputs in targets), default=0)
        made = block.linear + (int(block.linear * (1 - job.sparsity)) * sizes.itemsize if job.repairs else 0)
        return {"statistics": statistics, "decision": made, "at work": max(work, solving)}
    work = largest * (copy + _UNIT_SCORING) if isinstance(job.method, StructuredMethod) else 0
    if job.method.refits or getattr(job.method, "fits", False) or job.levels:
        work += _COLUMN_SQUARES * max((inputs.channels for inputs in job.targets(block)), default=0) ** 2
    return {"statistics": statistics, "at work": work}


def _ending(sizes: Sizes, job: Job) -> dict[str, int]:
    """One matrix after the other ranked against all: its scores, keys of the same width, masks and what sums up."""
    if not job.ranks_globally:
        return {}
    return {"at work": max(block.widest for block in sizes.blocks) * (4 + 4 + 4 + 8 + 8)}


def _trying(sizes: Sizes, job: Job) -> dict[str, int]:
    """Hidden states of whole models before and after a block, which is there twice, the head and predictions."""
    if not job.trial_tokens:
        return {}
    states = 2 * job.widest_trial * sizes.hidden * job.dtype.itemsize
    # logits and probabilities of the dense model
    predictions = 4 * sizes.vocabulary * (2 * min(job.tokens, job.trial_tokens, _TRIED) + 3 * job.length)
    return {
        "tried models": min(states, TRIED_BYTES),
        "head": _head(sizes, job),
        "at work": predictions + max(block.entries for block in sizes.blocks) * job.dtype.itemsize,
    }


def _leaving_out(sizes: Sizes, job: Job) -> dict[str, int]:
    """Hidden states of models without some sub-layers, and the predictions of two of them.

    Those of the dense model are there as logits and as probabilities.
    """
    if not isinstance(job.method, SublayerMethod):
        return {}
    # the dense model goes with them, before a block and behind it
    each = 2 * sizes.hidden * job.dtype.itemsize
    together = [(models + 1, tokens) for models, tokens in job.method.tried_together(2 * len(sizes.blocks), job.tokens)]
    states = each * max(models * tokens for models, tokens in together)
    window = each * max(models * min(tokens, job.length) for models, tokens in together)
    looked_at = min(max(tokens for _, tokens in together), job.batch)
    return {
        "tried models": max(min(states, 2 * job.method.hidden_bytes), window),
        "head": _head(sizes, job),
        "at work": 3 * 4 * sizes.vocabulary * looked_at,
    }


def _turning_words(sizes: Sizes, job: Job) -> dict[str, int]:
    """Tables of words as they were and as they become, of which one is made while another is written."""
    if not isinstance(job.method, RotationMethod) or not sizes.streamed:
        return {}
    # a head that was tied to the embedding gets a table of its own
    words = sizes.anatomy[VOCABULARY]
    tied = words.units * words.cost.params <= sizes.vocabulary * sizes.hidden
    return {"at work": (2 if tied or job.method.slice_head else 1) * 2 * sizes.embedding + WORDS * sizes.hidden * 2 * 8}


def _head(sizes: Sizes, job: Job) -> int:
    """What lies outside of the blocks, where it isn't there already as it is computed with."""
    shared = not sizes.streamed and sizes.itemsize == job.dtype.itemsize
    return 0 if shared else sizes.outside_entries * job.dtype.itemsize


def _backward(sizes: Sizes, job: Job, block: BlockSizes, looked_at: int, predicted: int) -> dict[str, int]:
    """A copy of the whole model, the gradients of its matrices, and the graph of the windows that run together.

    For every token and word, ``predicted`` bytes are those of logits and of what comes on top for their loss.
    """
    tokens = min(looked_at, max(1, job.batch_tokens // job.length) * job.length)
    kept = len(sizes.blocks) * graph_entries(sizes, block) * job.dtype.itemsize
    graph = tokens * (kept + predicted * sizes.vocabulary)
    return {
        "whole model": (sizes.entries + sizes.linear) * job.dtype.itemsize,
        "at work": graph,
    }


def _turning(sizes: Sizes, job: Job) -> dict[str, int]:
    """The head of the model, and of one window the predictions and three gradients of them."""
    return {"at work": (sizes.head + 4 * sizes.vocabulary * job.length) * job.dtype.itemsize}


def _descending(job: Job, sizes: Sizes, block: BlockSizes) -> dict[str, int]:
    """The graph of a batch in one block, the gradients that it gives, and what they add up to."""
    graph = job.batch * graph_entries(sizes, block) * job.dtype.itemsize
    return {
        "statistics": 4 * len(job.gradients) * block.entries,
        "at work": graph + block.entries * (job.dtype.itemsize + 4),
    }
