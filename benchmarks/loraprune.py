"""LoRAPrune beside other ways to choose what leaves while, or before, the same adapters are trained as long.

    python benchmarks/loraprune.py --calibration TRAIN.txt --evaluation TEST.txt
    python benchmarks/loraprune.py … --ways "lora, rank 64"
    python benchmarks/loraprune.py … --batch 4 --length 128

Half of the blocks' parameters leave while adapters are trained on the calibration text: by the gradient that adapters
tell of (`lora`), by true gradients (`grad`), by magnitude, and at random. The order of windows, the adapters and random
scores are drawn from every seed. LLM-Pruner removes as much at once, and what it leaves is then trained for the same
steps. `lora, rank 64` has wider adapters than the published ones of rank 8, which tell more of the gradient. The result
is written after every row; a second call goes on from there, and may train with other batches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from common import finished_rows, healed, here, perplexity_of, write_result

import secateur as sc
from secateur.report.build import removed_fraction

TITLE = "LoRAPrune: what tells which units leave while adapters are trained"
METRICS = ("lora", "grad", "magnitude", "random")
ONCE = "llm_pruner, then training"
LENGTH = 512
"""Tokens of an evaluated window."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window that is trained on")
    parser.add_argument("--samples", type=int, default=0, help="windows to train on; 0: as many as the steps see")
    parser.add_argument("--every", type=int, default=5, help="steps from one pruning to the next")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--windows", type=int, default=40, help="windows that are evaluated")
    parser.add_argument(
        "--dtype", default="float32", help="of forwards of the training; weights and perplexities are float32"
    )
    parser.add_argument("--ways", default=";".join((*METRICS, ONCE)), help="rows to run, joined by ;")
    parser.add_argument("--seeds", default="0,1,2")
    arguments = parser.parse_args()
    dtype = arguments.dtype
    name = f"loraprune-{Path(arguments.model).name}"
    model, tokenizer = sc.load(arguments.model)
    rows = finished_rows(name)
    steps, batch, length = arguments.steps, arguments.batch, arguments.length
    samples = arguments.samples or steps * batch
    setting = {
        "model": Path(arguments.model).name,
        "sparsity": arguments.sparsity,
        "text": Path(arguments.calibration).name,
        "training": f"{steps} steps, lr {arguments.lr:g}",
        "units leave every": f"{arguments.every} steps",
        "evaluation": f"{Path(arguments.evaluation).name}, first {arguments.windows} windows of {LENGTH} tokens",
    }

    def perplexity(one: Any) -> float:
        return perplexity_of(one, tokenizer, arguments.evaluation, windows=arguments.windows)

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        rows.sort(key=lambda row: (row.get("batch", 0), row["seed"]))
        print(row, flush=True)
        write_result(name, TITLE, setting, rows, text(rows))

    text_of = {"calibration": arguments.calibration, "length": length, "dtype": dtype}
    training = {"steps": steps, "batch": batch, "lr": arguments.lr}
    if not rows:
        add({"way": "dense", "seed": 0, "perplexity": perplexity(model)})
    for seed in map(int, arguments.seeds.split(",")):
        for way in arguments.ways.split(";"):
            row: dict[str, Any] = {"way": way, "seed": seed, "batch": batch, "length": length, "dtype": dtype}
            if any(row.items() <= other.items() for other in rows):
                continue
            started = time.perf_counter()
            if way == ONCE:
                plan = sc.plan(
                    model,
                    tokenizer,
                    method="llm_pruner",
                    sparsity=arguments.sparsity,
                    # the layers that loraprune leaves alone
                    options={"first": int(0.1 * model.config.num_hidden_layers), "last": 1},
                    samples=min(16, samples),
                    seed=seed,
                    **text_of,
                )
                cut = healed(
                    sc.apply(plan, model),
                    tokenizer,
                    plan,
                    arguments.calibration,
                    **training,
                    length=length,
                    warmup=0,
                    dtype=dtype,
                    seed=seed,
                )
            else:
                metric, _, rank = way.partition(", rank ")
                own = {"metric": metric, "every": arguments.every, **({"rank": int(rank)} if rank else {})}
                plan = sc.plan(
                    model,
                    tokenizer,
                    method="loraprune",
                    sparsity=arguments.sparsity,
                    options={**training, **own},
                    samples=samples,
                    seed=seed,
                    **text_of,
                )
                cut = sc.apply(plan, model)
            row |= {"seconds": round(time.perf_counter() - started), "on": here()}
            row["removed"] = f"{removed_fraction(plan, sc.anatomy(model)):.4f}"
            add(row | {"perplexity": perplexity(cut)})


def text(rows: list[dict[str, Any]]) -> str:
    """What the table shows, as far as it goes."""
    lines = [
        "Perplexity of the dense model, and after a part of its heads and neurons has left while adapters were",
        "trained, or at once before that. All ways train as long: `batch` windows of `length` tokens a step, forwards",
        "in `dtype`. Seconds are those of machines that did other work as well, and those `on` two processors are not",
        "to be compared.",
        "",
        "Published, with batches of 128 windows, is that `lora` tells as much as `grad`, and that what leaves on the",
        "way costs less than what leaves at once. An adapter tells of a gradient no more than its rank, which is 8 as",
        "published, and what it loses isn't noise of the text: it remains with",
        "[any number of windows](loraprune-scores-smollm2-135m.md).",
        "",
        "`llm_pruner` takes true gradients too: `grad` beside it is the same knowledge, on the way or at once. Here,",
        "in few steps, what leaves on the way has less of them left to be trained in.",
        "",
        "All are trained on text of the kind that is evaluated, and the dense model isn't. The same training of the",
        "dense model, and text of another kind, are not measured: ways are held against each other here, and not",
        "against it.",
        "",
        "Perplexities beside those of another way, means over seeds that both have:",
        "",
    ]
    found = {
        (row["way"], f"{row['batch']} x {row['length']} tokens in {row['dtype']}", row["seed"]): row["perplexity"]
        for row in rows
        if row["way"] != "dense"
    }
    for way, step in dict.fromkeys((way, step) for way, step, _ in found):
        name, _, rank = way.partition(", rank ")
        others = [f"lora, rank {rank}" if rank else "lora"] if name != "lora" else []
        for other in [*others, *([ONCE] if way == "grad" else [])]:
            ratios = [
                value / found[other, step, seed]
                for (one, size, seed), value in found.items()
                if (one, size) == (way, step) and (other, step, seed) in found
            ]
            if ratios:
                times = f"{statistics.fmean(ratios):.3f}"
                if len(ratios) > 1:
                    times += f" (standard deviation {statistics.stdev(ratios):.3f} over {len(ratios)} seeds)"
                lines.append(f"- Steps of {step}: `{way}` has {times} times the perplexity of `{other}`.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
