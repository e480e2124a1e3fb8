"""How many architectures can be cut exactly, beside Torch-Pruning.

    python benchmarks/breadth.py

needs torchvision, timm and torch-pruning, which secateur doesn't. Every model runs in a process of its own, which may
run out of time or memory without harm; rows are kept as they come, so a killed run goes on where it was. ``--again``
runs those of some classes once more; ``--published`` takes the rows of the last result for done.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import resource
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import breadth_check
import zoo
from common import finished_rows, write_result

LIBRARIES = {"secateur": breadth_check.secateur, "torch-pruning": breadth_check.torch_pruning}
COLUMNS = ("source", "model", "secateur", "error", "ranking", "macs fall", "params fall", "averages", "form", "reason")
LEAST = 0.15
"""Fall of multiply-accumulates that a cut of 30 % should bring."""
TIMES = ("export s", "trace s", "group s", "cut s", "module s")

TEXT = """
Every model is random, in float64, on a small image (the first of 64, 96, ... that it takes) or on a few tokens; biases,
scales and statistics that start as constants get noise, so that nothing is hidden behind a zero. 30 % of all channels
leave: those with the smallest L1 norm of their slices relative to the mean of their group, of all groups together, one
of each staying. Then the smaller network must run, and its output must equal that of the dense network in which the
same slices are masked, to 1e-3 of the largest output and of what the cut changes in it. `macs fall` is what torch's own
counter says of both networks.

For secateur:

- exact: it does. Where an average runs over a dimension that was cut (`averages`: norms, means), the masked network
  takes it over what stays, since zeros that are averaged aren't the same as entries that are gone.
- refused: it is left as it is, with the reason in one sentence. wrong: it differs. fails: an error that isn't ours.
- form: `module` where a copy of the user's own module was cut and its export proved equal to the cut graph, call by
  call; `graph` where only the exported graph can carry the new sizes, mostly since its code holds sizes as numbers.

Torch-Pruning (`MagnitudePruner`, global, group L1) gets the same module, fraction and inputs, and is told which layers
make the output. It is run as it is on any model: not with what its examples set by hand for single architectures
(numbers of heads, attributes of attention modules to change afterwards), which would make some of its failures run.

- exact: it runs and equals the dense network with zeros for the parameters that it removed, or our reference for the
  units that it removed. differs: it runs and equals neither. A scale of attention that follows the smaller heads
  is one cause, which training can mend; a cut of the wrong channels is another.
- fails: it raises, removes nothing, gives outputs of another shape, needs more memory than the row names, with which
  secateur does, or isn't done in the processor time that it names, which is several times what secateur takes; where we
  looked, its groups then grew without an end in sight.
- runs: it runs, but there is nothing to hold it to: it normalises over what was cut, and what was cut isn't a set of
  units of ours.

Random weights of wide layers have nearly equal norms, so that a ranking relative to means spares them all, and leaves
their multiply-accumulates. Where these fall by less than 15 %, either library therefore cuts once more by norms
that are standardised within their group, again over all groups together, and that counts if it is exact, too:
`ranking`, `its ranking`. Where it isn't, the reason says what came of it.

Which entries of a parameter Torch-Pruning left is read off their values, which are all different.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*", help="like 'timm/*' or '*/resnet18'; all models by default")
    parser.add_argument("--rows", type=Path, default=Path(tempfile.gettempdir()) / "secateur-breadth.jsonl")
    parser.add_argument("--library", choices=tuple(LIBRARIES), action="append")
    parser.add_argument("--again", default="", help="rows to run again: classes such as 'wrong,fails', 'low', or 'all'")
    parser.add_argument("--fraction", type=float, default=0.3, help="of the channels that leave")
    parser.add_argument("--timeout", type=float, default=300, help="seconds of processor time of one model")
    parser.add_argument("--memory", type=float, default=16, help="GB of address space of one model")
    parser.add_argument("--published", action="store_true", help="go on from the rows of the last result")
    parser.add_argument("--table", action="store_true", help="only write the result from the rows")
    arguments = parser.parse_args()
    known = (published_rows() if arguments.published else {}) | read_rows(arguments.rows)
    if not arguments.table:
        run_all(arguments, known)
    write(known, arguments.fraction)


def read_rows(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The last row of every model and library."""
    lines = path.read_text(encoding="utf8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["source"], row["model"], row["library"]): row for row in rows}


def published_rows() -> dict[tuple[str, str, str], dict[str, Any]]:
    """What ``_table_row`` made rows of the last result from."""
    found = {}
    for row in finished_rows("breadth"):
        theirs = {column: row.get(f"its {column}", "") for column in ("ranking", "macs fall", "reason")}
        theirs |= {"class": row["torch-pruning"]}
        for library, mine in (("secateur", {**row, "class": row["secateur"]}), ("torch-pruning", theirs)):
            mine["ranking"] = mine.get("ranking") or "mean"
            if mine["class"]:
                key = (row["source"], row["model"], library)
                found[key] = {k: v for k, v in mine.items() if v != ""}
    return found


def run_all(arguments: argparse.Namespace, known: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    _import_all()
    again = arguments.again.split(",")
    # the cheapest first, as far as that is known: a run that is stopped then has most of them
    cost = {key[:2]: _seconds(row) for key, row in known.items() if key[2] == "secateur"}
    models = sorted(zoo.entries(arguments.patterns), key=lambda e: cost.get((e.source, e.name), float("inf")))
    for entry in models:
        for library in arguments.library or LIBRARIES:
            key = (entry.source, entry.name, library)
            if key in known and not _asked(known[key], again):
                continue
            # ours is a yardstick for how long a model takes to build and run
            ours = cost.get(key[:2], arguments.timeout)
            limit = arguments.timeout if library == "secateur" else min(arguments.timeout, max(60, 3 * ours))
            row = in_process(library, entry, limit, arguments, "mean")
            if _spares(row):
                other = in_process(library, entry, limit, arguments, "standardised")
                failed = f"standardised: {other['class']}, {other.get('reason', '')}"
                row = other if other["class"] == "exact" else {**row, "reason": failed}
            row = {"source": entry.source, "model": entry.name, "library": library, **row}
            known[key] = row
            with arguments.rows.open("a", encoding="utf8") as sink:
                sink.write(json.dumps(row) + "\n")
            print(*key, row["class"], row.get("error", ""), row.get("reason", ""), f"{_seconds(row):.0f}s", flush=True)


def _asked(row: dict[str, Any], again: list[str]) -> bool:
    return "all" in again or row["class"] in again or ("low" in again and _spares(row))


def _spares(row: dict[str, Any]) -> bool:
    """Whether the cut is right, and hardly makes the model smaller."""
    return row["class"] == "exact" and row["macs fall"] < LEAST


def _seconds(row: dict[str, Any]) -> float:
    """Processor time of a model; published rows have that of the cut, and building and running takes as much again."""
    return row.get("seconds", 2 * sum(row.get(name, 0) for name in TIMES))


def _import_all() -> None:
    """Before the first fork: importing takes longer than most models."""
    import timm  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torch_pruning  # noqa: F401
    import torchvision.models  # noqa: F401
    import transformers  # noqa: F401


def in_process(
    library: str, entry: zoo.Entry, limit: float, arguments: argparse.Namespace, ranking: str
) -> dict[str, Any]:
    """The row of one model from a fork of this process, or why there is none."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(library, entry, limit, arguments, ranking, sender))
    child.start()
    sender.close()
    out_of_time = {"class": "fails", "reason": f"out of time after {limit:.0f} s", "seconds": limit}
    try:
        # processor time is what is limited, so that a busy machine changes nothing; this is for what hangs
        row = receiver.recv() if receiver.poll(10 * limit) else out_of_time
    except EOFError:
        child.join()
        died = {"class": "fails", "reason": "its process died"}
        row = out_of_time if child.exitcode == -signal.SIGXCPU else died
    child.kill()
    child.join()
    return row


def _work(
    library: str, entry: zoo.Entry, limit: float, arguments: argparse.Namespace, ranking: str, sender: Any
) -> None:
    memory = int(arguments.memory * 1e9)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings of other people's models
    try:
        row = LIBRARIES[library](entry, arguments.fraction, ranking)
    except Exception as error:  # a row must come whatever happens
        import traceback

        frames = [f for f in traceback.extract_tb(error.__traceback__) if "secateur" in f.filename]
        at = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
        row = {"class": "fails", "reason": breadth_check.first_line(error) + at}
    sender.send({**row, "ranking": ranking, "seconds": time.process_time()})


def write(known: dict[tuple[str, str, str], dict[str, Any]], fraction: float) -> None:
    """The table of all rows that there are, in the order of the models."""
    order = {(e.source, e.name): n for n, e in enumerate(zoo.entries())}
    models = sorted({key[:2] for key in known if key[:2] in order}, key=order.__getitem__)
    table = [_table_row(known, source, name) for source, name in models]
    versions = {p: importlib.metadata.version(p) for p in ("torchvision", "timm", "torch-pruning")}
    setting = {"removed": fraction, "tolerance": breadth_check.TOLERANCE, "seed": 0, "others": versions}
    write_result("breadth", "Architectures that can be cut", setting, table, TEXT + summary(known, models))


def _table_row(known: dict[tuple[str, str, str], dict[str, Any]], source: str, name: str) -> dict[str, Any]:
    ours, theirs = (known.get((source, name, library), {}) for library in LIBRARIES)
    row = {**ours, "secateur": ours.get("class", ""), "source": source, "model": name}
    found = {column: row.get(column, "") for column in (*COLUMNS[:-1], *TIMES)}
    found |= {"torch-pruning": theirs.get("class", "")}
    found |= {f"its {column}": theirs.get(column, "") for column in ("ranking", "macs fall")}
    reasons = [ours.get("reason"), ours.get("note")]
    found["reason"] = "; ".join(r.replace("|", "/") for r in reasons if r)
    return {**found, "its reason": theirs.get("reason", "").replace("|", "/")}


def summary(known: dict[tuple[str, str, str], dict[str, Any]], models: list[tuple[str, str]]) -> str:
    """Counts by library and source, as a table in Markdown."""
    classes = ("exact", "refused", "runs", "differs", "wrong", "fails")
    heads = ["library", "source", "models", *classes, f"exact and macs fall {LEAST:.0%}"]
    lines = ["", "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for library in LIBRARIES:
        for source in ("all", *dict.fromkeys(source for source, _ in models)):
            rows = [r for k, r in known.items() if k[2] == library and k[:2] in models and source in ("all", k[0])]
            counts = Counter(r["class"] for r in rows)
            enough = sum(r["class"] == "exact" and not _spares(r) for r in rows)
            cells = [library, source, len(rows), *(counts[c] for c in classes), enough]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    ours = [known[key] for m in models if (key := (*m, "secateur")) in known]
    exact = [r for r in ours if r["class"] == "exact"]
    own, averages = sum(r["form"] == "module" for r in exact), sum(bool(r.get("averages")) for r in exact)
    worst = max((r["error"] for r in exact), default=0)
    lines += [
        "",
        f"Of the {len(exact)} that secateur cuts exactly, {own} keep their own module, the others are graphs;",
    ]
    lines += [f"{averages} average over a dimension that was cut. The largest error is {worst:.0e}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
