"""What training gave: the loss of every step, and the perplexity of held-out text now and then."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field


@dataclass
class Curve:
    """``losses`` by step; ``measured`` are (steps done, held-out perplexity), the first before any training.

    ``teacher`` is the perplexity of the dense model on the same text, where there is one. ``seconds`` of training are
    those of all sittings, measurements left out.
    """

    tokens_per_step: int
    losses: list[float] = field(default_factory=list)
    measured: list[tuple[int, float]] = field(default_factory=list)
    teacher: float | None = None
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        """How many steps are done."""
        return len(self.losses)

    @property
    def tokens(self) -> int:
        """How many tokens were trained on."""
        return self.steps * self.tokens_per_step

    @property
    def closed(self) -> float | None:
        """Fraction of the gap in log-perplexity between the cut model and its teacher that training has closed.

        None without a teacher, and where the cut model was no worse than it: there was no gap to close.
        """
        if self.teacher is None or len(self.measured) < 2:
            return None
        before, after, dense = (math.log(p) for p in (self.measured[0][1], self.measured[-1][1], self.teacher))
        return (before - after) / (before - dense) if before > dense else None

    def to_json(self) -> str:
        """As a JSON document, which ``from_json`` reads; numbers come back to the bit."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Curve:
        """The curve that ``to_json`` wrote."""
        found = json.loads(text)
        return cls(**{**found, "measured": [(step, value) for step, value in found["measured"]]})
