"""What survives a killed run: a file of JSON lines, the first of which says what was asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.errors import OutputError
from secateur.files import write_text

JOURNAL_VERSION = 1


class LineJournal:
    """A line per thing that is done, each on the disk before the next is begun.

    ``settings``, JSON-ready values, are what must be the same for the lines to belong together; ``what`` says in errors
    whose journal it is.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], what: str) -> None:
        self.path, self.settings, self._what = path, dict(settings), what

    def start(self) -> None:
        """Begin anew. Raises OutputError."""
        write_text(self.path, _line({"version": JOURNAL_VERSION, "settings": self.settings}))

    def append(self, values: Mapping[str, Any]) -> None:
        """One line more. Raises OutputError."""
        try:
            with self.path.open("a", encoding="utf8") as file:
                file.write(_line(values))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"can't write {self.path}: {error.strerror or error}; --resume goes on later") from error

    def lines(self) -> list[dict[str, Any]]:
        """All lines but the first; a last one that was cut off by a crash is dropped.

        Raises OutputError when the journal is of something else, of other settings, or damaged.
        """
        try:
            text = self.path.read_text(encoding="utf8")
        except (OSError, UnicodeDecodeError) as error:
            raise OutputError(f"can't read {self.path}: {error}") from None
        whole, _, torn = text.rpartition("\n")
        # not splitlines: JSON leaves other ends of lines, as U+2028, within its texts as they are
        texts = whole.split("\n") if whole else []
        lines = [self._parse(line, number) for number, line in enumerate(texts, start=1)]
        if not lines or lines[0].get("version") != JOURNAL_VERSION:
            raise OutputError(f"{self.path} is not the journal of {self._what}; pass --overwrite to begin anew")
        self._compare(lines[0].get("settings", {}))
        if torn:
            # the next line must not be glued to it
            write_text(self.path, whole + "\n")
        return lines[1:]

    def damaged(self, why: str) -> OutputError:
        """The error of a line that doesn't hold what it should."""
        return OutputError(f"{self.path} is damaged ({why}); pass --overwrite to begin anew")

    def _parse(self, line: str, number: int) -> dict[str, Any]:
        try:
            parsed = json.loads(line)
        except json.JSONDecodeError:
            parsed = None
        if not isinstance(parsed, dict):
            raise OutputError(f"{self.path}, line {number} is damaged; pass --overwrite to begin anew")
        return parsed

    def _compare(self, before: Mapping[str, Any]) -> None:
        for key in {**before, **self.settings}:
            old, new = before.get(key), self.settings.get(key)
            if old != new:
                raise OutputError(
                    f"{self.path.parent} holds {self._what} with other settings ({key}: {old!r} then, {new!r} now):"
                    " choose another folder, or pass --overwrite"
                )


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
