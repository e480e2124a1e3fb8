"""A step of recovery on a processor: float32 beside bfloat16, of adapters and of everything.

    OMP_NUM_THREADS=1 python benchmarks/recovery_step.py

Short trainings of the uncut model towards itself, one dtype after the other in every round. What counts is the time of
the steps, without measurements; the ratio is the median over rounds.
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
bfloat16 was: its forwards are in bfloat16, and weights stay in float32. Every forward casts the frozen weights again,
which few tokens don't make up for. `loss` is that of the last step.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    model, tokenizer = sc.load(arguments.model, dtype="float32")
    rows = []
    for train, windows, tokens in (("lora", 1, 128), ("lora", 4, 256), ("full", 1, 128)):
        rounds = [_round(model, tokenizer, arguments, train, windows, tokens) for _ in range(arguments.rounds)]
        seconds = {dtype: statistics.median(found[dtype].seconds for found in rounds) for dtype in DTYPES}
        ratios = [found["float32"].seconds / found["bfloat16"].seconds for found in rounds]
        row = {"train": train, "windows": windows, "tokens": tokens}
        row |= {f"s {dtype}": seconds[dtype] / arguments.steps for dtype in DTYPES}
        row |= {"faster": statistics.median(ratios)}
        rows.append(row | {f"loss {dtype}": rounds[0][dtype].losses[-1] for dtype in DTYPES})
        print(rows[-1], flush=True)
    setting = {"model": Path(arguments.model).name, "text": Path(arguments.data).name}
    setting |= {"rounds": arguments.rounds, "steps of a round": arguments.steps}
    name = f"recovery-step-{setting['model']}"
    write_result(name, f"A step of recovery on a processor, {setting['model']}", setting, rows, TEXT)


def _round(
    model: Any, tokenizer: Any, arguments: argparse.Namespace, train: str, windows: int, tokens: int
) -> dict[str, Any]:
    """The curve of every dtype."""
    common = {"batch": windows, "length": tokens, "held_out": 1, "measure": arguments.steps}
    return {
        dtype: sc.heal(
            copy.deepcopy(model),
            tokenizer,
            teacher=model,
            data=arguments.data,
            # the model is its own teacher, whose predictions it would have already
            loss="ce+kl",
            train=train,
            steps=arguments.steps,
            options={**common, "dtype": dtype},
            inplace=True,
        ).curve
        for dtype in DTYPES
    }


if __name__ == "__main__":
    main()
