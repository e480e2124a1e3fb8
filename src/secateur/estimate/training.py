"""A training of the whole model in float32, by recovery or by a method that removes units meanwhile.

The model is there with what is trained, its gradients and moments, and the graph of one forward; recovery has the
dense model beside it where that is the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from secateur.estimate.job import Job
from secateur.estimate.leaving import leaving
from secateur.estimate.sizes import BlockSizes, Sizes
from secateur.healing.recovery import RecoveryOptions
from secateur.healing.recovery.precision import settled
from secateur.healing.recovery.trained import targets
from secateur.methods import SearchMethod, TrainedMethod, WeightMethod

# per token and word, of what leaves the model: logits of both models or of all windows in a row, and two gradients
_PREDICTIONS = 4
# of an adapter's input the random numbers of dropout and what they leave, both float32
_DROPPED = 8
# passes over memory, in float32 entries read or written: for a random number of dropout, for a prediction that is
# compared, and for an entry that AdamW moves, whose gradient is clipped before
_DROPOUT, _COMPARED, _MOVED = 16, 12, 14
# of a product of adapters that is masked: made, masked, used, and the same for its gradient
_MASKED = 10


def graph_entries(sizes: Sizes, block: BlockSizes) -> int:
    """Entries per token that one block keeps for its gradient."""
    # about four widths of its FFN and eight of the residual stream
    return 4 * (block.outputs or sizes.hidden) + 8 * sizes.hidden


@dataclass(frozen=True)
class Training:
    """Steps on windows of ``length`` tokens, by ``options``.

    The model has ``entries``, of which a token is multiplied with ``linear`` in the blocks and ``head`` behind them;
    ``masked`` are linear weights whose zeros stay. A ``teacher`` predicts beside it, and with ``true_gradients`` frozen
    weights have gradients. What is counted is what one of the ``ranks`` does, on its ``device``.
    """

    sizes: Sizes
    options: RecoveryOptions
    length: int
    entries: int
    linear: float
    head: float
    masked: bool = False
    teacher: Sizes | None = None
    ranks: int = 1
    device: str = "cpu"
    true_gradients: bool = False

    def lighter(self, options: RecoveryOptions) -> Training:
        """The same by other options, whose loss may need no teacher."""
        taught = bool({"kl", "hidden"} & set(options.terms(self.teacher is not None)))
        return replace(self, options=options, teacher=self.teacher if taught else None)

    @property
    def dtype(self) -> torch.dtype:
        """Of the forwards."""
        dtype: torch.dtype = getattr(torch, settled(self.options, torch.device(self.device)).dtype)
        return dtype

    @property
    def together(self) -> int:
        """Tokens of one forward."""
        return (self.options.micro or max(1, self.options.batch // self.ranks)) * self.length

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return self.options.steps * self.options.batch * self.length // self.ranks

    @property
    def adapters(self) -> int:
        """Entries of all adapters."""
        if self.options.train != "lora":
            return 0
        return self.options.rank * sum(outputs + inputs for outputs, inputs in self._adapted())

    @property
    def trained(self) -> int:
        """Entries that the optimiser moves; norms and biases are so few that none are counted."""
        return self.entries if self.options.train == "full" else self.adapters

    @property
    def state_bytes(self) -> int:
        """What an interrupted training goes on from: what is trained and its two moments."""
        return 3 * 4 * self.trained

    def memory(self) -> dict[str, int]:
        """Bytes by what they are for."""
        sizes, options = self.sizes, self.options
        blocks = [graph_entries(sizes, block) for block in sizes.blocks]
        kept = sum(blocks) if not options.checkpointing else len(blocks) * sizes.hidden + max(blocks)
        graph = self.together * (kept + _PREDICTIONS * sizes.vocabulary) * self.dtype.itemsize
        if options.dropout:
            dropped = sum(inputs for _, inputs in self._adapted()) if self.adapters else 0
            graph += self.together * _DROPPED * (dropped // (len(blocks) if options.checkpointing else 1))
        if self.dtype.itemsize < 4:
            # what weights were cast to is held by the graph; that of frozen ones is kept, with those of both heads
            heads = 0.0 if options.checkpointing else self.head + (self.teacher.head if self.teacher is not None else 0)
            graph += int(self.linear + heads) * self.dtype.itemsize
        if self._masks_products:
            # masked products and their masks
            graph += int(self.linear) * (4 + 1)
        if self.adapters:
            # the product of an adapter, its gradient, and the score or the merged weight of one matrix
            graph += 3 * 4 * max(block.widest for block in sizes.blocks)
        sharded = self.ranks if options.fsdp else 1
        return {
            # every rank loads all of a model before it keeps its part
            "whole model": 4 * self.entries,
            "teacher": 4 * self.teacher.entries if self.teacher is not None else 0,
            "adapters": (4 + 12) * self.adapters,
            "gradients and moments": 12 * (self.trained - self.adapters) // sharded,
            "statistics": 4 * sizes.linear if self.true_gradients else 0,
            "at work": graph,
        }

    def flops(self) -> int:
        """Operations of all steps."""
        options = self.options
        # forward, and the gradient at every input; forward again, and the gradient at every weight
        weights = self.true_gradients or options.train == "full"
        again = 2 * options.checkpointing
        ahead = 4 + 2 * (options.train == "full")
        own = (4 + again + 2 * weights) * self.linear + (3 + again // 2) * self._attention + ahead * self.head
        # adapters have all gradients; their products are multiplied with as weights are
        own += (6 + again) * (self.linear if self._masks_products else self.adapters)
        # once at the end, when they are merged
        products = 2 * options.rank * self.linear if self.adapters else 0.0
        if self._masks_products:
            products *= 1 + self._forwards * (3 + again // 2)
        return int(self.tokens * (own + self._taught) + products)

    def measured_flops(self) -> int:
        """Operations of looking at held-out windows before the first step, now and then, and at the end."""
        options = self.options
        times = 1 + -(-options.steps // options.measured_every)
        own = 2 * (self.linear + self.head) + self._attention
        return int(options.held_out * self.length * (times * own + self._taught))

    def moved(self, around: float) -> float:
        """Bytes through memory beside the products; ``around`` are entries of all blocks for a token's forward."""
        options = self.options
        taught = self.teacher.linear if self.teacher is not None else 0
        # frozen weights are cast once, unless activations are computed again; those of the teacher's blocks every time
        cast = taught + (self.linear if options.checkpointing or options.train == "full" else 0)
        entries = (3 + bool(taught)) * around + _COMPARED * self.sizes.vocabulary
        if options.dropout and self.adapters:
            entries += _DROPOUT * sum(inputs for _, inputs in self._adapted())
        weights = options.steps * _MOVED * self.trained
        if self.dtype.itemsize < 4:
            weights += self._forwards * 2 * cast
        if self._masks_products:
            weights += self._forwards * _MASKED * self.linear
        return 4 * (self.tokens * entries + weights)

    @property
    def _forwards(self) -> int:
        """Forwards of all steps."""
        return self.tokens // self.together

    @property
    def _masks_products(self) -> bool:
        """Whether adapters are multiplied with each other in every forward, so that zeros stay."""
        return self.masked and self.adapters > 0

    @property
    def _taught(self) -> int:
        """Operations of the teacher for a token."""
        if self.teacher is None:
            return 0
        return 2 * (self.teacher.linear + self.teacher.head) + self._attention

    @property
    def _attention(self) -> int:
        """Operations for a token that looks at the half of a window that came before, in all blocks."""
        return len(self.sizes.blocks) * 2 * self.length * self.sizes.attention

    def _adapted(self) -> Iterator[tuple[int, int]]:
        """(outputs, inputs) of the matrices that get adapters. Raises UsageError for targets that there aren't."""
        shapes = {matrix.module: matrix.shape for matrix in self.sizes.anatomy.matrices}
        return (shapes[name] for name in targets(self.options.targets, list(shapes)))


def training_of(sizes: Sizes, job: Job) -> Training | None:
    """The training in which a method decides; None for methods that don't train."""
    method = job.method
    if not isinstance(method, TrainedMethod):
        return None
    options = method.recovery("bfloat16" if job.dtype == torch.bfloat16 else "float32")
    true = method.needs_gradient
    return Training(sizes, options, job.length, sizes.entries, sizes.linear, sizes.head, true_gradients=true)


def training_alone(
    sizes: Sizes,
    options: RecoveryOptions,
    *,
    teacher: Sizes | None = None,
    masked: bool = False,
    ranks: int = 1,
    device: str = "cpu",
) -> Training:
    """Of a model that is there. Raises UsageError for a loss that needs a teacher where there is none."""
    found = Training(
        sizes,
        options,
        options.length,
        sizes.entries,
        sizes.linear,
        sizes.head,
        masked=masked,
        teacher=teacher,
        ranks=ranks,
        device=device,
    )
    return found.lighter(options)


def recovery_of(sizes: Sizes, job: Job) -> Training | None:
    """The training of what a step leaves; None where none was asked for."""
    options = job.recovery
    if options is None:
        return None
    gone = leaving(sizes, job)
    # of the words that leave the head has fewer, and of all else the blocks
    through = 1 - gone.multiplied / (sizes.linear + sizes.head)
    return Training(
        sizes,
        options,
        options.length,
        entries=max(0, sizes.entries - gone.stored // sizes.itemsize),
        linear=through * sizes.linear,
        head=through * sizes.head,
        masked=isinstance(job.method, WeightMethod | SearchMethod),
        teacher=sizes if {"kl", "hidden"} & set(options.terms(teacher=True)) else None,
        ranks=job.ranks,
        device=job.device,
    )
