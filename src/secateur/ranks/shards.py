"""Models that are sharded over the ranks (FSDP2) while one of them is trained, and whole again behind it.

Every rank then keeps its part of all weights, gradients and what the optimiser remembers; a block is gathered while
it is computed. What is sharded is a copy, so that adapters are taken off a model that FSDP has never seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from secateur.ranks.base import Ranks
from secateur.rowmasks import whole

Pieces = Callable[[Any], Iterable[nn.Module]]
"""Model → the modules of which one at a time is gathered."""


@contextmanager
def sharded(models: Sequence[Any], pieces: Pieces, ranks: Ranks) -> Iterator[list[Any]]:
    """Copies that are sharded by ``pieces``; the models, alike on all ranks, have no weights meanwhile.

    They get those of the copies in the end, unless an error ends it: other ranks may then not come to gather them.
    """
    copies = [_sharded(model, pieces, ranks) for model in models]
    yield copies
    for model, shards in zip(models, copies, strict=True):
        _gather(shards, model)


def _sharded(model: Any, pieces: Pieces, ranks: Ranks) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # deepcopy takes what the memo holds for an object: until it is sharded the copy has the weights of the model
    same = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    shards = copy.deepcopy(model, dict(same))
    mesh = init_device_mesh(model.device.type, (ranks.size,))
    for piece in pieces(shards):
        fully_shard(piece, mesh=mesh)
    fully_shard(shards, mesh=mesh)
    _put(model, model, {i: nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for i, p in same.items()})
    return shards


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded a model."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Let go of gathered weights: FSDP keeps some after a forward, and they would hide what is changed in shards."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _gather(shards: Any, model: Any) -> None:
    reshard(shards)
    gathered = {id(p): nn.Parameter(whole(p), requires_grad=p.requires_grad) for p in shards.parameters()}
    _put(model, shards, gathered)


def _put(model: Any, named: Any, parameters: dict[int, nn.Parameter]) -> None:
    """Give ``model`` the parameters that there are for those of ``named``; ties stay."""
    for name, parameter in list(named.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = parameters[id(parameter)]
