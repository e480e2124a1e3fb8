"""A sweep on a local Ray of two workers, one of which is killed half-way.

    python benchmarks/sweep.py --model smollm2-135m --calibration VALID.txt --evaluation TEST.txt

3 methods × 3 sparsities × 2 seeds. When half of the points are there, the worker that did the last of them is killed
(SIGKILL). What is shown: all points are there, how often each was tried, and how often the statistics of the dense
model were computed. Counted is every walk over block 0 that takes statistics, in any process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from common import write_result

NAME = "sweep"
METHODS = ("flap", "shortgpt", "wanda")
SPARSITIES = (0.1, 0.2, 0.3)
SEEDS = (0, 1)
TEXT = """
`flap` and `shortgpt` take their statistics from the dense model, so one computation serves every sparsity, and, since
the text is read from its start whatever the seed, both seeds. `wanda` observes each block after those before it have
been cut; its statistics belong to one point alone. `worker killed`: that process was ended with SIGKILL when half of
the points were there; the point that it was at is the one with two attempts.
"""

# Loaded by every worker as a plugin: a line per walk over block 0, whatever becomes of the process afterwards.
COUNTER = """
import os
from dataclasses import dataclass
from secateur.methods import get_method, register
from secateur.observe.driver import BlockWalk

def counted(name):
    original = getattr(BlockWalk, name)

    def run(self, block, layer, *arguments, **options):
        found = original(self, block, layer, *arguments, **options)
        if layer == 0 and found:
            kinds = {{kind for seen in (found.values() if name == "observe" else [found]) for kind in seen}}
            with open({log!r}, "a") as file:
                file.write(" ".join([str(os.getpid()), *sorted(kinds)]) + "\\n")
        return found

    return run

for name in ("observe", "observe_block"):
    setattr(BlockWalk, name, counted(name))

# a plugin must bring a method
@register("counter")
@dataclass(frozen=True, kw_only=True)
class Counter(get_method("magnitude")):
    pass
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--evaluation", default="builtin")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        killed = _sweep(Path(folder), arguments)
        seconds = time.perf_counter() - started
        document = json.loads((Path(folder) / "out" / "results.json").read_text(encoding="utf8"))
        walks = (Path(folder) / "walks.log").read_text(encoding="utf8").splitlines()
    computed = Counter(" ".join(line.split()[1:]) for line in walks)
    rows = [_row(point) for point in [document["dense"], *document["points"]]]
    setting = {
        "model": arguments.model,
        "calibration": f"{Path(arguments.calibration).name}, {arguments.samples} windows of {arguments.length} tokens",
        "evaluation": f"{Path(arguments.evaluation).name}, {arguments.windows} windows of {arguments.length} tokens",
        "workers": arguments.workers,
        "seconds": round(seconds, 1),
        "points": f"{sum(p['status'] == 'done' for p in document['points'])} of {_points()} there",
        "worker killed": f"after {killed} points",
        "statistics computed": ", ".join(f"{kinds}: {times}x" for kinds, times in sorted(computed.items())),
    }
    write_result(NAME, "A sweep of which one worker is killed", setting, rows, TEXT)
    print(json.dumps(setting, indent=1))


def _points() -> int:
    return len(METHODS) * len(SPARSITIES) * len(SEEDS)


def _sweep(folder: Path, arguments: argparse.Namespace) -> int:
    """Run the sweep in ``folder``; returns how many points were there when the worker was killed."""
    recipe = {
        "model": str(Path(arguments.model).absolute()) if Path(arguments.model).exists() else arguments.model,
        "calibration": {
            "source": _absolute(arguments.calibration),
            "samples": arguments.samples,
            "length": arguments.length,
        },
        "windows": arguments.windows,
        "evaluate": [f"perplexity:{_absolute(arguments.evaluation)}"],
        "sweep": {"grid": {"method": list(METHODS), "sparsity": list(SPARSITIES), "seed": list(SEEDS)}},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf8")
    (folder / "counter.py").write_text(COUNTER.format(log=str(folder / "walks.log")), encoding="utf8")
    command = [sys.executable, "-m", "secateur", "sweep", "sweep.yaml", "--out", "out", "--plugin", "counter.py"]
    with subprocess.Popen([*command, "--workers", str(arguments.workers)], cwd=folder) as process:
        done = _kill_half_way(folder / "out" / "journal.jsonl", process)
    if process.returncode:
        raise SystemExit(f"the sweep ended with exit code {process.returncode}")
    return done


def _kill_half_way(journal: Path, process: subprocess.Popen[Any]) -> int:
    while process.poll() is None:
        lines = journal.read_text(encoding="utf8").splitlines() if journal.exists() else []
        records = [json.loads(line) for line in lines[1:]]
        points = [record for record in records if record["key"] != "dense"]
        if len(points) >= _points() // 2:
            os.kill(points[-1]["worker"], signal.SIGKILL)
            return len(points)
        time.sleep(0.05)
    raise SystemExit("the sweep ended before a worker could be killed")


def _absolute(text: str) -> str:
    return str(Path(text).absolute()) if Path(text).is_file() else text


def _row(point: dict[str, Any]) -> dict[str, Any]:
    quality = next(value for name, value in point["metrics"].items() if name.startswith("perplexity"))
    return {
        "point": point["point"],
        "removed": point["removed"],
        "perplexity": quality,
        "parameters": f"{point['metrics']['parameters']:,.0f}",
        "attempts": point["attempts"],
        "seconds": point["seconds"],
    }


if __name__ == "__main__":
    main()
