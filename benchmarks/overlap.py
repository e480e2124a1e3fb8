"""Reading and computing at the same time: a slow disk costs no more than the slower of the two.

    python benchmarks/overlap.py

The same runs with the disk as it is and with one of 200 MB/s (see ``slow_disk.py``), interleaved, medians. `read` is
the time that the slow disk needs for the bytes that were read, `compute` the time of the run on the fast disk without
its start.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import finished_rows, write_result
from processes import measured
from scale import SHAPES, make_checkpoint

TEXT = """
`ratio` is (time on the slow disk − start) / max(`read`, `compute`): 1 is perfect overlap, and without any it would be
(`read` + `compute`) / max(`read`, `compute`), the last column. Seconds. `GB read` is what the run reads, `own` the part
of it that the run had written: cut blocks and masks, copied into the checkpoint.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=200.0, help="MB/s")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--windows", type=int, action="append", help="calibration windows (default: 2, 8 and 32)")
    arguments = parser.parse_args()
    wanted = arguments.windows or [2, 8, 32]
    work = Path(tempfile.mkdtemp(prefix="overlap-"))
    # rows of an earlier run that this one doesn't make again
    rows = [row for row in finished_rows("overlap") if row["windows of 256"] not in wanted]
    try:
        model = make_checkpoint(work / "model", **SHAPES["32 blocks"])
        for samples in wanted:
            taken: dict[float, list[dict[str, Any]]] = {0.0: [], arguments.rate: []}
            for _ in range(arguments.repeats):
                for rate, found in taken.items():
                    found.append(_run(work, model, samples, rate))
            rows.append(_row(samples, taken[0.0], taken[arguments.rate], arguments.rate))
            print(rows[-1], flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    setting = {
        "model": "random Llama, 32 blocks of 1024, bfloat16",
        "method": "wanda 50 %",
        "disk": f"{arguments.rate} MB/s",
        "repeats": arguments.repeats,
    }
    rows.sort(key=lambda row: row["windows of 256"])
    write_result("overlap", "Reading while computing", setting, rows, TEXT)


def _run(work: Path, model: Path, samples: int, rate: float) -> dict[str, Any]:
    out, counts = work / "out", work / "counts.json"
    slow_disk = Path(__file__).with_name("slow_disk.py")
    options = ["--method", "wanda", "--samples", str(samples), "--length", "256", "--out", str(out)]
    quick = ["--no-measure", "--no-report", "--no-estimate"]
    command = [sys.executable, str(slow_disk), str(rate), str(counts), "prune", str(model), *options, *quick]
    found = measured(command, log=work / "log", environment=os.environ)
    shutil.rmtree(out)
    return {"seconds": found.seconds, **json.loads(counts.read_text())}


def _row(samples: int, fast: list[dict[str, Any]], slow: list[dict[str, Any]], rate: float) -> dict[str, Any]:
    def middle(found: list[dict[str, Any]], key: str) -> float:
        return statistics.median(run[key] for run in found)

    read = middle(slow, "bytes") / (rate * 1e6)
    compute = middle(fast, "seconds") - middle(fast, "start")
    streamed = middle(slow, "seconds") - middle(slow, "start")
    return {
        "windows of 256": samples,
        "GB read": middle(slow, "bytes") / 1e9,
        "own": middle(slow, "own") / 1e9,
        "read": read,
        "compute": compute,
        "slow disk": streamed,
        "ratio": streamed / max(read, compute),
        "without overlap": (read + compute) / max(read, compute),
    }


if __name__ == "__main__":
    main()
