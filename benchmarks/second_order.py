"""Quality against time of second-order pruning and of refits, beside the methods that they start from.

    python benchmarks/second_order.py --calibration VALID.txt --evaluation TEST.txt

Calibration: 64 consecutive windows of 512 tokens. Evaluation: the first 40 windows of 512 tokens. Every row is a
process of its own, so that its peak memory is its own; the result is written after every row, and a second call goes
on where the first stopped. ``--only 0.7`` runs the rows of one setting first, ``--method osscar`` those of one method.
``--other`` measures a second text, which no choice of ours was made by, and runs rows again that haven't seen it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import svg
from common import RESULTS, finished_rows, here, write_result
from processes import measured

# (method, what else is asked) of single weights, at every setting; those that the claims need come first
WEIGHTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("wanda", {}),
    ("sparsegpt", {}),
    ("alps", {}),
    ("alps", {"allocate": "progression"}),
    ("wanda", {"heal": "refit"}),
    ("admm", {}),
    ("wanda", {"allocate": "progression"}),
    ("sparsegpt", {"allocate": "progression"}),
    ("sparsegpt", {"heal": "refit"}),
    ("wanda", {"allocate": "progression", "heal": "refit"}),
    ("alps", {"allocate": "progression", "target": "dense"}),
    ("admm", {"allocate": "progression"}),
    ("sparsegpt", {"allocate": "progression", "heal": "refit"}),
    ("alps", {"allocate": "owl"}),
    ("alps", {"target": "dense"}),
    ("alps", {"target": "stream"}),
    ("alps", {"allocate": "progression", "target": "stream"}),
    ("alps", {"target": "stream", "true_sequential": True}),
    ("alps", {"allocate": "progression", "target": "stream", "true_sequential": True}),
    ("wanda", {"heal": "refit", "target": "stream", "true_sequential": True}),
    ("wanda", {"heal": "refit", "target": "stream"}),
    ("wanda", {"heal": "refit", "target": "dense"}),
    ("icbs", {"together": 15}),
    ("icbs", {"together": 15, "heal": "refit", "target": "stream"}),
    ("admm", {"heal": "refit"}),
    ("magnitude", {}),
    ("magnitude", {"heal": "refit"}),
)
CENTRE = {"accumulation": "centre", "first_order": "off"}
UNITS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("flap", {}),
    ("flap", {"heal": "refit"}),
    ("osscar", {}),
    ("osscar", {"allocate": "progression"}),
    ("osscar", {"target": "dense"}),
    ("wanda_sp", {}),
    ("wanda_sp", {"heal": "refit"}),
    ("wanda_sp", {"heal": "bias"}),
    ("cfsp", {}),
    ("cfsp", {"heal": "refit"}),
    ("osscar", {"allocate": "cfsp"}),
    ("osscar", {"target": "stream"}),
    ("tyr", {}),
    ("tyr", {"accumulation": "centre"}),
    ("tyr", CENTRE),
    ("tyr", {**CENTRE, "seed": 1}),
    ("tyr", {**CENTRE, "seed": 2}),
    ("tyr", {**CENTRE, "parts": "mlp"}),
    ("tyr", {**CENTRE, "parts": "mlp", "seed": 1}),
    ("tyr", {**CENTRE, "parts": "mlp", "seed": 2}),
    # six times as many tokens in its searches as by default; published are ninety times these
    ("tyr", {**CENTRE, "generations": 20, "stage_tokens": "1024,8192"}),
    ("cfsp", {"heal": "refit", "target": "stream"}),
)
WEIGHT_SETTINGS = ({"sparsity": 0.7}, {"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.6})
UNIT_SETTINGS = ({"sparsity": 0.2}, {"sparsity": 0.3}, {"sparsity": 0.4})
# options that are the methods' own, and how a row is called that has them
OWN = {
    "true_sequential": "true sequential",
    "accumulation": "{} handed on",
    "first_order": "first order {}",
    "parts": "{} alone",
    "seed": "seed {}",
    "generations": "{} generations",
    "stage_tokens": "on {} tokens",
    "together": "{} matrices a batch",
}
# as their papers have them; all else are combinations of ours
PUBLISHED = ("magnitude", "wanda", "sparsegpt", "admm", "alps", "flap", "osscar", "wanda_sp", "cfsp", "tyr")
REFERENCE = {
    ("wanda", "0.5"): "48.4",
    ("sparsegpt", "0.5"): "38.2–38.8",
    ("sparsegpt + refit", "0.5"): "35.9",
    ("alps", "0.5"): "34.1",
    ("wanda", "0.7"): "654",
    ("sparsegpt", "0.7"): "106.7",
    ("alps", "0.7"): "66.2",
}

TEXT = """
Perplexity after pruning, no training afterwards, with the seconds of the whole plan and the peak memory of its
process (model, plan and evaluation) beside it. Single weights: fraction of every matrix of the blocks. Heads and
neurons: fraction of the blocks' linear weights. `refit` is `--heal refit`, `progression` and `owl` are `--allocate`;
`dense` and `stream` say what least squares aim at (`--target`), `true sequential` that matrices see what those before
them in the same block have become (`true_sequential=true`). The reference column holds what plain second
implementations gave with the same windows, for SmolLM2-135M. `on` is the processor and the type of the calibration
forwards; times of two are not to be compared, and the picture has a colour for each. `front` marks rows which nothing
at the same setting and on the same processor beats in both perplexity and processor time. "seconds" are those of a
clock on the wall, beside whatever else ran on the machine; "cpu seconds" are the processor's, in which a few percent
say nothing.
Rows that the command has and this table doesn't were not run yet: a second call goes on with them.

SmolLM2 has three key-value heads a layer, and Gemma 3 270M one, which stays. What spreads a budget evenly over layers
rounds them down, so that OSSCAR takes none of SmolLM2 at 0.2 and 0.3 and one of each layer at 0.4; Tyr takes the
fraction of heads and of neurons alike, or, as `mlp alone`, all of it from neurons.

`other`, where it was measured, is the perplexity on C4's web text, which chose nothing. {best}

Filled marks are on the front. What is more than four times the median stands at the upper edge, whatever its number.

![Perplexity against seconds](second-order-smollm2-135m.svg)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--other", help="a second text to evaluate on")
    parser.add_argument("--dtype", default="float32", help="of the calibration forwards")
    parser.add_argument("--only", action="append", help="settings to run, as in the table: 0.7, 2:4; repeatable")
    parser.add_argument("--kind", choices=("weights", "units"), help="default: both")
    parser.add_argument("--method", action="append", help="as the table calls it: alps + progression; repeatable")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        _row(arguments, json.loads(arguments.row))
        return
    name = f"second-order-{Path(arguments.model).name}"
    rows = finished_rows(name)
    for kind, method, options, setting in [("", "", {}, {}), *_wanted(arguments)]:
        label, asked = _label(method, options), str(next(iter(setting.values()), ""))
        same = [row for row in rows if (row["method"], row["removed"], row.get("kind", "")) == (label, asked, kind)]
        if any(row.get("other") or not arguments.other for row in same):
            continue
        rows = [row for row in rows if row not in same]
        found = _measure(arguments, method, {**setting, **options})
        rows.append({**({"kind": kind} if kind else {}), "removed": asked, "method": label, **found})
        known = kind == "weights" and Path(arguments.model).name == "smollm2-135m"
        rows[-1]["reference"] = REFERENCE.get((label, asked), "") if known else ""
        print(rows[-1], flush=True)
        _write(name, arguments, rows)


PARTS = (("weights", WEIGHT_SETTINGS, WEIGHTS), ("units", UNIT_SETTINGS, UNITS))


def _wanted(arguments: argparse.Namespace) -> Any:
    for kind, settings, runs in PARTS:
        for (method, options), setting in itertools.product(runs, settings):
            if arguments.kind not in (None, kind) or ("pattern" in setting and "allocate" in options):
                continue
            chosen = not arguments.method or _label(method, options) in arguments.method
            if chosen and (not arguments.only or str(next(iter(setting.values()))) in arguments.only):
                yield kind, method, options, setting


def _place(row: dict[str, Any]) -> tuple[int, ...]:
    """Where a row stands in the table: by setting, and within one by method."""
    for place, (kind, settings, runs) in enumerate(PARTS):
        if row.get("kind") == kind:
            asked = [str(next(iter(setting.values()))) for setting in settings]
            return place, asked.index(row["removed"]), [_label(*run) for run in runs].index(row["method"])
    return (-1,)


def _label(method: str, options: dict[str, Any]) -> str:
    target = options.get("target", "current")
    words = [method or "dense", *(options[key] for key in ("allocate", "heal") if key in options)]
    words = [" + ".join(words), *([target] if target != "current" else [])]
    return ", ".join([*words, *(said.format(options[name]) for name, said in OWN.items() if options.get(name))])


def _measure(arguments: argparse.Namespace, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Perplexity, seconds and peak memory of one row, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        given = ["--model", arguments.model, "--calibration", arguments.calibration, "--dtype", arguments.dtype]
        given += ["--evaluation", arguments.evaluation, *(["--other", arguments.other] if arguments.other else [])]
        given += ["--row", json.dumps({"method": method, "options": options, "folder": folder})]
        run = measured([sys.executable, __file__, *given], log=log, environment=os.environ)
        found = json.loads((Path(folder) / "row.json").read_text(encoding="utf8"))
        return {**found, "peak MB": run.peak_bytes / 1e6}


def _row(arguments: argparse.Namespace, row: dict[str, Any]) -> None:
    import secateur as sc
    from secateur.report.build import removed_fraction

    model, tokenizer = sc.load(arguments.model)
    found: dict[str, Any] = {}
    cut = model
    if row["method"]:
        started, worked = time.perf_counter(), time.process_time()
        plan = sc.plan(
            model,
            tokenizer,
            method=row["method"],
            **{name: value for name, value in row["options"].items() if name not in OWN},
            options={name: value for name, value in row["options"].items() if name in OWN},
            calibration=arguments.calibration,
            samples=64,
            length=512,
            dtype=arguments.dtype,
        )
        found["seconds"] = time.perf_counter() - started
        # what this process was given of the processors, whatever else was running
        found["cpu seconds"] = time.process_time() - worked
        found["really removed"] = f"{removed_fraction(plan, sc.anatomy(model)):.4f}"
        found["on"] = f"{here()}, {arguments.dtype}"
        found["notes"] = len(plan.provenance[0].notes)
        cut = sc.apply(plan, model)
    for name, text in (("other", arguments.other), ("perplexity", arguments.evaluation)):
        if text:
            table = sc.evaluate({"model": cut}, tokenizer, [f"perplexity:{text}"], length=512, windows=40)
            found = {name: table["perplexity"].values["model"], **found}
    (Path(row["folder"]) / "row.json").write_text(json.dumps(found), encoding="utf8")


def on_front(rows: list[dict[str, Any]], row: dict[str, Any]) -> bool:
    """Whether no row of the same setting and processor is at least as good in both perplexity and processor time."""
    mine = (row["perplexity"], row["cpu seconds"])
    for other in rows:
        if other is not row and _rivals(other) == _rivals(row):
            theirs = (other["perplexity"], other["cpu seconds"])
            if theirs[0] <= mine[0] and theirs[1] <= mine[1] and theirs != mine:
                return False
    return True


def _rivals(row: dict[str, Any]) -> tuple[Any, ...]:
    return row.get("kind"), row["removed"], row.get("on")


def _write(name: str, arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    rows.sort(key=_place)
    for row in rows:
        if "cpu seconds" in row:
            row["front"] = "yes" if on_front(rows, row) else ""
    setting = {
        "model": arguments.model,
        "calibration": "WikiText-2 validation, file as it is, 64 consecutive windows of 512 tokens",
        "evaluation": "WikiText-2 test, file as it is, first 40 consecutive windows of 512 tokens",
        "seed": "0 where a row names none",
        "dtype": "of calibration forwards as in the rows, float32 solvers and evaluation",
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }
    text = TEXT.replace("second-order-smollm2-135m", name).replace("{best}", _about_best(rows))
    write_result(name, "Second-order pruning: quality against time", setting, rows, text)
    (RESULTS / f"{name}.svg").write_text(drawn(rows), encoding="utf8")


def _about_best(rows: list[dict[str, Any]]) -> str:
    """What ``best`` takes at every setting, beside the best of the published methods that were run."""
    from secateur.methods import make_method

    said = []
    for kind, settings, _ in PARTS:
        for setting in settings:
            asked = str(next(iter(setting.values())))
            mine = {row["method"]: row for row in rows if (row.get("kind"), row["removed"]) == (kind, asked)}
            best: Any = make_method("best", {**setting, "cut": "weights" if kind == "weights" else "heads_and_neurons"})
            chosen = best.combination()
            label = _label(
                chosen.method, {**chosen.options, "allocate": chosen.allocate} if chosen.allocate else chosen.options
            )
            published = [row for name, row in mine.items() if name in PUBLISHED]
            if label not in mine or not published:
                continue
            parts = []
            for column in ("perplexity", "other"):
                rivals = [row for row in published if row.get(column)]
                if rivals and mine[label].get(column):
                    first = min(rivals, key=lambda row: row[column])
                    parts.append(f"{mine[label][column]:.1f} ({first['method']} {first[column]:.1f})")
            said.append(f"| {kind}, {asked} | {label} | {' | '.join([*parts, ''][:2])} |")
    head = "| cut | `best` takes | perplexity (best published method run) | other |\n| --- | --- | --- | --- |\n"
    return (
        "What `best` takes within minutes, and the best of the published methods beside it, of those that were run;"
        " of the second text that is fewer of them:\n\n" + head + "\n".join(said)
    )


WIDTH, HEIGHT, LEFT, BOTTOM = 760, 300, 60, 40
STYLE = "text{font-size:11px} .label{stroke:none} .open{fill:none}"


def drawn(rows: list[dict[str, Any]]) -> str:
    """One panel a setting: perplexity over processor seconds, both logarithmic; filled where nothing beats it."""
    settings = list(dict.fromkeys((row["kind"], row["removed"]) for row in rows if "cpu seconds" in row))
    processors = list(dict.fromkeys(row.get("on", "") for row in rows if "cpu seconds" in row))
    parts = []
    for place, (kind, removed) in enumerate(settings):
        mine = [row for row in rows if (row.get("kind"), row["removed"]) == (kind, removed)]
        panel = _panel(f"{kind}, {removed} removed", mine, processors)
        parts.append(svg.below(place * HEIGHT, panel))
    height = HEIGHT * max(1, len(settings))
    title = "Perplexity against seconds"
    return svg.document(WIDTH, height, parts, title=title, series=len(processors), light=STYLE, dark=STYLE)


def _panel(title: str, rows: list[dict[str, Any]], processors: list[str]) -> str:
    along = _axis([row["cpu seconds"] for row in rows], LEFT, WIDTH - 170)
    # one ruinous row would press all others together
    highest = 4 * statistics.median(row["perplexity"] for row in rows)
    up = _axis([min(row["perplexity"], highest) for row in rows], HEIGHT - BOTTOM, 30)
    right, bottom = WIDTH - 20, HEIGHT - BOTTOM
    parts = [
        svg.down(LEFT, 24, bottom),
        svg.across(LEFT, bottom, right),
        svg.text(LEFT, 16, title, bold=True),
        svg.text(right, HEIGHT - 22, "processor seconds of the plan, logarithmic", anchor="end"),
        f'<text transform="translate(16 {bottom}) rotate(-90)">perplexity, logarithmic</text>',
    ]
    labels = []
    for row in rows:
        x, y = along(row["cpu seconds"]), up(row["perplexity"])
        labels.append((x, y, f"{row['method']} {row['perplexity']:.4g}"))
        css = f"c{processors.index(row.get('on', ''))}" + ("" if row["front"] else " open")
        said = f"{row['method']}: {row['perplexity']:,.1f} in {row['cpu seconds']:,.0f} s"
        parts.append(svg.dot(x, y, css, said, radius=4))
    parts += _labels(labels)
    for place, name in enumerate(processors):
        if any(row.get("on", "") == name for row in rows):
            parts.append(svg.text(right, 16 + 13 * place, name, anchor="end", css=f"label c{place}"))
    return "".join(parts)


LINE = 11
"""Height of a label."""


def _labels(marks: list[tuple[float, float, str]]) -> list[str]:
    """A label beside every mark, at the nearest height where it lies on no other label and in the panel."""
    taken = [(x - 4, x + 4, y) for x, y, _ in marks]
    drawn = []
    for x, y, text in sorted(marks):
        right = x < WIDTH * 0.6
        # six pixels a letter at most, of a font of eleven
        start, end = (x + 6, x + 7 + 6 * len(text)) if right else (x - 7 - 6 * len(text), x - 6)
        heights = [y + sign * step * LINE / 2 for step in range(2 * HEIGHT // LINE) for sign in (-1, 1)]
        free = [
            height
            for height in heights
            if 24 < height < HEIGHT - BOTTOM
            and not any(left < end and start < other and abs(at - height) < LINE for left, other, at in taken)
        ]
        y = free[0] if free else y
        taken.append((start, end, y))
        drawn.append(svg.text(x + (7 if right else -7), y + 4, text, anchor="start" if right else "end"))
    return drawn


def _axis(values: list[float], start: float, stop: float) -> Callable[[float], float]:
    """A logarithmic axis with some room at both ends."""
    room = 0.05 * (stop - start)
    return svg.logarithmic(min(values), max(values), start + room, stop - room)


if __name__ == "__main__":
    main()
