"""What a run has decided so far: in memory here; ``runs`` keeps the same on disk, so that a run can go on later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from secateur.plans import Plan

if TYPE_CHECKING:
    from pathlib import Path

    from secateur.observe.driver import BlockWalk
    from secateur.provenance import BudgetAccount, Provenance

SeenByModule = Mapping[str, Mapping[str, Any]]


@dataclass
class Decision:
    """The parts of a Plan, of one block or of the whole model, while they are being decided."""

    groups: dict[str, int] = field(default_factory=dict)
    keep: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    budgets: dict[str, BudgetAccount] = field(default_factory=dict)
    rotations: dict[str, Tensor] = field(default_factory=dict)

    def add(self, other: Decision) -> None:
        """Take in the decision about other parts of the model."""
        for name in ("groups", "keep", "masks", "values", "biases", "scores", "budgets", "rotations"):
            getattr(self, name).update(getattr(other, name))
        self.notes += other.notes

    def plan(self, provenance: Provenance) -> Plan:
        """The same as data that can be kept, made in one step as ``provenance`` says."""
        return Plan(
            provenance=(provenance,),
            groups=self.groups,
            keep=self.keep,
            masks=self.masks,
            values=self.values,
            biases=self.biases,
            scores=self.scores,
            rotations=self.rotations,
        )


class Decided(Protocol):
    """What has been decided about the whole model, by name: a Decision, or a Plan whose masks lie on disk."""

    @property
    def groups(self) -> Mapping[str, int]: ...

    @property
    def keep(self) -> Mapping[str, Tensor]: ...

    @property
    def masks(self) -> Mapping[str, Tensor]: ...

    @property
    def biases(self) -> Mapping[str, Tensor]: ...

    @property
    def rotations(self) -> Mapping[str, Tensor]: ...


class Keeper:
    """Takes what is known about each block when it is finished, and gives back what the end of a run needs.

    ``finished`` is the number of blocks that were kept already when the run begins, ``refitted`` the number of those
    that were refitted after everything was decided, and ``closed`` tells whether it was. ``whole`` is the decision.
    """

    finished = 0
    refitted = 0
    closed = False

    def __init__(self) -> None:
        self.whole = Decision()
        self._seen: dict[int, SeenByModule] = {}
        self._ranked: dict[str, Tensor] = {}
        self._allocated: dict[str, float] | None = None
        self._notes: dict[str, dict[int, Any]] = {}

    @property
    def hidden(self) -> Path | None:
        """The folder for activations that don't fit into memory; None for a temporary one."""
        return None

    def aside(self, name: str) -> Keeper:
        """A keeper for work that must be done before the blocks are decided."""
        return Keeper()

    def discard(self, name: str) -> None:
        """Forget what was kept aside under that name; nothing asks for it any more."""

    def allocated(self) -> dict[str, float] | None:
        """The sparsity of every matrix by module, as far as it has been chosen."""
        return self._allocated

    def allocate(self, sparsities: dict[str, float]) -> None:
        """Keep the sparsity that was chosen for every matrix."""
        self._allocated = sparsities

    def note(self, name: str, number: int, value: Any) -> None:
        """Keep something small and JSON-ready that a resumed run goes on from, by its name and a number."""
        self._notes.setdefault(name, {})[number] = value

    def noted(self, name: str) -> Mapping[int, Any]:
        """What was noted under that name, by number."""
        return self._notes.get(name, {})

    def resume(self, walk: BlockWalk) -> bool:
        """Put a walk that has just begun where the blocks end that are finished, or refitted once all is decided.

        False where the hidden states of that place were not kept, or are gone.
        """
        return True

    def keep(
        self,
        layer: int,
        part: Decision,
        *,
        final: bool,
        walk: BlockWalk | None = None,
        seen: SeenByModule | None = None,
        ranked: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Block ``layer`` is finished. ``final`` says that nothing decided later concerns it.

        ``seen`` and ``ranked`` (scores that the plan doesn't hold) are asked for again at the end of the run.
        """
        self.whole.add(part)
        if seen is not None:
            self._seen[layer] = seen
        self._ranked.update(ranked or {})

    def seen(self, layer: int) -> SeenByModule:
        """The statistics that were kept with that block."""
        return self._seen[layer]

    def ranked(self, name: str) -> Tensor:
        """The scores that were kept under that name."""
        return self._ranked[name]

    def scores(self) -> Mapping[str, Tensor]:
        """The scores in the decisions about all blocks so far."""
        return self.whole.scores

    def close(self, parts: Iterator[Decision]) -> None:
        """Take what is decided about the model as a whole, part by part."""
        for part in parts:
            self.whole.add(part)
        self.closed = True

    def search(self, state: Mapping[str, Tensor], step: int) -> None:
        """Keep where a search on the whole model is after ``step`` steps."""

    def searched(self) -> Mapping[str, Tensor] | None:
        """Where that search was last kept."""
        return None

    def decided(self) -> Decided:
        """What was decided about the whole model, once it is closed."""
        return self.whole

    def refit(self, layer: int, part: Decision, walk: BlockWalk | None) -> None:
        """Block ``layer`` has new values, in ``part``, which replace what was decided about the same tensors."""
        self.whole.add(part)
