"""FFN neurons by a policy: one that was learnt before, or one that learns from the weights of this model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.allocate import part_of
from secateur.allocate.asked import OF_WEIGHTS
from secateur.engine.run import Run
from secateur.engine.search import SECONDS_BETWEEN_STATES
from secateur.engine.units import decide_units, score_units
from secateur.errors import BudgetError, UsageError
from secateur.files import check_output
from secateur.methods import PolicyMethod
from secateur.models.fingerprint import display_name
from secateur.remote import expanded
from secateur.search import Policy, PolicySearch
from secateur.search.policyfiles import read_policy, write_policy
from secateur.structure import Group, Slices

_NOTE = "policy"


def decide_by_policy(method: PolicyMethod, run: Run) -> None:
    """Kept neurons by scores that the policy gives. Raises UsageError, BudgetError, CorruptFileError, OutputError."""
    groups = run.anatomy.of_kind(*method.kinds)
    if method.idle:
        return
    if run.ranks.size > 1:
        raise UsageError(f"{method.name} learns from weights alone, in one process: start it without torchrun")
    rows, inputs = _shape(method, run, groups)
    removed = _removed(method, run, groups)
    policy = _policy(method, run, groups, rows, inputs, removed)

    def more(group: Group) -> Mapping[str, Any]:
        return {"policy": policy, "writer": _writer(method, run, group)}

    decide_units(method, run, lambda: partial(score_units, run, method, more=more))


def _shape(method: PolicyMethod, run: Run, groups: list[Group]) -> tuple[int, int]:
    """(neurons, inputs) of all blocks."""
    shapes = set()
    for group in groups:
        part, _ = _written_by(method, run, group)
        shapes.add((group.units, run.source.model.get_parameter(part.tensor).shape[1 - part.dim]))
    if len(shapes) > 1:
        widths = sorted({rows for rows, _ in shapes})
        raise UsageError(
            f"{method.name} has one policy for all blocks, and these have from {widths[0]:,} to {widths[-1]:,} neurons:"
            " take a model whose blocks are alike"
        )
    return shapes.pop()


def _removed(method: PolicyMethod, run: Run, groups: list[Group]) -> float:
    """The fraction of the neurons that leaves, as far as the budgets say: the largest of several."""
    fractions = [0.0]
    for name, left in method.asked.items():
        dense = sum(group.units * getattr(group.cost, name, 1) for group in groups)
        # rounding of 1 - (1 - sparsity) is no neuron
        asked = round(1 - left, 12)
        # of other budgets nobody knows yet how many neurons they take
        if name in OF_WEIGHTS:
            asked *= getattr(run.anatomy.blocks, name) / dense
        if asked >= 1:
            raise BudgetError(f"can't remove {1 - left:.1%} of the {name}: neurons are less than that")
        fractions.append(asked)
    return max(fractions)


def _policy(method: PolicyMethod, run: Run, groups: list[Group], rows: int, inputs: int, removed: float) -> Policy:
    """The policy of the folder where there is one, or one that learns now; what was done is noted."""
    folder = expanded(method.policy) if method.policy else None
    noted = run.keeper.noted(_NOTE).get(0)
    if noted is None and folder is not None and folder.exists():
        policy, about = read_policy(folder, rows, inputs)
        run.keeper.search({f"best.{name}": tensor for name, tensor in policy.tensors().items()}, 0)
        run.keeper.note(_NOTE, 0, {"learnt": None, "about": about})
        return policy
    if noted is not None:
        kept = run.keeper.searched()
        assert kept is not None
        policy, about = Policy.of({n.removeprefix("best."): t for n, t in kept.items() if n.startswith("best.")}), noted
    else:
        if folder is not None:
            check_output(folder)
        policy, about = _learnt(method, run, groups, rows, inputs, removed)
    if folder is not None and not folder.exists():
        write_policy(folder, policy, about["learnt"])
    return policy


def _learnt(
    method: PolicyMethod, run: Run, groups: list[Group], rows: int, inputs: int, removed: float
) -> tuple[Policy, dict[str, Any]]:
    for group in groups:
        name = _written_by(method, run, group)[0].tensor
        run.source.check(name, run.source.tensor(name), group.layer)
    # as many as are kept in the end, where every block loses the same
    kept = part_of(rows, 1 - removed)
    if kept < rows:
        least = -(-method.min_keep // method.round_to)
        kept = max(kept // method.round_to, least) * method.round_to
    matrices = [lambda group=group: _writer(method, run, group) for group in groups]
    search = PolicySearch(matrices, kept, method.episodes_of())
    state, last = run.keeper.searched(), time.monotonic()
    if state is not None:
        search.load_state(state)
    episodes = method.episodes_of().episodes
    while not search.finished:
        search.step()
        run.progress("learn", len(search.history), episodes)
        if time.monotonic() - last >= SECONDS_BETWEEN_STATES and not search.finished:
            run.keeper.search(search.state(), len(search.history))
            last = time.monotonic()
    about = {
        "learnt": {
            "method": method.name,
            "model": display_name(run.source.model),
            "neurons": rows,
            "inputs": inputs,
            "removed": removed,
            "options": {name: value for name, value in method.options().items() if name != "policy"},
            "rewards": search.history,
            "reward": search.best_reward,
        }
    }
    run.keeper.search(search.state(), len(search.history))
    run.keeper.note(_NOTE, 0, about)
    return Policy.of(search.best), about


def _written_by(method: PolicyMethod, run: Run, group: Group) -> tuple[Slices, Tensor]:
    """(the slices of the weight that writes the neurons, which of its outputs are theirs)."""
    writers = [part for part in group.slices if part.tensor != f"{group.reader}.weight"]
    pieces = [
        (part, index)
        for part in writers
        if run.source.model.get_parameter(part.tensor).dim() > 1
        # a fused weight has those of the gate first
        for index in part.index.T
    ]
    return pieces[0] if method.matrix == "gate" else pieces[-1]


def _writer(method: PolicyMethod, run: Run, group: Group) -> Tensor:
    """The rows of the neurons, [neurons, inputs] float32."""
    part, index = _written_by(method, run, group)
    weight = run.source.tensor(part.tensor).to(run.source.device_of(group.layer))
    return weight.index_select(part.dim, index.to(weight.device)).movedim(part.dim, 0).to(torch.float32)
