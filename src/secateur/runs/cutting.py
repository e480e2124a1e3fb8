"""Blocks of a checkpoint, cut one at a time by the part of the plan that concerns them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from secateur.keeping import Decision
from secateur.models.decoders import decoder_anatomy, is_transposed
from secateur.models.packed import pack
from secateur.models.sources import Source
from secateur.models.surgery import Cut
from secateur.plans import Plan, Provenance
from secateur.tensorfiles import Made, write_tensors


class BlockCutter:
    """Writes the blocks of ``source`` as the checkpoint will hold them; ``format`` is ``dense`` or ``packed``."""

    def __init__(self, source: Source, provenance: Provenance, format: str) -> None:
        self.source, self.provenance, self._format = source, provenance, format
        self.layers = len(source.blocks)
        self._anatomy = decoder_anatomy(source.model, heads=Plan((provenance,)).head_unit)

    def write(self, layer: int, part: Decision | Plan, path: Path) -> None:
        """Cut one block and write it, durable when this returns; names are those of the dense model."""
        plan = part if isinstance(part, Plan) else self._plan_of(part)
        cut = Cut(plan, self.source.model, self._anatomy)
        dense = self.source.block_tensors(layer)
        prefix = f"{self.source.name}.{layer}."
        names = dict.fromkeys([*dense, *(name for name in cut.touched if name.startswith(prefix))])
        tensors = {name: self._made(cut, name, dense) for name in names}
        if self._format == "packed":
            ready: dict[str, Tensor] = {}
            for name, made in tensors.items():
                # one at a time, so that dense and packed forms of the whole block are never there together
                ready |= pack({name: made.make()})[0]
            write_tensors(path, ready, durable=True)
        else:
            write_tensors(path, tensors, durable=True)

    def _made(self, cut: Cut, name: str, dense: Mapping[str, Tensor]) -> Made:
        old, module = dense.get(name), name.rpartition(".")[0]
        if old is not None:
            return Made(old.dtype, cut.shape(name, old.shape), partial(_make, cut, name, old, old))
        # a bias that the dense model lacks: one entry for every output
        weight = dense[f"{module}.weight"]
        outputs = weight.shape[1 if is_transposed(self.source.model.get_submodule(module)) else 0]
        return Made(weight.dtype, (outputs,), partial(_make, cut, name, None, weight))

    def _plan_of(self, part: Decision) -> Plan:
        return Plan(
            provenance=(self.provenance,),
            groups=part.groups,
            keep=part.keep,
            masks=part.masks,
            values=part.values,
            biases=part.biases,
        )


def _make(cut: Cut, name: str, old: Tensor | None, weight: Tensor) -> Tensor:
    if old is not None and name not in cut.touched:
        return old
    return cut.tensor(name, old, weight)
