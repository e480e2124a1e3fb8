"""A step of recovery on a processor: float32 beside bfloat16, in time and in what it teaches.

    OMP_NUM_THREADS=1 python benchmarks/recovery_step.py --calibration VALID.txt

Short trainings of a model that FLAP has cut, towards the dense one; in every round, which has a seed of its own, one
dtype after the other. The time is that of the steps, without measurements.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

from common import write_result

import secateur as sc

DTYPES = ("float32", "bfloat16")
TEXT = """
Seconds of a step of `windows` x `tokens`, medians over the rounds, and the median over rounds of how much faster
bfloat16 was: its forwards are in bfloat16, and weights stay in float32. Weights that are trained are cast in every
forward, and so are those of the teacher's blocks, which few tokens don't make up for. Held out is the perplexity after
the steps of a round, on text of the same kind that was not trained on, mean over the rounds; `before` it is the same of
both. Rows aren't measured under the same load, the dtypes of a row are: ratios count.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="builtin", help="text to prune by, and to train on")
    parser.add_argument("--samples", type=int, default=64, help="windows of 512 tokens to prune by")
    parser.add_argument("--sparsity", type=float, default=0.4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    dense, tokenizer = sc.load(arguments.model, dtype="float32")
    text, samples = arguments.calibration, arguments.samples
    cut = sc.prune(
        dense, tokenizer, method="flap", sparsity=arguments.sparsity, calibration=text, samples=samples, dtype="float32"
    ).model
    setting = {
        "model": Path(arguments.model).name,
        "text": f"{Path(text).name}, {samples} windows of 512 tokens for FLAP at {arguments.sparsity:.0%}",
        "rounds": arguments.rounds,
        "steps of a round": arguments.steps,
    }
    rows: list[dict[str, Any]] = []
    for train, windows, tokens in (("lora", 1, 128), ("lora", 4, 256), ("full", 1, 128)):
        rounds = []
        for seed in range(arguments.rounds):
            options = {"batch": windows, "length": tokens, "measure": arguments.steps}
            how = {"train": train, "steps": arguments.steps, "seed": seed, "teacher": dense, "data": text}
            rounds.append(
                {
                    dtype: sc.heal(
                        copy.deepcopy(cut), tokenizer, inplace=True, options={**options, "dtype": dtype}, **how
                    ).curve
                    for dtype in DTYPES
                }
            )
        row = {"train": train, "windows": windows, "tokens": tokens}
        row |= {f"s {d}": statistics.median(one[d].seconds for one in rounds) / arguments.steps for d in DTYPES}
        row |= {"faster": statistics.median(one["float32"].seconds / one["bfloat16"].seconds for one in rounds)}
        row |= {"before": rounds[0]["float32"].measured[0][1]}
        row |= {f"held out {d}": statistics.mean(one[d].measured[-1][1] for one in rounds) for d in DTYPES}
        rows.append(row)
        print(row, flush=True)
        name = f"recovery-step-{setting['model']}"
        write_result(name, f"A step of recovery on a processor, {setting['model']}", setting, rows, TEXT)


if __name__ == "__main__":
    main()
