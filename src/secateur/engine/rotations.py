"""Bases of the hidden states: those behind every sub-layer, found one after the other in the model as it is by then.

A sliced model computes what the dense one does whose hidden states are projected: x Q Q^T stands for x Q. So the walk
stays in the dense coordinates, and blocks run as they are, with a hook between their sub-layers. B sequences, T tokens,
D hidden, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.engine.keeping import Decision
from secateur.engine.run import Run
from secateur.errors import BudgetError, DataError
from secateur.methods import RotationMethod
from secateur.models.decoders import typed_blocks
from secateur.models.rotation import EMBEDDING, centred, check_rotatable, is_centred, is_parallel, signals
from secateur.models.sources import check_finite
from secateur.observe import Gram
from secateur.observe.driver import BlockWalk
from secateur.structure import Anatomy
from secateur.structure.rotated import rotated_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_rotation(method: RotationMethod, model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Raises UnsupportedModelError, BudgetError."""
    check_rotatable(model, head=method.slice_head)
    size = model.config.hidden_size
    if method.sparsity and _width(method, model, anatomy) < 1:
        raise BudgetError(
            f"with sparsity {method.sparsity:g} and round_to {method.round_to} nothing is left of a hidden size"
            f" of {size}"
        )


def _width(method: RotationMethod, model: PreTrainedModel, anatomy: Anatomy) -> int:
    size, names = model.config.hidden_size, signals(model, head=method.slice_head)

    def left(width: int) -> float:
        blocks = range(anatomy.num_layers)
        return sum(rotated_size(anatomy, layer, names, size, width) for layer in blocks) / anatomy.blocks.params

    return method.width(size, left)


def decide_rotations(method: RotationMethod, run: Run) -> None:
    """The bases, block by block. Raises DataError."""
    if not method.sparsity:
        return
    walk = run.begin(dense=False)
    assert walk is not None  # it looks at data
    finder = _Finder(method, run, walk)
    for layer in run.blocks("calibrate"):
        part = Decision()
        if layer == 0:
            part.rotations[EMBEDDING] = finder.enter()
        part.rotations |= finder.block(layer)
        run.keeper.keep(layer, part, final=False, walk=walk)
    run.keeper.close(iter(()))


class _AllSeen(Exception):
    """What the attention adds has been seen."""


@dataclass
class _Finder:
    """``walk`` holds the projected hidden states that enter the next block."""

    method: RotationMethod
    run: Run
    walk: BlockWalk

    def __post_init__(self) -> None:
        model = self.run.source.model
        self.names = signals(model, head=self.method.slice_head)
        self.width = _width(self.method, model, self.run.anatomy)
        self.blocks, self.parallel = typed_blocks(model), is_parallel(model)
        self.turn: Callable[[Tensor], Tensor] = centred if is_centred(model) else lambda x: x

    def enter(self) -> Tensor:
        """The basis of what enters the first block."""
        return self._settle(EMBEDDING, lambda batch: self.walk.hidden[batch], 0)

    def block(self, layer: int) -> dict[str, Tensor]:
        """The bases behind the sub-layers of a block, which then has been gone through."""
        block, found = self.walk.open(layer), {}
        projected: Callable[[Tensor], Tensor] | None = None
        if not self.parallel:
            name = f"layers.{layer}.attention"
            found[name] = basis = self._basis(name, self._between(block, layer), layer)
            projected = _projection(basis)
        name = f"layers.{layer}.mlp"
        if name in self.names:

            def behind(batch: int) -> Tensor:
                hidden = self.walk.hidden[batch]
                with self._attention(block, layer, hidden, projected):
                    return self.walk.run(block, layer, batch, hidden)

            found[name] = self._settle(name, behind, layer)
        return found

    def _settle(self, name: str, signal: Callable[[int], Tensor], layer: int) -> Tensor:
        """The basis of a signal, whose projection is what the walk holds from then on."""
        with torch.inference_mode():
            for batch in range(len(self.walk.hidden)):
                self.walk.hidden[batch] = self.turn(signal(batch))
            self.walk.hidden.turn()
        basis = self._basis(name, (self.walk.hidden[i] for i in range(len(self.walk.hidden))), layer)
        with torch.inference_mode():
            project = _projection(basis)
            for batch in range(len(self.walk.hidden)):
                self.walk.hidden[batch] = project(self.walk.hidden[batch])
            self.walk.hidden.turn()
        return basis

    def _between(self, block: nn.Module, layer: int) -> Iterator[Tensor]:
        """What the MLP's norm reads, batch by batch."""
        seen: list[Tensor] = []

        def stop(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            raise _AllSeen

        for batch in range(len(self.walk.hidden)):
            hidden = self.walk.hidden[batch]
            with self._attention(block, layer, hidden, stop), suppress(_AllSeen):
                self.walk.run(block, layer, batch, hidden)
            yield seen.pop()

    @contextmanager
    def _attention(
        self, block: nn.Module, layer: int, hidden: Tensor, change: Callable[[Tensor], Tensor] | None
    ) -> Iterator[None]:
        """Let ``change`` have a say in the hidden states behind the attention of a block that reads ``hidden``."""
        if change is None:
            yield
            return
        scale = getattr(block, "residual_multiplier", 1)

        def hook(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            before = hidden.to(output[0].device)
            after = change(self.turn(before + output[0] * scale))
            # what the block adds to what it has read must come to this
            return ((after - before) / scale, *output[1:])

        attention = block.get_submodule(self.blocks[layer].family.attention)
        handle = attention.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _basis(self, name: str, batches: Iterator[Tensor], layer: int) -> Tensor:
        """[hidden, width], in float32 unless the model is float64."""
        seen: dict[str, dict[str, Any]] = {name: {"gram": Gram()}}
        with torch.inference_mode():
            for x_BTD in batches:
                seen[name]["gram"].update(x_BTD.double())
        self.run.ranks.merge(seen)
        gram_DD = seen[name]["gram"].total_CC
        check_finite(gram_DD, name, layer, "entries of the covariance")
        if not bool(gram_DD.any()):
            raise DataError(f"the hidden states behind {name} are all zero: calibrate on other text")
        basis_DW = self.method.basis(gram_DD, self.width, self.names.index(name))
        check_finite(basis_DW, name, layer, "entries of the basis")
        exact = self.run.source.tensor(self.run.source.block_names(layer)[0]).dtype == torch.float64
        return basis_DW.to("cpu", torch.float64 if exact else torch.float32).contiguous()


def _projection(basis: Tensor) -> Callable[[Tensor], Tensor]:
    """x → x Q Q^T, computed in the dtype of x."""

    def project(x_BTD: Tensor) -> Tensor:
        basis_DW = basis.to(x_BTD.device, x_BTD.dtype)
        return (x_BTD @ basis_DW) @ basis_DW.T

    return project
