"""One step of a run as an estimate sees it: a method, the calibration data, and how the work is done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from secateur.allocators import Measuring
from secateur.estimate.sizes import BlockSizes, Inputs
from secateur.methods import LayerMethod, Method, UnitMethod, WeightMethod
from secateur.observe import Needs
from secateur.observe.statistics import Accumulator


@dataclass(frozen=True)
class Job:
    """``samples`` windows of ``length`` tokens in batches of about ``batch_tokens``, in ``dtype``.

    ``activation_memory`` is in bytes; ``format`` is dense or packed.
    """

    method: Method
    samples: int
    length: int
    dtype: torch.dtype
    batch_tokens: int = 2048
    activation_memory: int | None = None
    format: str = "dense"
    device: str = "cpu"
    allocation: Measuring | None = None

    @property
    def observes(self) -> bool:
        """Whether calibration text goes through the model."""
        return bool(self.method.statistics) or self.allocates

    @property
    def allocates(self) -> bool:
        """Whether it goes through the dense model once before, for an allocator."""
        return self.allocation is not None and bool(self.allocation.statistics)

    @property
    def tokens(self) -> int:
        """Calibration tokens in all."""
        return self.samples * self.length if self.observes else 0

    @property
    def batch(self) -> int:
        """Tokens that go through a block together."""
        return min(self.samples, max(1, self.batch_tokens // self.length)) * self.length if self.observes else 0

    @property
    def trial_tokens(self) -> int:
        """Tokens that go through whole models, for an allocator that tries some."""
        return self.allocation.allocator.trial_tokens if self.allocation is not None else 0

    @property
    def repairs(self) -> bool:
        """Whether the weights that stay get new values."""
        return self.method.descriptor.recovery == "least_squares"

    @property
    def ranks_globally(self) -> bool:
        """Whether all weights of the model compete, so that their scores are kept until the end."""
        method = self.method
        return isinstance(method, WeightMethod) and getattr(method, "scope", "") == "global" and not method.pattern

    @property
    def sparsity(self) -> float:
        """The fraction that is asked for."""
        pattern = getattr(self.method, "pattern", "")
        if pattern:
            from secateur.allocate import parse_pattern

            return parse_pattern(pattern).share
        method = self.method
        if isinstance(method, UnitMethod) and method.programmed:
            # of other budgets nobody knows yet how many weights they take along
            told = [1 - left for name, left in method.asked.items() if name in ("params", "macs", "bytes")]
            return max(told, default=0.0)
        return float(getattr(method, "sparsity", 0.0))

    @property
    def variant_tokens(self) -> int:
        """Tokens on which groups with fewer units are measured."""
        method = self.method
        measures = isinstance(method, UnitMethod) and method.programmed and method.variants == "measured"
        return min(method.variant_tokens, self.samples * self.length) if measures else 0  # type: ignore[attr-defined]

    def targets(self, block: BlockSizes) -> tuple[Inputs, ...]:
        """What the method looks at in a block: all inputs, those of readers, or none."""
        if isinstance(self.method, WeightMethod):
            return block.inputs
        if isinstance(self.method, UnitMethod):
            return tuple(inputs for inputs in block.inputs if inputs.reader)
        return ()

    def needs(self, block: BlockSizes, hidden: int) -> Iterator[Needs]:
        """What the statistics of one block take, input by input."""
        channels = [inputs.channels for inputs in self.targets(block)]
        if isinstance(self.method, LayerMethod):
            channels = [2 * hidden]
        yield from self._each(channels, self._statistics)

    def allocation_needs(self, block: BlockSizes, hidden: int) -> Iterator[Needs]:
        """What the statistics of an allocator take of one block, before those of the method are there."""
        if self.allocation is not None:
            blocks = self.allocation.allocator.observes == "blocks"
            channels = [2 * hidden] if blocks else [inputs.channels for inputs in block.inputs]
            yield from self._each(channels, list(self.allocation.needed_statistics().values()))

    def _each(self, channels: list[int], statistics: list[type]) -> Iterator[Needs]:
        for width in channels:
            for kind in statistics:
                # a plugin's own class may not say what it takes
                needs = getattr(kind, "needs", Accumulator.needs)
                yield needs(width, tokens=self.tokens, batch=self.batch, length=self.length)

    @cached_property
    def _statistics(self) -> list[type]:
        return list(self.method.needed_statistics().values()) if self.method.statistics else []
