"""LLM-Pruner's criteria and baselines at a fifth of the blocks' parameters, and what training adapters mends.

    python benchmarks/llm_pruner.py --calibration VALID.txt --evaluation TEST.txt

Every criterion scores heads and neurons from the same 16 windows of 128 tokens; layers at both ends stay whole, as
published. Random scores are drawn from every seed. The model of the first criterion is then trained on the calibration
text, and so is the dense model: what training on such a text gains by itself is no recovery. ``--other`` is a text of
another kind, on which the dense model and those of the first criterion are measured as well. The result is written
after every row; a second call goes on from there.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

from common import finished_rows, healed, perplexity_of, write_result

import secateur as sc
from secateur.report.build import removed_fraction

TITLE = "LLM-Pruner: criteria, baselines and recovery"
CRITERIA = ("param_first", "param_second", "param_mix", "vectorize", "l1", "l2", "random")
LENGTH = 512
"""Tokens of an evaluated window."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--other", help="text unlike that trained on")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=16, help="windows of 128 tokens that gradients are taken of")
    parser.add_argument("--windows", type=int, default=40, help="windows that are evaluated")
    parser.add_argument("--criteria", default=",".join(CRITERIA))
    parser.add_argument("--seeds", default="0,1,2", help="of random scores")
    parser.add_argument("--steps", type=int, default=300, help="of recovery; 0 leaves it out")
    parser.add_argument(
        "--dtype", default="float32", help="of what plans look at; weights and perplexities are float32"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window that is trained on")
    arguments = parser.parse_args()
    name = f"llm-pruner-{Path(arguments.model).name}"
    model, tokenizer = sc.load(arguments.model)
    rows = finished_rows(name)
    setting = {
        "model": Path(arguments.model).name,
        "sparsity": arguments.sparsity,
        "calibration": f"{Path(arguments.calibration).name}, {arguments.samples} windows of 128 tokens",
        "evaluation": f"{Path(arguments.evaluation).name}, first {arguments.windows} windows of {LENGTH} tokens",
        "recovery": f"lora, cross-entropy, {arguments.steps} steps of {arguments.batch} x {arguments.length} tokens",
        "seeds of random scores": arguments.seeds,
        "dtype": f"float32; plans in {arguments.dtype}",
    }

    if arguments.other:
        setting["other"] = f"{Path(arguments.other).name}, first {arguments.windows} windows of {LENGTH} tokens"
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    wanted = [(c, s) for c in arguments.criteria.split(",") for s in (seeds if c == "random" else [0])]
    both = ("dense", wanted[0][0]) if arguments.other else ()

    def measured(one: Any, criterion: str) -> dict[str, float]:
        texts = {"perplexity": arguments.evaluation, **({"other": arguments.other} if criterion in both else {})}
        return {key: perplexity_of(one, tokenizer, file, windows=arguments.windows) for key, file in texts.items()}

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["criterion"], row["seed"], row["healed"]

    def add(row: dict[str, Any]) -> None:
        place = next((n for n, one in enumerate(rows) if key(one) == key(row)), len(rows))
        rows[place : place + 1] = [row]
        print(row, flush=True)
        write_result(name, TITLE, setting, rows, text(rows))

    def done(criterion: str, seed: int, trained: bool) -> bool:
        return any(key(r) == (criterion, seed, trained) and ("other" in r or criterion not in both) for r in rows)

    training = {"batch": arguments.batch, "length": arguments.length, "steps": arguments.steps}
    if not done("dense", 0, False):
        add({"criterion": "dense", "seed": 0, "healed": False, **measured(model, "dense")})
    if arguments.steps and not done("dense", 0, True):
        nothing = sc.plan(model, tokenizer, method="magnitude_sp", sparsity=0.0)
        trained = healed(sc.apply(nothing, model), tokenizer, nothing, arguments.calibration, **training)
        add({"criterion": "dense", "seed": 0, "healed": True, **measured(trained, "dense")})
    for criterion, seed in wanted:
        trains = criterion == wanted[0][0] and arguments.steps > 0
        if done(criterion, seed, False) and (not trains or done(criterion, seed, True)):
            continue
        started = time.perf_counter()
        plan = sc.plan(
            model,
            tokenizer,
            method="llm_pruner",
            sparsity=arguments.sparsity,
            options={"criterion": criterion},
            calibration=arguments.calibration,
            samples=arguments.samples,
            length=128,
            seed=seed,
            dtype=arguments.dtype,
        )
        row = {"criterion": criterion, "seed": seed, "removed": f"{removed_fraction(plan, sc.anatomy(model)):.4f}"}
        row["heads"] = sum(len(plan.removed(group)) for group in plan.keep if not group.endswith(".mlp"))
        seconds = time.perf_counter() - started
        cut = sc.apply(plan, model)
        if not done(criterion, seed, False):
            add({**row, "healed": False, **measured(cut, criterion), "seconds": round(seconds, 1)})
        if trains:
            trained = healed(cut, tokenizer, plan, arguments.calibration, **training)
            add({**row, "healed": True, **measured(trained, criterion)})


def text(rows: list[dict[str, Any]]) -> str:
    """What the table shows, as far as it goes."""
    lines = [
        "Perplexity of the dense model, and of what is left of it by each of the criteria. `healed` are rows after",
        "training of adapters. Seconds are those of a plan, on a machine that did other work as well.",
    ]
    found = {
        (c, healed): statistics.fmean(values)
        for c in ("dense", *CRITERIA)
        for healed in (False, True)
        if (values := [r["perplexity"] for r in rows if r["criterion"] == c and r["healed"] == healed])
    }
    first = found.get(("param_first", False))
    for other in ("random", "vectorize"):
        if first is not None and (other, False) in found:
            lines += ["", f"- `{other}` has {found[other, False] / first:.2f} times the perplexity of `param_first`."]
    if first is not None and ("param_first", True) in found:
        dense, cut, healed = (
            math.log(found[k]) for k in (("dense", False), ("param_first", False), ("param_first", True))
        )
        closed = f"{(cut - healed) / (cut - dense):.0%} of the gap in log-perplexity to the dense model as it is"
        lines += ["", f"- Training, on text of the kind that is evaluated, closes {closed}."]
        lines += [
            "  That is adaptation to such text, and no measure of recovery:\n  " + _beside_trained_dense(rows, found)
        ]
    heads = {row["criterion"]: row["heads"] for row in rows if "heads" in row}
    if heads:
        told = ", ".join(f"{count} by `{criterion}`" for criterion, count in heads.items())
        lines += ["", f"- `heads` are key-value heads that leave, of all layers together: {told}."]
    return "\n".join(lines)


def _beside_trained_dense(rows: list[dict[str, Any]], found: dict[tuple[str, bool], float]) -> str:
    """What the same training makes of the dense model, and what it does on another text."""
    if ("dense", True) not in found:
        return "the dense model has not had the same training here."
    cut, trained = found["param_first", True], found["dense", True]
    said = f"after the same training the dense model has {trained:.1f}, and the cut one {cut:.1f}."
    other = {(r["criterion"], r["healed"]): r["other"] for r in rows if "other" in r}
    if len(other) == 4:
        numbers = [other[c, healed] for c in ("dense", "param_first") for healed in (False, True)]
        said += (
            "\n  On the other text training takes the dense model from {:.1f} to {:.1f}, and the cut one from {:.1f} to"
            " {:.1f}."
        ).format(*numbers)
    return said


if __name__ == "__main__":
    main()
