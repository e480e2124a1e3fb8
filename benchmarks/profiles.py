"""What a Python command spends its time on, by stage; sampled from outside, so that the code needs no timers."""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from processes import measured

# samples per second
RATE = 50

# Looked for from the innermost frame outwards; the first that matches names the stage. A frame reads
# "function (file:line)". Files of both tools stand in one list, so that their profiles are counted alike.
STAGES = (
    (
        "statistics",
        r"secateur/observe/(statistics|products|changes)\.py|^(accumulate_\w+|calibrate_module) \(.*/pruning/",
    ),
    ("scoring", r"secateur/(methods|criteria|allocate|heal|solver)/|^(sparsify_weight|compress_modules) \(.*/pruning/"),
    ("writing", r"^save_\w+ \(|^_?write\w* \(.*secateur/"),
    ("writing", r"secateur/(models/(saving|card|shards)|runs/(cutting|output)|files|manifest)\.py"),
    ("reading", r"^_?(from_pretrained|load_\w+|read_\w+) \(.*(transformers|safetensors|secateur/models)/"),
    ("reading", r"secateur/(models/(loading|opening|sources|skeleton|weightless)|tensorfiles)\.py"),
    ("reading", r"transformers/core_model_loading\.py"),
    ("forwards", r"transformers/models/\w+/modeling_"),
    ("tokens", r"secateur/observe/(calibration|textfiles)\.py|/datasets/|^get_calibration_dataloader \("),
    ("tracing", r"^trace_subgraphs \("),
    ("cutting", r"secateur/models/surgery\.py"),
    (
        "driver",
        r"secateur/(observe/(driver|activations|store)|engine/\w+|keeping|runs/\w+)\.py|llmcompressor/pipelines/",
    ),
    ("report", r"secateur/report/"),
)
# Looked for in the whole stack first: a forward within an evaluation is evaluation.
OUTER = (("imports", r"importlib\._bootstrap"), ("evaluation", r"secateur/(evaluation|estimate)/"))
ORDER = list(dict.fromkeys([*(name for name, _ in (*OUTER, *STAGES)), "other"]))


def profiled(command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> dict[str, float]:
    """Seconds by stage of one run of a Python command, sampled from outside by py-spy; ``total`` is its wall time.

    Work of background threads goes to ``<stage> (background)`` and runs beside the rest. Samples of the main thread
    that belong to no stage are ``other``; what no sample saw (the interpreter's start and end) is missing.
    """
    raw = log.with_suffix(".stacks")
    options = ["--rate", str(RATE), "--format", "raw", "--full-filenames", "--threads", "--idle"]
    run = measured(
        [find_sampler(), "record", *options, "--output", str(raw), "--", *command], log=log, environment=environment
    )
    stages = by_stage(raw.read_text(encoding="utf8").splitlines())
    return {"total": run.seconds} | {stage: count / RATE for stage, count in stages.items()}


def find_sampler() -> str:
    """Path of py-spy, beside this Python or on the PATH. Raises RuntimeError when it is not installed."""
    for folder in (str(Path(sys.executable).parent), None):
        if found := shutil.which("py-spy", path=folder):
            return found
    raise RuntimeError("the profile needs py-spy: pip install py-spy, or pass --no-profile")


def by_stage(lines: Iterable[str]) -> Counter[str]:
    """Samples by stage, from collapsed stacks: ``thread;outermost;…;innermost count``."""
    counts: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")[1:]
        if not frames:
            continue
        stage = stage_of(frames)
        background = re.search(r"\b_bootstrap \(.*threading\.py", frames[0])
        if not background:
            counts[stage] += int(count)
        elif stage != "other":  # a background thread without a stage waits for work
            counts[f"{stage} (background)"] += int(count)
    return counts


def stage_of(frames: Sequence[str]) -> str:
    """The stage that a stack, outermost frame first, belongs to; ``other`` when no rule knows it."""
    # newer samplers say Class.method and function.<locals>.inner
    frames = [re.sub(r"^\S*\.(?=[^. ]+ \()", "", frame) for frame in frames]
    for stage, pattern in OUTER:
        if any(re.search(pattern, frame) for frame in frames):
            return stage
    for frame in reversed(frames):
        for stage, pattern in STAGES:
            if re.search(pattern, frame):
                return stage
    return "other"
