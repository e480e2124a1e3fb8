"""What a check found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from secateur.errors import SecateurError

# a file with everything wrong says so once, not a million times
MAX_PROBLEMS = 20


@dataclass
class Finding:
    """One check: ``problems`` are sentences, ``detail`` says what was looked at, ``skipped`` why nothing was."""

    check: str
    detail: str = ""
    problems: list[str] = field(default_factory=list)
    skipped: str = ""
    more: int = 0

    @property
    def ok(self) -> bool:
        """False when something is wrong; a check that was skipped is not wrong."""
        return not self.problems

    @property
    def status(self) -> str:
        """``passed``, ``failed`` or ``not checked``."""
        return "failed" if self.problems else "not checked" if self.skipped else "passed"

    def add(self, problem: str) -> None:
        """Note a problem; beyond twenty they are only counted."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)
        else:
            self.more += 1

    def sentences(self) -> list[str]:
        """The problems, and how many more there are."""
        return [*self.problems, *([f"{self.more} more of this kind"] if self.more else [])]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        detail = self.skipped or self.detail
        return {"check": self.check, "status": self.status, "detail": detail, "problems": self.sentences()}

    @contextmanager
    def noting(self) -> Iterator[None]:
        """An error within the block becomes a problem."""
        try:
            yield
        except SecateurError as error:
            self.add(str(error))
