"""Structured methods side by side at equal budgets, as ``secateur compare`` gives it, without and with recovery.

    python benchmarks/structured.py --calibration VALID.txt --evaluation TEST.txt
    python benchmarks/structured.py --calibration VALID.txt --evaluation TEST.txt --heal lora:steps=300
    python benchmarks/structured.py --calibration VALID.txt --evaluation TEST.txt --items arc_easy.jsonl.gz

Calibration: 64 consecutive windows of 512 tokens. Evaluation: the first 40 windows of 512 tokens. Methods join one
comparison one by one, the result is written after each of them, and a second call goes on behind what it holds: the
losses of every window are in its JSON, so that the verdict is one over all methods. With ``--heal`` both are measured,
what is cut and what is trained, and rows of what is cut that are there already stay as they are. With ``--items``, see
``items.py``, rows that haven't seen them are made again, and so are those of random methods that ran with fewer
``--seeds``.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import items
import svg
from common import RESULTS, finished_rows, here, write_result

import secateur as sc
from secateur.comparison.asked import TOLERANCE, Asked, ask, split
from secateur.comparison.verdict import SURE, Candidate, judge
from secateur.errors import UnsupportedModelError
from secateur.sweep.runner import make_job
from secateur.sweep.worker import Worker

# the cheap ones first
METHODS = (
    "flap", "wanda_sp", "shortgpt", "magnitude_sp", "minitron", "amp", "cfsp", "llm_pruner", "angular", "osscar",
    "flap:heal=refit", "cfsp:heal=refit", "slicegpt:budget=params,round_to=4,orientation=pca", "random_sp",
    "adapt_pruner", "blockpruner:tokens=512", "prunenet", "loraprune:steps=75,batch=1,every=3", "tyr:iterations=1",
    "evopress:starts=12,generations=8,offspring=10,first_tokens=512,last_tokens=1024",
)  # fmt: skip
SPARSITIES = (0.2, 0.4)
SEEDS = 3
OFF = "off budget"
TEXTS = {"samples": 64, "length": 512, "windows": 40}
TEXT = """
Perplexity after structured pruning, by `recovery`: none, or the same training for all. `removed` is the fraction of the
linear weights of the blocks that is really gone; who misses what was asked for by more than 0.01 has no part in the
verdict; `refused` is who can't cut this model. Methods run with so many `seeds`, and ± is the standard deviation over
them. `p` is the probability that the best method of a budget is better, when windows and seeds are drawn anew; below
0.95 two methods are not distinguishable. Rows with one seed are of one calibration text, its first windows: what
another would change is not in `p`. Seconds and memory are those of planning, cutting and
training, in one process that also holds the dense model, beside whatever else ran on the machine, which made some of
them take twice as long; times `on` two processors are not to be compared, and `shared` ones would be longer without
statistics that another row had taken. Of methods that ran at once only the first training computes what the teacher
predicts.
"""
ITEMS = """
`arc_easy` is the share of right answers among four, chosen by likelihood, `ioi` that of names (`lambada_openai`: of
last words) that are written as they must follow, each of the first {limit} items of the file, so that a difference of
less than a tenth may be chance.
"""
SHORTENED = {
    "blockpruner": "BlockPruner tries on 512 tokens",
    "evopress": "EvoPress has 8 generations",
    "loraprune": "LoRAPrune has 75 steps",
}
SHORTENED_TEXT = """
What a method tries or trains by itself is shortened by its options: {shortened}.
"""
TRAINS = """
LoRAPrune trains while it prunes, by cross-entropy on the calibration text, which is of the kind that is measured here:
its rows without recovery are trained ones too.
"""
MISSING = """
Not run yet, so that a second call goes on with them: {methods}.
"""
HIDDEN = ("losses",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--heal", default="", help="training that all get, such as lora:steps=300,batch=1,length=128")
    parser.add_argument("--methods", default=",".join(METHODS), help="which of them (default: all)")
    parser.add_argument(
        "--items", action="append", default=[], help="file with items of arc_easy, ioi or lambada_openai; repeatable"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help="with how many of them random methods run")
    parser.add_argument("--dtype", default="float32", help="of the models; training may have its own, in --heal")
    parser.add_argument("--work", help="folder to keep comparisons in, so that a second call goes on within a method")
    arguments = parser.parse_args()
    name = f"compare-{Path(arguments.model).name}"
    rows = finished_rows(name)
    wanted = {items.name_of(file) for file in arguments.items}
    seeds = _needed_seeds(arguments)
    there = {row["method"] for row in rows if row["recovery"] == arguments.heal and _has(row, wanted, seeds)}
    todo = [method for method in split(arguments.methods) if method not in there]
    refused = _refused(arguments, todo)
    if refused:
        rows = [row for row in rows if _key(row) not in {_key(one) for one in refused}] + refused
        todo = [method for method in todo if method not in {row["method"] for row in refused}]
        rows.sort(key=_place)
        if rows[0]["method"] == "dense":
            _publish(name, arguments, rows, _judged(rows))
    with nullcontext(arguments.work) if arguments.work else tempfile.TemporaryDirectory() as folder:
        # a comparison is of two at least: the first two join together
        shown = todo[:1] if len(todo) > 1 else [one for one in METHODS[:2] if one not in todo][:1]
        for method in [one for one in todo if one not in shown]:
            shown.append(method)
            mine = [one for one in shown if one in todo]
            # what is cut has no items before it is trained
            had = {
                _key(row) for row in rows if _has(row, wanted if row["recovery"] == arguments.heal else set(), seeds)
            }
            compared = _compared(arguments, shown, Path(folder))
            new = [row for row in compared if row["method"] in [*mine, "dense"] and _key(row) not in had]
            rows = [row for row in rows if _key(row) not in {_key(one) for one in new}] + new
            rows.sort(key=_place)
            _publish(name, arguments, rows, _judged(rows))
            print(*(row for row in new if row["recovery"] == arguments.heal), sep="\n", flush=True)


def _needed_seeds(arguments: argparse.Namespace) -> dict[str, int]:
    """With how many seeds every method runs."""
    asked = _asked(arguments, split(arguments.methods), range(arguments.seeds))
    return {method: arguments.seeds if method in asked.random else 1 for method in asked.contenders}


def _asked(arguments: argparse.Namespace, methods: list[str], seeds: Sequence[int]) -> Asked:
    # it takes two to be asked for
    several = list(dict.fromkeys([*methods, *METHODS[:2]]))
    recipe = {"model": arguments.model, "steps": [{}], "calibration": {"random_windows": True}}
    return ask(recipe, several, SPARSITIES, seeds, TOLERANCE)


def _refused(arguments: argparse.Namespace, methods: list[str]) -> list[dict[str, Any]]:
    """Rows of methods that can't cut the model, with the reason."""
    if not methods:
        return []
    asked = _asked(arguments, methods, range(1))
    worker = Worker(make_job(asked.sweep, Path(), trust_remote_code=False, plugins=()))
    found = []
    for method in methods:
        for sparsity in SPARSITIES:
            try:
                worker.check(asked.points[method, sparsity])
            except UnsupportedModelError as error:
                row = {"recovery": arguments.heal, "sparsity": sparsity, "method": method}
                found.append({**row, "verdict": "refused", "error": str(error)})
    return found


def _compared(arguments: argparse.Namespace, methods: list[str], folder: Path) -> list[dict[str, Any]]:
    """Rows of some methods, the dense model first; what ``folder`` holds of them isn't measured again."""
    out = folder / "+".join([Path(arguments.model).name, arguments.heal or "cut", *map(items.name_of, arguments.items)])
    document = sc.compare(
        arguments.model,
        methods=methods,
        sparsity=SPARSITIES,
        seeds=range(arguments.seeds),
        tasks=[f"perplexity:{arguments.evaluation}", *items.tasks(arguments.items, folder / "items")],
        calibration=arguments.calibration,
        heal=arguments.heal or None,
        dtype=arguments.dtype,
        tolerance=TOLERANCE,
        **TEXTS,
        out=out,
        resume=out.is_dir(),
    ).to_dict()
    metric = next(iter(document["dense"]["parts"]))
    sizes = {key: document["dense"]["metrics"][key] / 1e6 for key in ("parameters", "MACs")}
    dense = {"recovery": "", "sparsity": "", "method": "dense", "perplexity": document["dense"]["metrics"][metric]}
    dense |= {name: document["dense"]["metrics"][key] for key, name in items.columns(document["dense"]["metrics"])}
    states = ["", arguments.heal] if arguments.heal else [""]
    found = [_row(heal, arguments.heal != heal, metric, row) for row in document["rows"] for heal in states]
    return [{**dense, **_millions(sizes)}, *found]


def _row(heal: str, untrained: bool, metric: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row of a comparison as a row of the table; of what was trained as it is, or as it was before."""
    found: dict[str, Any] = {"recovery": heal, "sparsity": row["sparsity"], "method": row["method"]}
    if row["status"] != "done":
        return {**found, "verdict": "failed", "error": row["error"]}
    sizes = {key: row["metrics"][key]["mean"] / 1e6 for key in ("parameters", "MACs")}
    every = row["untrained" if untrained else "metrics"]
    measured = every[metric]
    parts = measured["parts"] if untrained else row["parts"][metric]
    return {
        **found,
        "perplexity": measured["mean"],
        "±": "" if measured["spread"] is None else measured["spread"],
        "removed": f"{row['removed']:.4f}",
        **{name: every[key]["mean"] for key, name in items.columns(every)},
        **_millions(sizes),
        "seeds": len(row["seeds"]),
        "seconds": sum(seconds for stage, seconds in row["stages"].items() if not (untrained and stage == "heal")),
        "on": here(),
        "shared": "yes" if row["shared_statistics"] else "",
        # of a training that needs more than the cut the memory of the cut alone isn't known
        "peak MB": "" if untrained else (row["peak_bytes"] or 0) / 1e6,
        "losses": [[round(value, 5) for value in one] for one in parts],
    }


def _has(row: dict[str, Any], columns: set[str], seeds: dict[str, int]) -> bool:
    """Whether a row has seen all that is wanted, with so many seeds; one that failed is as it is."""
    seen = columns <= row.keys() and row.get("seeds", 1) >= seeds.get(row["method"], 1)
    return seen or "error" in row


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["method"], row["recovery"], row["sparsity"]


def _millions(sizes: dict[str, float]) -> dict[str, float]:
    return {f"M {key}": value for key, value in sizes.items()}


def _judged(rows: list[dict[str, Any]]) -> list[str]:
    """Give every row its chance; the sentences."""
    said = []
    for recovery in dict.fromkeys(row["recovery"] for row in rows):
        for sparsity in SPARSITIES:
            mine = [r for r in rows if (r["recovery"], r["sparsity"]) == (recovery, sparsity) and "losses" in r]
            meets = [row for row in mine if abs(float(row["removed"]) - sparsity) <= TOLERANCE + 1e-9]
            candidates = [Candidate(row["method"], row["perplexity"], tuple(row["losses"])) for row in meets]
            if not candidates:
                continue
            dense = rows[0]["perplexity"]
            verdict = judge(sparsity, "perplexity", candidates, higher_is_better=False, exponential=True, dense=dense)
            chances = verdict.probabilities or {}
            for row in mine:
                chance = chances.get(row["method"])
                row["p"] = "" if chance is None else f"{chance:.3f}"
                level = row["method"] == verdict.best or (chance is not None and chance < SURE)
                row["verdict"] = OFF if row not in meets else "" if not level else "best"
                if level and verdict.rivals:
                    row["verdict"] = "≈ best"
            said.append(f"- {f'With {recovery}: ' if recovery else ''}{verdict.sentence}")
    return said


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    known = METHODS.index(row["method"]) if row["method"] in METHODS else -1
    return row["method"] != "dense", row["recovery"], row["sparsity"] or 0, known


def _publish(name: str, arguments: argparse.Namespace, rows: list[dict[str, Any]], said: list[str]) -> None:
    model, length = Path(arguments.model).name, TEXTS["length"]
    setting = {
        "model": model,
        "calibration": f"{Path(arguments.calibration).name}, {TEXTS['samples']} consecutive windows of {length} tokens",
        "evaluation": f"{Path(arguments.evaluation).name}, first {TEXTS['windows']} windows of {length} tokens",
        "dtype": arguments.dtype,
    }
    shown = f"\n![Perplexity of every method, cut and trained]({name}.svg)\n"
    text = "\n".join(said) + "\n" + shown + _told(rows)
    write_result(name, f"Structured methods side by side on {model}", setting, rows, text, leave_out=HIDDEN)
    (RESULTS / f"{name}.svg").write_text(drawn(rows), encoding="utf8")


def _told(rows: list[dict[str, Any]]) -> str:
    """What the columns are, and what is told of methods and items that are there."""
    shown = {row["method"] for row in rows}
    told = TEXT
    if items.columns(name for row in rows for name in row):
        told += ITEMS.replace("{limit}", str(items.LIMIT))
    given = {method.partition(":")[0]: ":" in method for method in shown}
    if shortened := [text for method, text in SHORTENED.items() if given.get(method)]:
        told += SHORTENED_TEXT.replace("{shortened}", ", ".join(shortened))
    if "loraprune" in given:
        told += TRAINS
    missing = [method for method in METHODS if method not in shown]
    missing = [method if ":heal" in method else method.partition(":")[0] for method in missing]
    return told + (MISSING.replace("{methods}", ", ".join(missing)) if missing else "")


WIDTH, LEFT, RIGHT, ROW, TOP = 860, 140, 110, 20, 56
FARTHEST = 12
"""times the perplexity of the dense model: what lies beyond has its number at the edge"""
LIGHT = (
    ".way{stroke:#8c959f;stroke-width:2} .cut{fill:#fff;stroke:#57606a;stroke-width:1.5} .trained{fill:#2f6f6a}"
    " .off{fill:#6e7781}"
)
DARK = ".way{stroke:#6e7681} .cut{fill:#0d1117;stroke:#8b949e} .trained{fill:#58a89d} .off{fill:#8b949e}"


def drawn(rows: list[dict[str, Any]]) -> str:
    """A panel a budget, a line a method: its perplexity when it is cut, and when it is trained, the best first.

    Who misses the budget is paler, with what is really gone behind the name.
    """
    dense = rows[0]["perplexity"]
    # who trains while it prunes may leave the dense model behind
    best = min(row["perplexity"] for row in rows if "perplexity" in row)
    parts, top = [], 0
    for sparsity in SPARSITIES:
        found: dict[str, dict[bool, float]] = {}
        off: dict[str, float] = {}
        for row in rows:
            if row["sparsity"] == sparsity and "perplexity" in row:
                found.setdefault(row["method"], {})[bool(row["recovery"])] = row["perplexity"]
                if row.get("verdict") == OFF:
                    off[row["method"]] = float(row["removed"])
        # what isn't trained yet stands below what is
        order = sorted(found.items(), key=lambda one: [one[1].get(trained, math.inf) for trained in (True, False)])
        parts.append(svg.below(top, _panel(sparsity, order, off, best, dense)))
        top += TOP + ROW * len(order) + 20
    title = "Perplexity of every method, cut and trained"
    return svg.document(WIDTH, top, parts, title=title, light=LIGHT, dark=DARK)


def _panel(
    sparsity: float, methods: list[tuple[str, dict[bool, float]]], off: dict[str, float], best: float, dense: float
) -> str:
    along, bottom = svg.logarithmic(best, FARTHEST * dense, LEFT, WIDTH - RIGHT), TOP + ROW * len(methods)
    what = "perplexity, logarithmic: ○ cut, ● trained" + ("; grey: misses the budget" if off else "")
    parts = [
        svg.text(12, 20, f"{sparsity:.0%} of the blocks removed", bold=True),
        svg.text(WIDTH - 12, 20, what, anchor="end", css="small"),
    ]
    bare = [method.partition(":")[0] for method, _ in methods]
    for times in (1, 1.25, 1.5, 2, 3, 5, 8, FARTHEST):
        x = along(times * dense)
        parts.append(svg.down(x, TOP - 8, bottom))
        said = f"{times * dense:.0f}" if times > 1 else "dense"
        parts.append(svg.text(x, TOP - 14, said, anchor="middle", css="small"))
    for place, (method, found) in enumerate(methods):
        y = TOP + ROW * (place + 0.5)
        # options are told where one method is there with several
        name = method if bare.count(bare[place]) > 1 else bare[place]
        said, css = (f"{name}, {off[method]:.1%}", "off") if method in off else (name, "")
        parts.append(svg.text(LEFT - 12, y + 4, said, anchor="end", css=css))
        ends = [along(value) for value in found.values()]
        parts.append(svg.across(min(ends), y, max(ends), css="way"))
        for trained, value in sorted(found.items()):
            kind = "trained" if trained else "cut"
            parts.append(svg.dot(along(value), y, kind, f"{method}, {kind}: {value:,.1f}"))
        beyond = [f"{value:,.0f}" for _, value in sorted(found.items()) if value > FARTHEST * dense]
        parts += [svg.text(WIDTH - RIGHT + 10, y + 4, " → ".join(beyond), css="small")] if beyond else []
    return "".join(parts)


if __name__ == "__main__":
    main()
