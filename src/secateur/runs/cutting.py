"""Blocks of a checkpoint, cut one at a time by the part of the plan that concerns them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from secateur.engine.keeping import Decision
from secateur.models.decoders import decoder_anatomy, is_transposed
from secateur.models.packed import pack
from secateur.models.rotation import Rotation
from secateur.models.sources import Source
from secateur.models.surgery import Cut
from secateur.plans import Plan
from secateur.provenance import Provenance
from secateur.tensorfiles import Made, in_order, write_tensors


class BlockCutter:
    """Writes the blocks of ``source`` as the checkpoint will hold them; ``format`` is ``dense`` or ``packed``."""

    def __init__(self, source: Source, provenance: Provenance, format: str) -> None:
        self.source, self.provenance, self._format = source, provenance, format
        self.layers = len(source.blocks)
        self._anatomy = decoder_anatomy(source.model, heads=Plan((provenance,)).head_unit)

    def expect(self, layers: Iterable[int]) -> None:
        """These blocks will be cut, one after the other: what isn't in memory is read ahead, tensor by tensor."""
        origins = [{n: self.source.origin(n) for n in self.source.block_names(layer)} for layer in layers]
        self.source.expect(name for block in origins for name in in_order(block))

    def write(self, layer: int, part: Decision | Plan, path: Path) -> None:
        """Cut one block and write it, durable when this returns; names are those of the dense model."""
        plan = part if isinstance(part, Plan) else self._plan_of(part)
        if plan.rotations:
            self._write(self._rotated(plan, layer), path)
            return
        cut = Cut(plan, self.source.model, self._anatomy)
        prefix = f"{self.source.name}.{layer}."
        names = [*self.source.block_names(layer), *(name for name in cut.touched if name.startswith(prefix))]
        left = [name for name in dict.fromkeys(names) if not cut.removal.takes(name)]
        self._write({name: self._made(cut, name, layer) for name in left}, path)

    def _write(self, tensors: Mapping[str, Made], path: Path) -> None:
        if self._format == "packed":
            ready: dict[str, Tensor] = {}
            for name in in_order(tensors):
                # one at a time, so that dense and packed forms of the whole block are never there together
                ready |= pack({name: tensors[name].make()})[0]
            write_tensors(path, ready, durable=True)
        else:
            write_tensors(path, tensors, durable=True)

    def _rotated(self, plan: Plan, layer: int) -> dict[str, Made]:
        dense = self.source.block_tensors(layer)
        for name, tensor in dense.items():
            self.source.check(name, tensor, layer)
        rotation = Rotation(self.source.model, plan.rotations, self.source.tensor, self.source.device)
        return {name: Made.of(tensor) for name, tensor in rotation.block(layer, dense).items()}

    def _made(self, cut: Cut, name: str, layer: int) -> Made:
        if name in self.source.block_names(layer):
            old = self.source.origin(name)
            return Made(old.dtype, cut.shape(name, old.shape), partial(self._make, cut, name, layer))
        # a bias that the dense model lacks: one entry for every output
        module = name.rpartition(".")[0]
        weight = self.source.origin(f"{module}.weight")
        outputs = weight.shape[1 if is_transposed(self.source.model.get_submodule(module)) else 0]
        return Made(weight.dtype, (outputs,), lambda: cut.tensor(name, None, torch.empty(0, dtype=weight.dtype)))

    def _make(self, cut: Cut, name: str, layer: int) -> Tensor:
        # read only now, unless the block is in memory anyway
        old = self.source.tensor(name)
        self.source.check(name, old, layer)
        return cut.tensor(name, old, old) if name in cut.touched else old

    def _plan_of(self, part: Decision) -> Plan:
        return Plan(
            provenance=(self.provenance,),
            groups=part.groups,
            keep=part.keep,
            masks=part.masks,
            values=part.values,
            biases=part.biases,
        )
