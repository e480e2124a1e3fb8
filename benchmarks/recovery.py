"""How much of what pruning breaks a short training mends: text alone against the dense teacher's predictions.

    python benchmarks/recovery.py --model smollm2-135m --calibration VALID.txt --evaluation TEST.txt --other OTHER

The model is pruned by FLAP, then trained by adapters, from every seed once with cross-entropy and once with the KL
divergence to the dense model, on the calibration text. Perplexity is measured on the evaluation text, which is of the
same kind, and on OTHER, which is not. The result is written after every row; a second call goes on from there.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

from common import finished_rows, write_result

import secateur as sc
from secateur.progress import Progress

LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--other", required=True)
    parser.add_argument("--sparsity", type=float, default=0.4)
    parser.add_argument("--samples", type=int, default=64, help="windows that FLAP is calibrated on")
    parser.add_argument("--windows", type=int, default=40, help="windows that are evaluated")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seeds", default="0")
    arguments = parser.parse_args()
    name = f"recovery-{Path(arguments.model).name}"
    model, tokenizer = sc.load(arguments.model)
    texts = {"evaluation": arguments.evaluation, "other": arguments.other}

    def measured(one: Any) -> dict[str, float]:
        found = {}
        for text, file in texts.items():
            table = sc.evaluate({"m": one}, tokenizer, [f"perplexity:{file}"], length=LENGTH, windows=arguments.windows)
            found[text] = table["perplexity"].values["m"]
        return found

    rows = finished_rows(name)
    setting = {
        "model": arguments.model,
        "pruning": f"flap, sparsity {arguments.sparsity}, {arguments.samples} x {LENGTH} tokens",
        "calibration and training": Path(arguments.calibration).name,
        "evaluation": f"{Path(arguments.evaluation).name}, first {arguments.windows} windows of {LENGTH} tokens",
        "other": f"{Path(arguments.other).name}, first {arguments.windows} windows of {LENGTH} tokens",
        "training": f"lora, {arguments.steps} steps of {arguments.batch} x {arguments.length} tokens",
        "seeds": arguments.seeds,
        "dtype": "float32",
    }

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)
        write_result(name, "What a short training mends", setting, rows, text(rows))

    if not rows:
        add({"run": "dense", **measured(model)})
    pruned = sc.prune(
        model,
        tokenizer,
        method="flap",
        sparsity=arguments.sparsity,
        calibration=arguments.calibration,
        samples=arguments.samples,
        length=LENGTH,
        dtype="float32",
    )
    if len(rows) == 1:
        add({"run": "pruned", **measured(pruned.model)})
    for seed in arguments.seeds.split(","):
        for loss in ("ce", "kl"):
            if any((row.get("loss"), row.get("seed")) == (loss, int(seed)) for row in rows):
                continue
            started = time.perf_counter()
            with Progress() as progress:
                healed = sc.heal(
                    pruned.model,
                    tokenizer,
                    plan=pruned.plan,
                    data=arguments.calibration,
                    teacher=model,
                    loss=loss,
                    steps=arguments.steps,
                    seed=int(seed),
                    # what is measured meanwhile has no part in the table
                    options={"batch": arguments.batch, "length": arguments.length, "measure": arguments.steps},
                    progress=progress,
                )
            seconds = time.perf_counter() - started
            found = measured(healed.model)
            gaps = {f"gap closed, {t}": closed(rows[0][t], rows[1][t], found[t]) for t in texts}
            add({"run": "healed", "loss": loss, "seed": int(seed), **found, **gaps, "seconds": round(seconds)})


def closed(dense: float, pruned: float, healed: float) -> float:
    """Fraction of the gap in log-perplexity that is closed."""
    return (math.log(pruned) - math.log(healed)) / (math.log(pruned) - math.log(dense))


def _mean(values: list[float]) -> str:
    ends = f" (of {len(values)} seeds {min(values):.1%} to {max(values):.1%})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.0%}{ends}"


def text(rows: list[dict[str, Any]]) -> str:
    """What the table shows, as far as it goes."""
    lines = [
        "Perplexity of the dense model, of the cut one, and after training its adapters with cross-entropy on the text",
        '(`ce`) or towards the predictions of the dense model (`kl`). "Gap closed" is the fraction of the distance in',
        "log-perplexity between the cut model and the dense one. The other text is unlike that trained on.",
        "Seconds are those of one thread on a machine that did other work as well, measurements included.",
    ]
    for name in ("evaluation", "other"):
        found = {loss: [row[f"gap closed, {name}"] for row in rows if row.get("loss") == loss] for loss in ("ce", "kl")}
        if all(found.values()):
            said = " and ".join(f"{_mean(values)} with {loss}" for loss, values in found.items())
            lines += ["", f"- On the {name} text {said} of the gap is closed."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
