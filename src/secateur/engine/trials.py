"""Trials of models without some of their sub-layers: all candidates go through the blocks together.

So many windows go through at a time that the hidden states of all candidates take about ``hidden_bytes``, but at least
one. B windows, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from random import Random

from torch import Tensor, nn

from secateur.criteria.divergence import Divergence, text_loss
from secateur.engine.run import Run
from secateur.engine.together import through, windows_at_once
from secateur.errors import UsageError
from secateur.methods import Gone
from secateur.models.decoders import DecoderBlock, typed_blocks
from secateur.models.modeling_secateur import Skipped
from secateur.observe.driver import BlockWalk

_STEP = "removal"
_DENSE: Gone = frozenset()

Judge = Callable[[Tensor, Tensor], float]
"""(logits [B, T, V], ids [B, T]) → loss per token"""


class SublayerTrials:
    """Trials on the calibration windows of ``run``; see ``secateur.methods.Trials``.

    Names of sub-layers are those of their groups, ``layers.3.mlp``. What is finished is noted in the run's keeper.
    """

    def __init__(self, run: Run, hidden_bytes: int) -> None:
        assert run.tokens is not None
        self._hidden_bytes = hidden_bytes
        self._run, self._ids = run, run.tokens.ids
        self._blocks = typed_blocks(run.source.model)

    def losses(
        self, candidates: Sequence[Gone], *, fitness: str, tokens: int = 0, seed: int | None = None
    ) -> list[float]:
        """See ``Trials``; a model that gives no finite loss has an infinite one.

        Raises NonFiniteError when the dense one gives NaN and they are compared with it.
        """
        ids = self._windows(tokens, seed)
        how = (self._run.source, self._run.dtype, 2 * self._hidden_bytes)
        at_once = windows_at_once(*how, len(candidates) + 1, ids.shape[1])
        totals = dict.fromkeys(candidates, 0.0)
        for part in ids.split(at_once):
            for candidate, loss in self._part(part, list(totals), fitness).items():
                totals[candidate] += loss * len(part) / len(ids)
        found = [totals[c] if math.isfinite(totals[c]) else math.inf for c in candidates]
        return [math.exp(loss) if loss < 700 else math.inf for loss in found] if fitness == "perplexity" else found

    def done(self) -> list[tuple[Gone, float]]:
        """See ``Trials``."""
        noted = self._run.keeper.noted(_STEP)
        return [(frozenset(noted[step]["gone"]), noted[step]["loss"]) for step in sorted(noted)]

    def finish(self, step: int, gone: Gone, loss: float, steps: int) -> None:
        """See ``Trials``."""
        self._run.keeper.note(_STEP, step, {"gone": sorted(gone), "loss": loss})
        self._run.progress("search", step + 1, max(steps, step + 1))

    def _windows(self, tokens: int, seed: int | None) -> Tensor:
        """[windows, length] int64; a window is cut where it alone has more tokens."""
        length = min(tokens or self._ids.shape[1], self._ids.shape[1])
        count = min(max(1, tokens // length), len(self._ids)) if tokens else len(self._ids)
        if seed is None:
            return self._ids[:count, :length]
        return self._ids[sorted(Random(seed).sample(range(len(self._ids)), count)), :length]

    def _part(self, ids: Tensor, candidates: list[Gone], fitness: str) -> dict[Gone, float]:
        """The loss of every candidate on some windows, in nats per token."""
        source, run = self._run.source, self._run
        walk = BlockWalk(source, ids, dtype=run.dtype, batch_tokens=run.batch_tokens)
        wanted = list(dict.fromkeys([*candidates, _DENSE] if fitness == "divergence" else candidates))
        states = through(walk, len(source.blocks), wanted, _DENSE, self._lost, self._going)
        head = source.shell(run.dtype, whole=True)
        totals = dict.fromkeys(candidates, 0.0)
        start = 0
        for i in range(len(walk.hidden)):
            entering = walk.hidden[i]
            ids_BT = ids[start : start + len(entering)].to(entering.device)
            start += len(entering)
            judge = self._judge(fitness, lambda i=i: walk.logits(head, i, states[_DENSE][i]))
            for candidate in candidates:
                hidden = states[candidate]
                loss = judge(walk.logits(head, i, hidden[i]), ids_BT) if hidden else math.inf
                totals[candidate] += loss * len(ids_BT) / len(ids)
        return totals

    @staticmethod
    def _judge(fitness: str, dense: Callable[[], Tensor]) -> Judge:
        if fitness == "perplexity":
            return text_loss
        if fitness == "divergence":
            divergence = Divergence(dense())
            return lambda logits_BTV, _: divergence.of(logits_BTV)
        raise UsageError(f"fitness must be perplexity or divergence, got {fitness!r}")

    @staticmethod
    def _lost(candidate: Gone, layer: int) -> Gone:
        """What a candidate has lost of a block."""
        return frozenset(name for name in candidate if int(name.split(".")[1]) == layer)

    def _going(self, block: nn.Module, layer: int, gone: Gone) -> AbstractContextManager[None]:
        return without(self._blocks[layer], block, gone)


@contextmanager
def without(typed: DecoderBlock, block: nn.Module, gone: Iterable[str]) -> Iterator[None]:
    """``block``, a working copy of the block ``typed``, without the sub-layers of these names as long as this lasts."""
    held: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for kind in sorted(name.rpartition(".")[2] for name in gone):
            for path in typed.sublayer(kind):
                parent, _, leaf = path.rpartition(".")
                owner = block.get_submodule(parent)
                held.append((owner, leaf, owner.get_submodule(leaf)))
                setattr(owner, leaf, Skipped(kind, typed.layer))
        yield
    finally:
        for owner, leaf, module in held:
            setattr(owner, leaf, module)
