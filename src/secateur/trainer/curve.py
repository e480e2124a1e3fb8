"""What a training gave, step by step and measurement by measurement."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field


@dataclass
class TrainingCurve:
    """``losses`` and ``sparsities`` by step; ``measured`` are (steps done, numbers by name), the first before any step.

    ``seconds`` of training are those of all sittings, measurements left out.
    """

    losses: list[float] = field(default_factory=list)
    sparsities: list[float] = field(default_factory=list)
    measured: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        """How many steps are done."""
        return len(self.losses)

    def to_json(self) -> str:
        """As a JSON document, which ``from_json`` reads; numbers come back to the bit."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TrainingCurve:
        """The curve that ``to_json`` wrote."""
        found = json.loads(text)
        return cls(**{**found, "measured": [(step, numbers) for step, numbers in found["measured"]]})
