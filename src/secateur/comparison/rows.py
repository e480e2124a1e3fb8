"""The result of a comparison: a row for every method and budget, with what is random averaged over its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.comparison.asked import Asked
from secateur.comparison.verdict import SURE, Candidate, Verdict, judge
from secateur.methods import get_method
from secateur.report.numbers import json_ready, percent
from secateur.sweep.pareto import REQUEST, qualities
from secateur.sweep.records import DENSE, Record
from secateur.sweep.runner import Results
from secateur.versions import library_versions, machine

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Row:
    """One method at one budget; ``records`` are its points, one per seed."""

    method: str
    sparsity: float
    records: tuple[Record, ...]
    tolerance: float

    @property
    def done(self) -> bool:
        """Whether every seed could be run."""
        return bool(self.records) and all(record.done for record in self.records)

    @property
    def error(self) -> str:
        """Why a seed failed; empty when none did."""
        return next((record.error for record in self.records if not record.done), "")

    @property
    def removed(self) -> float | None:
        """The fraction of the blocks' linear weights that is gone, or zero."""
        return _mean([record.removed for record in self.records if record.removed is not None])

    @property
    def meets_budget(self) -> bool:
        """Whether every seed removed what was asked for, within the tolerance."""
        gone = [record.removed for record in self.records if record.removed is not None]
        return self.done and all(abs(one - self.sparsity) <= self.tolerance + _ROUNDING for one in gone)

    def values(self, metric: str, *, untrained: bool = False) -> list[float]:
        """A metric of every seed that has run, of the trained model or of what it was before.

        Empty where one of them has none: the mean of the others would be that of the seeds that went well.
        """
        found = [record.metric(metric, untrained=untrained) for record in self.records if record.done]
        values = [value for value in found if value is not None]
        return values if len(values) == len(found) else []

    def mean(self, metric: str, *, untrained: bool = False) -> float | None:
        """Its mean over the seeds."""
        return _mean(self.values(metric, untrained=untrained))

    def spread(self, metric: str, *, untrained: bool = False) -> float | None:
        """Its sample standard deviation over the seeds; None for a single one."""
        values = self.values(metric, untrained=untrained)
        return statistics.stdev(values) if len(values) > 1 else None

    def request_ms(self, dense: Record) -> float | None:
        """Latency of a request: that of ``dense`` times the ratio of the two measured in turns; None without one.

        Points are hours apart, and a machine isn't the same all the time; the two of a ratio met the same one.
        """
        pairs = [(r, m) for r in self.records for m in r.metrics if m.name == REQUEST and DENSE in m.values]
        changes = [m.change(r.name) for r, m in pairs]
        ratio, base = _mean([1 + change for change in changes if change is not None]), dense.metric(REQUEST)
        return None if ratio is None or base is None else ratio * base

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of ``plan``, ``cut`` and ``heal``, each the mean over the seeds."""
        names = dict.fromkeys(name for record in self.records for name in record.stages)
        return {name: statistics.fmean(r.stages.get(name, 0.0) for r in self.records if r.stages) for name in names}

    @property
    def seconds(self) -> float | None:
        """What it took to plan, cut and train."""
        return sum(self.stages.values()) if self.stages else None

    @property
    def shared(self) -> bool:
        """Whether statistics of the dense model were there already, so that it took less time than it would alone."""
        return any(record.shared for record in self.records)

    @property
    def peak_bytes(self) -> int | None:
        """The largest resident memory of the process meanwhile, the dense model included."""
        return max((record.peak_bytes for record in self.records if record.peak_bytes), default=None)

    def kept(self, kind: str) -> list[float] | None:
        """The fraction of ``weights``, or units of a kind, that every block keeps; of a block that leaves, none."""
        found = [record.kept.get(kind, record.kept.get("layer")) for record in self.records]
        several = [one for one in found if one is not None]
        return [statistics.fmean(values) for values in zip(*several, strict=True)] if several else None


@dataclass(frozen=True)
class Overlap:
    """What plans of one budget have in common: ``jaccard[a][b]`` of what methods a and b remove.

    None where neither removes a weight, or one of them rotates hidden states, whose weights don't leave one by one.
    """

    sparsity: float
    methods: tuple[str, ...]
    jaccard: list[list[float | None]] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` gives: the rows by budget and method, the verdicts, the overlaps, and the sweep behind them.

    ``verdicts`` are those of the first metric at every budget, then those of the next.
    """

    asked: Asked
    results: Results
    rows: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]
    overlaps: tuple[Overlap, ...]
    notes: tuple[str, ...]

    @property
    def dense(self) -> Record | None:
        """The dense model, measured in the same run."""
        return self.results.dense

    @property
    def metrics(self) -> dict[str, bool]:
        """All that says how good a model is, the first of it first, and whether higher is better."""
        return qualities([record for record in [self.dense, *self.results.points] if record is not None])

    @property
    def for_all(self) -> dict[str, Any]:
        """What every method was given: allocator, repair and its target, as far as they were asked for."""
        return dict(self.results.sweep.data["steps"][0])

    @property
    def trained(self) -> bool:
        """Whether what is left was trained, and the first metric measured before that as well."""
        first = next(iter(self.metrics), "")
        return any(row.values(first, untrained=True) for row in self.rows)

    @property
    def first_verdicts(self) -> tuple[Verdict, ...]:
        """Those of the first metric, which decides."""
        first = next(iter(self.metrics), None)
        return tuple(verdict for verdict in self.verdicts if verdict.metric == first)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        base, dense = self.results.sweep.base, self.dense
        return json_ready(
            {
                "model": base.model,
                "methods": list(self.asked.contenders),
                "sparsities": list(self.asked.sparsities),
                "seeds": list(self.asked.seeds),
                "tolerance": self.asked.tolerance,
                "for_all": self.for_all,
                "calibration": base.calibration.model_dump(exclude={"seed"}),
                "windows": base.windows,
                "dtype": base.dtype,
                "dense": _dense_entry(dense) if dense else None,
                "rows": [_entry(row, dense) for row in self.rows],
                "verdicts": [_verdict_entry(verdict) for verdict in self.verdicts],
                "sure": SURE,
                "overlaps": [vars(overlap) | {"methods": list(overlap.methods)} for overlap in self.overlaps],
                "notes": list(self.notes),
                "versions": library_versions(),
                "machine": machine(),
            }
        )

    def __str__(self) -> str:
        from secateur.comparison.table import columns, width_of
        from secateur.report.tables import plain_text, rows_table

        header, rows = columns(self)
        table = plain_text(rows_table(header, rows, words=3), width_of(header, rows))
        return "\n".join([table, *(verdict.sentence for verdict in self.first_verdicts)])


def compare_records(asked: Asked, results: Results, overlaps: Sequence[Overlap]) -> Comparison:
    """The comparison of the points that are there."""
    by_key = {record.key: record for record in results.points}
    rows = []
    for sparsity in asked.sparsities:
        for method in asked.contenders:
            records = (by_key.get(point.key) for point in asked.points[method, sparsity])
            rows.append(Row(method, sparsity, tuple(r for r in records if r is not None), asked.tolerance))
    every = [record for record in [results.dense, *results.points] if record is not None]
    verdicts = [
        _judge(asked, [row for row in rows if row.sparsity == sparsity], metric, higher, results.dense)
        for metric, higher in qualities(every).items()
        for sparsity in asked.sparsities
    ]
    return Comparison(
        asked, results, tuple(rows), tuple(verdicts), tuple(overlaps), tuple(_notes(asked, results, rows))
    )


def _judge(asked: Asked, rows: Sequence[Row], metric: str, higher: bool, dense: Record | None) -> Verdict:
    candidates = []
    for row in rows:
        value = row.mean(metric)
        if row.meets_budget and value is not None:
            candidates.append(Candidate(row.method, value, tuple(record.parts(metric) for record in row.records)))
    measured = (m for row in rows for record in row.records for m in record.metrics if m.name == metric)
    return judge(
        rows[0].sparsity,
        metric,
        candidates,
        higher_is_better=higher,
        exponential=any(m.exponential for m in measured),
        dense=dense.metric(metric) if dense is not None else None,
    )


def _notes(asked: Asked, results: Results, rows: Sequence[Row]) -> list[str]:
    """What a reader of the table should know."""
    notes = list(results.notes)
    if asked.random and len(asked.seeds) == 1:
        several = ", ".join(method for method in asked.contenders if method in asked.random)
        notes.append(
            f"one seed, and so one draw of the calibration text, for {several}: the probabilities leave out what"
            " another draw would change; --seeds 0,1,2 takes it in"
        )
    for method in asked.contenders:
        if get_method(method.partition(":")[0]).descriptor.speedup != "real":
            notes.append(f"{method} sets weights to zero: parameters, MACs and time stay those of the dense model")
    notes += [
        f"{row.method} removed {percent(row.removed or 0.0)} where {percent(row.sparsity)} was asked for, and has no "
        "part in the verdict"
        for row in rows
        if row.done and not row.meets_budget
    ]
    return notes


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _dense_entry(dense: Record) -> dict[str, Any]:
    return {
        "metrics": {m.name: dense.metric(m.name) for m in dense.metrics},
        "protocols": {m.name: m.protocol for m in dense.metrics},
        "parts": {m.name: dense.parts(m.name) for m in dense.metrics if m.parts},
    }


def _entry(row: Row, dense: Record | None) -> dict[str, Any]:
    names = dict.fromkeys(metric.name for record in row.records for metric in record.metrics)
    return {
        "method": row.method,
        "sparsity": row.sparsity,
        "status": "done" if row.done else "failed",
        "error": row.error,
        "removed": row.removed,
        "meets_budget": row.meets_budget,
        "seeds": [record.values["seed"] for record in row.records],
        "metrics": {n: {"mean": row.mean(n), "spread": row.spread(n), "values": row.values(n)} for n in names},
        "parts": {n: parts for n in names if any(parts := [record.parts(n) for record in row.records])},
        "kept": {kind: row.kept(kind) for kind in dict.fromkeys(k for record in row.records for k in record.kept)},
        "untrained": {
            n: {
                "mean": row.mean(n, untrained=True),
                "spread": row.spread(n, untrained=True),
                "values": values,
                "parts": [record.parts(n, untrained=True) for record in row.records],
            }
            for n in names
            if (values := row.values(n, untrained=True))
        },
        "request_ms": None if dense is None else row.request_ms(dense),
        "seconds": row.seconds,
        "stages": row.stages,
        "shared_statistics": row.shared,
        "peak_bytes": row.peak_bytes,
        "plans": [f"plans/{record.name}" for record in row.records if record.done],
        "notes": list(dict.fromkeys(note for record in row.records for note in record.notes)),
    }


def _verdict_entry(verdict: Verdict) -> Mapping[str, Any]:
    return {
        "sparsity": verdict.sparsity,
        "metric": verdict.metric,
        "best": verdict.best,
        "runner_up": verdict.runner_up,
        "probability": verdict.probability,
        "rivals": list(verdict.rivals),
        "values": verdict.values,
        "probabilities": verdict.probabilities,
        "sentence": verdict.sentence,
    }
