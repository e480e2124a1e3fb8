"""Single weights, by a search on the whole model."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from secateur.engine.keeping import Decision
from secateur.engine.run import Run
from secateur.errors import UsageError
from secateur.methods import SearchMethod
from secateur.models.sources import check_finite
from secateur.search import MaskDescent, Searched, mean_gradients, token_loss

SECONDS_BETWEEN_STATES = 30.0
"""Of a search; what was done since the last state is done again after a crash."""


def decide_searched(method: SearchMethod, run: Run) -> None:
    """Masks, by steps that go on from the state that was kept last. Raises UsageError."""
    targets = list(run.anatomy.matrices)
    if method.sparsity == 0:
        return
    if run.ranks.size > 1:
        raise UsageError(f"{method.name} searches on the whole model, in one process: start it without torchrun")
    tokens = run.tokens
    assert tokens is not None
    at_once = max(1, run.batch_tokens // tokens.ids.shape[1])
    whole = run.source.whole(run.dtype)
    data = (tokens.ids.to(run.source.device),)
    gradients: dict[str, Tensor] = {}
    if method.needs_gradient and run.keeper.finished < run.layers:
        weights: list[Any] = [whole.get_submodule(m.module).weight for m in targets]
        found = mean_gradients(whole, weights, data, token_loss, samples_at_once=at_once)
        gradients = {m.module: g.T if m.transposed else g for m, g in zip(targets, found, strict=True)}
    for layer in run.blocks("start"):
        members = [m for m in targets if m.layer == layer]
        seen = run.observe(layer, [m.module for m in members], advance=True)[1] if run.observed else {}
        ranked = {}
        for matrix in members:
            target = run.target(matrix.module, "weight", layer, name=matrix.module)
            mine = {**seen.get(matrix.module, {}), "gradient": gradients.get(matrix.module)}
            ranked[matrix.module] = method.score(target, mine).float().cpu()
            check_finite(ranked[matrix.module], matrix.module, layer, "scores")
        run.keeper.keep(layer, Decision(), final=False, walk=run.walk, ranked=ranked)
    rule = method.rule()
    scores = {m.module: run.keeper.ranked(m.module) for m in targets}
    searched = [Searched(m.module, rule.keep(scores[m.module]), scores[m.module], m.transposed) for m in targets]
    descent = MaskDescent(whole, searched, data, token_loss, method.descent(), samples_at_once=at_once)
    del scores, searched
    _search(run, descent)
    masks = descent.masks()
    stored = {m.tensor: (masks[m.module].T if m.transposed else masks[m.module]).contiguous().cpu() for m in targets}
    run.keeper.close(iter([Decision(masks=stored, notes=descent.notes())]))


def _search(run: Run, descent: MaskDescent) -> None:
    """All steps, from the state that was kept last; states are kept on the way."""
    state, kept = run.keeper.searched(), time.monotonic()
    if state is not None:
        descent.load_state(state)
    while not descent.finished:
        descent.step()
        run.progress("search", len(descent.trace), descent.total)
        if time.monotonic() - kept >= SECONDS_BETWEEN_STATES:
            run.keeper.search(descent.state(), len(descent.trace))
            kept = time.monotonic()
