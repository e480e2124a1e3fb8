"""The table of a comparison: times and memory as measured, quality of the results, ratios of the two tools."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import block_matrices, measure, same_mask
from processes import Run

TEXT = """
Load, prune by 50 %, save, as one process. `seconds` is the median of the repeats and `range` all of them; `cpu` is the
processor time over all cores, `peak MB` the largest resident memory of the process. `faster` says how many times
longer llm-compressor took (the median of the ratios within a repeat), `memory` what secateur's peak is of its peak.
The checkpoint has the dtype named and both compute in it; `best` puts the fastest case of each tool side by side.
Perplexities are `secateur.evaluate`'s, in float32, for the results of both; `sparsity` counts the zeros in the linear
weights of the blocks, and `same mask` is the fraction of their entries that both tools treat alike. Rounding differs
from the first block on and decides more and more close calls further up, so perplexities differ a little even between
two batch sizes of one tool.
"""


@dataclass(frozen=True)
class Case:
    """One thing to time; ``batch`` is llm-compressor's batch size, 0 for secateur."""

    method: str
    dtype: str
    batch: int = 0

    @property
    def tool(self) -> str:
        return f"llm-compressor, batch {self.batch}" if self.batch else "secateur"

    @property
    def label(self) -> str:
        return f"{self.tool}-{self.method}-{self.dtype}".replace(", ", "-").replace(" ", "")


def table(runs: Mapping[Case, Sequence[Run]], work: Path, text: str, windows: int, length: int) -> list[dict[str, Any]]:
    """One row per checkpoint in ``work`` and per case, whose result is ``work/out/<label>``, with its quality."""
    dtypes = list(dict.fromkeys(case.dtype for case in runs))
    matrices = block_matrices(work / dtypes[0])
    rows: list[dict[str, Any]] = [
        {"method": "dense", "dtype": dtype, "tool": "", **measure(work / dtype, matrices, text, windows, length)}
        for dtype in dtypes
    ]
    for case, taken in runs.items():
        out, own = work / "out" / case.label, runs[Case(case.method, case.dtype)]
        seconds = [run.seconds for run in taken]
        row = {
            "method": case.method,
            "dtype": case.dtype,
            "tool": case.tool,
            "seconds": statistics.median(seconds),
            "range": " ".join(f"{s:.1f}" for s in sorted(seconds)),
            "cpu": statistics.median(run.cpu_seconds for run in taken),
            "peak MB": statistics.median(run.peak_bytes for run in taken) / 1e6,
        }
        if case.batch:
            pairs = list(zip(taken, own, strict=True))
            row["faster"] = statistics.median(peer.seconds / mine.seconds for peer, mine in pairs)
            row["memory"] = statistics.median(mine.peak_bytes / peer.peak_bytes for peer, mine in pairs)
            ours = work / "out" / Case(case.method, case.dtype).label
            row["same mask"] = same_mask(out, ours, matrices)
        rows.append({**row, **measure(out, matrices, text, windows, length)})
        print(rows[-1], flush=True)
    return rows


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest row of each tool beside each other, by method."""
    found = []
    timed = [row for row in rows if "seconds" in row]
    for method in dict.fromkeys(row["method"] for row in timed):
        ours, theirs = (
            min(
                (row for row in timed if row["method"] == method and (row["tool"] == "secateur") is mine),
                key=lambda row: row["seconds"],
            )
            for mine in (True, False)
        )
        found.append(
            {
                "method": method,
                "dtype": "best",
                "tool": f"secateur {ours['dtype']} / {theirs['tool']} {theirs['dtype']}",
                "faster": theirs["seconds"] / ours["seconds"],
                "memory": ours["peak MB"] / theirs["peak MB"],
            }
        )
    return found
