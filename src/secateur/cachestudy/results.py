"""What the measurements of caches add up to: a row for every compression, and all of them at equal bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from secateur.cachestudy.measuring import DENSE, Measurement, Protocol
from secateur.report.numbers import MISSING, format_value, json_ready, percent
from secateur.versions import library_versions, machine

LEVELS = (0.75, 0.5, 0.25)
"""fractions of the dense bytes at which compressions are compared"""


@dataclass(frozen=True)
class Setting:
    """A press with what it was asked for: the fraction removed (``ratios``), or the fraction held (``held``)."""

    press: str
    asked: float | None
    spec: str


@dataclass(frozen=True)
class SpeedAt:
    """Tokens per second of reading a prompt of ``tokens`` (``prefill``) and of writing behind it (``decode``)."""

    tokens: int
    prefill: float
    decode: float


@dataclass(frozen=True)
class Row:
    """One compression. ``held`` and ``ideal`` are fractions of the dense bytes; ``loss`` in nats per token, of which
    ``loss_error`` is the standard error of the difference to the dense cache over the windows. ``likelihood`` is the
    geometric mean probability of a token of the answers, ``found`` the fraction of the answers that were written.
    ``scores`` are those of tasks of lm-eval, ``speeds`` medians over the repeats, by length.
    """

    press: str
    spec: str
    asked: float | None
    held: float | None = None
    ideal: float | None = None
    loss: float | None = None
    increase: float | None = None
    loss_error: float | None = None
    likelihood: float | None = None
    found: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    speeds: tuple[SpeedAt, ...] = ()
    error: str = ""

    @property
    def perplexity(self) -> float | None:
        """exp of the loss."""
        return None if self.loss is None else math.exp(self.loss)


@dataclass(frozen=True)
class CacheComparison:
    """Compressions of one model's cache side by side, the dense cache first."""

    model: str
    protocol: Protocol
    rows: tuple[Row, ...]
    measurements: tuple[Measurement, ...]
    missing: tuple[str, ...] = ()
    """presses that can't get as small as was asked"""

    @property
    def failed(self) -> list[Row]:
        """Rows that could not be measured."""
        return [row for row in self.rows if row.error]

    def at_equal_bytes(self, quality: str = "loss") -> dict[str, dict[float, float | None]]:
        """press → fraction held → quality (``loss`` or ``likelihood``), on the line between the rows of a press.

        None where the press was not run on both sides of it. The dense cache is a point of every line.
        """
        dense = getattr(self.rows[0], quality)
        found: dict[str, dict[float, float | None]] = {}
        for press in dict.fromkeys(row.press for row in self.rows[1:]):
            places = [(row.held, getattr(row, quality)) for row in self.rows if row.press == press]
            known = [(held, value) for held, value in places if held is not None and value is not None]
            if known and dense is not None:
                line = sorted([*known, (1.0, dense)])
                found[press] = {level: _between(line, level) for level in LEVELS}
        return found

    @property
    def verdicts(self) -> list[str]:
        """Who is best at equal bytes, in words."""
        said = []
        for quality, word in (("loss", "perplexity"), ("likelihood", "probability of the answers")):
            table = self.at_equal_bytes(quality)
            for level in LEVELS:
                values = {press: v for press, at in table.items() if (v := at[level]) is not None}
                if len(values) > 1:
                    best = (
                        min(values, key=values.__getitem__)
                        if quality == "loss"
                        else max(values, key=values.__getitem__)
                    )
                    value = math.exp(values[best]) if quality == "loss" else values[best]
                    said.append(f"At {level:.0%} of the bytes: {best}, {word} {format_value(value)}.")
        return said

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return json_ready(
            {
                "model": self.model,
                "protocol": asdict(self.protocol),
                "rows": [{**asdict(row), "perplexity": row.perplexity} for row in self.rows],
                "equal_bytes": {
                    quality: {p: {f"{level:g}": v for level, v in at.items()} for p, at in table.items()}
                    for quality in ("loss", "likelihood")
                    if (table := self.at_equal_bytes(quality))
                },
                "verdicts": self.verdicts,
                "missing": list(self.missing),
                "measurements": [asdict(one) for one in self.measurements],
                "versions": library_versions(),
                "machine": machine(),
            }
        )


def _between(line: Sequence[tuple[float, float]], level: float) -> float | None:
    """The value at ``level`` on the straight line between its neighbours; None outside of all."""
    for (left, low), (right, high) in pairwise(line):
        if left <= level <= right:
            return low if right == left else low + (high - low) * (level - left) / (right - left)
    return None


def rows_of(settings: Sequence[Setting], measurements: Sequence[Measurement]) -> tuple[Row, ...]:
    """The dense cache's row, then one for every setting."""
    by_spec: dict[str, list[Measurement]] = {}
    for one in measurements:
        by_spec.setdefault(one.spec, []).append(one)
    dense = {one.item: one for one in by_spec.get(DENSE, [])}
    every = [Setting(DENSE, None, DENSE), *settings]
    return tuple(_row(setting, by_spec.get(setting.spec, []), dense) for setting in every)


def _row(setting: Setting, found: Sequence[Measurement], dense: Mapping[str, Measurement]) -> Row:
    error = next((one.error for one in found if one.error), "")
    if error or not found:
        return Row(setting.press, setting.spec, setting.asked, error=error or "not measured")
    # where there is text, bytes are those of its prefixes, which are equally long
    text = [one for one in found if one.loss is not None]
    needles = [one for one in found if one.log_likelihood is not None]
    timed = [one for one in found if one.prefill is not None]
    tasks = [one for one in found if one.scores]
    sized = text or needles or tasks or [one for one in timed if one.length == max(each.length for each in timed)]
    whole = sum(one.bytes_dense for one in sized)
    loss, increase, spread = None, None, None
    if text:
        loss = _mean([_number(one.loss) for one in text])
        changes = [_number(one.loss) - _number(dense[one.item].loss) for one in text if one.item in dense]
        if len(changes) == len(text):
            increase, spread = math.expm1(_mean(changes)), _standard_error(changes)
    return Row(
        setting.press,
        setting.spec,
        setting.asked,
        held=sum(one.bytes_held for one in sized) / whole,
        ideal=sum(one.bytes_ideal for one in sized) / whole,
        loss=loss,
        increase=increase,
        loss_error=spread,
        likelihood=math.exp(_mean([_number(one.log_likelihood) for one in needles])) if needles else None,
        found=_mean([float(bool(one.found)) for one in needles]) if needles else None,
        scores={name: score for one in tasks for name, score in one.scores.items()},
        speeds=tuple(
            _speed_at(length, [one for one in timed if one.length == length])
            for length in sorted({one.length for one in timed})
        ),
    )


def _speed_at(tokens: int, repeats: Sequence[Measurement]) -> SpeedAt:
    prefill, decode = (median(_number(getattr(one, of)) for one in repeats) for of in ("prefill", "decode"))
    return SpeedAt(tokens, prefill, decode)


def _number(value: float | None) -> float:
    assert value is not None
    return value


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    middle = _mean(values)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1) / len(values))


def columns(comparison: CacheComparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table; what was not measured is left out."""
    rows = comparison.rows
    header = ["cache", "held", "ideal"]
    header += ["perplexity", "increase", "±"] if any(row.loss is not None for row in rows) else []
    header += ["found", "p(answer)"] if any(row.found is not None for row in rows) else []
    scores = list(dict.fromkeys(name for row in rows for name in row.scores))
    shown = [_cells(row, header) + [_plain(row.scores.get(name)) for name in scores] for row in rows]
    return [*header, *scores], shown


def _cells(row: Row, header: Sequence[str]) -> list[str]:
    if row.error:
        return [row.spec, "failed", *[MISSING] * (len(header) - 2)]
    cells = {
        "cache": row.spec,
        "held": _percent(row.held),
        "ideal": _percent(row.ideal),
        "perplexity": MISSING if row.perplexity is None else format_value(row.perplexity),
        "increase": _percent(row.increase),
        "±": _percent(row.loss_error),
        "found": _percent(row.found),
        "p(answer)": MISSING if row.likelihood is None else format_value(row.likelihood),
    }
    return [cells[name] for name in header]


def speed_columns(comparison: CacheComparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of tokens per second; empty rows where speed was not measured."""
    lengths = sorted({at.tokens for row in comparison.rows for at in row.speeds})
    header = ["tokens/s"]
    header += [f"{word} at {length:,}" for word in ("prefill", "decode") for length in lengths]
    rows = []
    for row in comparison.rows if lengths else ():
        known = {at.tokens: at for at in row.speeds}
        cells = [
            format_value(getattr(known[length], word)) if length in known else MISSING
            for word in ("prefill", "decode")
            for length in lengths
        ]
        rows.append([row.spec, *cells])
    return header, rows


def equal_columns(comparison: CacheComparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table at equal bytes; empty rows where there is none."""
    losses, likelihoods = comparison.at_equal_bytes("loss"), comparison.at_equal_bytes("likelihood")
    header = ["press"]
    header += [f"perplexity at {level:.0%}" for level in LEVELS] if losses else []
    header += [f"p(answer) at {level:.0%}" for level in LEVELS] if likelihoods else []
    rows = []
    for press in dict.fromkeys([*losses, *likelihoods]):
        cells = [_exp(losses[press][level]) for level in LEVELS] if losses else []
        cells += [_plain(likelihoods[press][level]) for level in LEVELS] if likelihoods else []
        rows.append([press, *cells])
    return header, rows


def _percent(value: float | None) -> str:
    return MISSING if value is None else percent(value)


def _exp(value: float | None) -> str:
    return MISSING if value is None else format_value(math.exp(value))


def _plain(value: float | None) -> str:
    return MISSING if value is None else format_value(value)
