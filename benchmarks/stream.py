"""How much of what hidden states have lost the end of a block should make up for: ``--target stream`` by its share.

    python benchmarks/stream.py --calibration VALID.txt --evaluation TEST.txt --other C4.jsonl.gz

Wanda's masks at 50 %, refitted, on 32 consecutive windows of 512 tokens; evaluation on the first 12 windows of two
texts, of which the second is of another kind than the calibration text. The result is written after every row; a second
call goes on where the first stopped. The package has one share, ``healing.refit.STREAM_SHARE``, which this sets.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from common import finished_rows, here, perplexity_of, write_result

import secateur as sc
from secateur.healing import refit

# (whether matrices of a block follow each other, share); those that decide come first
ROWS = ((False, 0.0), (True, 0.25), (False, 0.25), (True, 0.0), (True, 0.5), (True, 1.0), (False, 0.5), (False, 1.0))
TEXT = """
Perplexity at 50 % of the weights, Wanda's masks, what stays refitted. `share`: how much of what the hidden states have
lost against the dense model the last matrix of every block is asked to make up for. `true sequential`: matrices of a
block are decided one after the other, and then the loss of the block itself is in it, too. `other` is C4's web text,
while calibration and `perplexity` are WikiText-2.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--other", required=True, help="a text of another kind")
    arguments = parser.parse_args()
    name = f"stream-{Path(arguments.model).name}"
    rows = finished_rows(name)
    for ordered, share in ROWS:
        key = {"share": share, "true sequential": "yes" if ordered else ""}
        if all({k: row[k] for k in key} != key for row in rows):
            rows.append({**key, **_measured(arguments, share, ordered)})
            print(rows[-1], flush=True)
            _publish(name, arguments, sorted(rows, key=lambda row: (row["true sequential"], row["share"])))


def _measured(arguments: argparse.Namespace, share: float, ordered: bool) -> dict[str, Any]:
    refit.STREAM_SHARE = share
    model, tokenizer = sc.load(arguments.model)
    started = time.process_time()
    plan = sc.plan(
        model,
        tokenizer,
        method="wanda",
        sparsity=0.5,
        heal="refit",
        target="stream" if share else "current",
        options={"true_sequential": ordered},
        calibration=arguments.calibration,
        samples=32,
        length=512,
        dtype="float32",
    )
    took = time.process_time() - started
    cut = sc.apply(plan, model)
    texts = {"perplexity": arguments.evaluation, "other": arguments.other}
    found = {column: perplexity_of(cut, tokenizer, text, windows=12) for column, text in texts.items()}
    return {**found, "cpu seconds": took, "on": here()}


def _publish(name: str, arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    setting = {
        "model": arguments.model,
        "calibration": "WikiText-2 validation, file as it is, 32 consecutive windows of 512 tokens",
        "evaluation": "WikiText-2 test and C4, first 12 consecutive windows of 512 tokens",
        "seed": 0,
        "dtype": "float32",
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }
    write_result(name, "How much of what hidden states have lost to make up for", setting, rows, TEXT)


if __name__ == "__main__":
    main()
