"""Candidates of a search on their way through the blocks together.

Each block is opened once for all of them, so a checkpoint may be larger than memory. Candidates that were alike so far
share their hidden states, so that one costs only the blocks from the first on in which it goes its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor, nn

from secateur.errors import NonFiniteError
from secateur.models.sources import Source
from secateur.observe.driver import BlockWalk

Candidate = TypeVar("Candidate", bound=Hashable)
Way = TypeVar("Way", bound=Hashable)


def through(
    walk: BlockWalk,
    blocks: int,
    candidates: Sequence[Candidate],
    dense: Candidate,
    way: Callable[[Candidate, int], Way],
    going: Callable[[nn.Module, int, Way], AbstractContextManager[None]],
) -> dict[Candidate, list[Tensor]]:
    """Hidden states behind the last block by batch, [windows, tokens, hidden]; none of a candidate that gives NaN.

    ``way(candidate, layer)`` says what a candidate makes of one block, and within ``going(block, layer, way)`` the
    working copy of the block is that. Raises NonFiniteError where the ``dense`` model is asked for and gives NaN.
    """
    at = dict.fromkeys(candidates, 0)
    states = [[walk.hidden[i] for i in range(len(walk.hidden))]]
    for layer in range(blocks):
        block = walk.open(layer)
        ways = {one: (way(one, layer), before) for one, before in at.items()}
        made: dict[tuple[Way, int], list[Tensor]] = {}
        for own in dict.fromkeys(own for own, _ in ways.values()):
            with going(block, layer, own):
                for before in dict.fromkeys(before for other, before in ways.values() if other == own):
                    try:
                        made[own, before] = [walk.run(block, layer, i, x) for i, x in enumerate(states[before])]
                    except NonFiniteError:
                        if ways.get(dense) == (own, before):
                            raise
                        made[own, before] = []
        places = {each: place for place, each in enumerate(made)}
        at, states = {one: places[each] for one, each in ways.items()}, list(made.values())
    return {one: states[place] for one, place in at.items()}


def windows_at_once(source: Source, dtype: torch.dtype, limit: int, candidates: int, tokens: int) -> int:
    """So many that the hidden states of all candidates before and behind a block take ``limit`` bytes, at least one.

    ``tokens`` are those of a window.
    """
    hidden = int(source.model.get_input_embeddings().weight.shape[1])  # type: ignore[union-attr,operator,arg-type]
    return max(1, limit // (2 * candidates * tokens * hidden * dtype.itemsize))
