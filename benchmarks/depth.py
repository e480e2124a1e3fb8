"""Perplexity without blocks and sub-layers, and without heads and neurons that Minitron and AMP choose.

    python benchmarks/depth.py --calibration VALID.txt --evaluation TEST.txt [--model MODEL] [--only METHOD …]

The result is written after every row; a second call goes on where the first stopped.
Calibration: 64 consecutive windows of 512 tokens. Evaluation: the first 40 windows of 512 tokens. Methods that try
whole models out look at fewer tokens, which their options say. Methods decide in bfloat16; perplexities are float32.
Rows that ``benchmarks/quality.py`` has with the same windows are taken from its result; there all is float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import finished_rows, perplexity_of, write_result

import secateur as sc
from secateur.report.build import removed_fraction

DEPTH = "a fifth of the depth"
WIDTH = "a fifth of the width"
EVOLUTION = {"layers": 6, "starts": 12, "generations": 8, "offspring": 10, "first_tokens": 512, "last_tokens": 1024}
RUNS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (DEPTH, "shortgpt", {"layers": 6}),
    (DEPTH, "blockpruner", {"sparsity": 0.2, "tokens": 256}),
    (DEPTH, "evopress", EVOLUTION),
    (WIDTH, "flap", {"sparsity": 0.2}),
    (WIDTH, "wanda_sp", {"sparsity": 0.2}),
    (WIDTH, "random_sp", {"sparsity": 0.2}),
    (WIDTH, "amp", {"sparsity": 0.2}),
    (DEPTH, "angular", {"layers": 6}),
    (WIDTH, "minitron", {"sparsity": 0.2}),
    (WIDTH, "amp", {"sparsity": 0.2, "order": "reversed"}),
    (WIDTH, "amp", {"sparsity": 0.2, "parts": "heads"}),
    (WIDTH, "amp", {"sparsity": 0.2, "parts": "mlp"}),
)
KNOWN = "quality"
"""The study whose rows are taken over."""
TITLE = "Depth and width: what leaves, and what it costs"
TEXT = """
Perplexity after a fifth of the blocks' parameters has left: as whole blocks, as attentions and FFNs by themselves, or
as heads and neurons. No training afterwards.

- Whole blocks chosen by ShortGPT from 32,768 tokens beat what tries models out on a few hundred: BlockPruner made its
  choices on 256 tokens, and this evolution had 8 generations where the published rule gives 96, on 512 and 1,024 tokens
  where it has 2,048 and 32,768. That single sub-layers cost less than whole blocks, as published, is not shown here.
- The run of blocks that the angular distance takes lies in the middle, and costs more than the blocks of ShortGPT.
- Minitron comes near FLAP and Wanda-sp. At 20 % it takes no head: the least that can leave is a third of the queries.
- AMP rounds a fifth of three key-value heads to one, which is a third of attention. Chance costs far more.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--only", nargs="*", default=[], help="methods to run now")
    arguments = parser.parse_args()
    name = f"depth-{Path(arguments.model).name}"
    model, tokenizer = sc.load(arguments.model)

    def perplexity(one: Any) -> float:
        return perplexity_of(one, tokenizer, arguments.evaluation, windows=40)

    setting = {
        "model": Path(arguments.model).name,
        "calibration": "WikiText-2 validation, file as it is, 64 consecutive windows of 512 tokens",
        "evaluation": "WikiText-2 test, file as it is, first 40 consecutive windows of 512 tokens",
        "seed": 0,
        "dtype": "float32; bfloat16 for what the methods of this study look at",
        "taken from": f"{KNOWN}-{Path(arguments.model).name} where it has the row, with float32 throughout",
    }
    known = {
        (row["method"], row.get("options", "")): row for row in finished_rows(f"{KNOWN}-{Path(arguments.model).name}")
    }
    dense = known.get(("dense", "")) or {"perplexity": perplexity(model)}
    rows = finished_rows(name) or [{"what": "", "method": "dense", "options": "", "perplexity": dense["perplexity"]}]
    with tempfile.TemporaryDirectory() as statistics:
        for what, method, options in RUNS:
            shown = ", ".join(f"{k}={v}" for k, v in options.items())
            finished = any(row["method"] == method and row["options"] == shown for row in rows)
            if finished or (arguments.only and method not in arguments.only):
                continue
            if (method, shown) in known:
                old = known[method, shown]
                rows.append(
                    {
                        "what": what,
                        "method": method,
                        "options": shown,
                        "perplexity": old["perplexity"],
                        "removed": old["removed"],
                    }
                )
                continue
            plan = sc.plan(
                model,
                tokenizer,
                method=method,
                options=options,
                calibration=arguments.calibration,
                samples=64,
                length=512,
                dtype="bfloat16",
                # plans of one method share what they see of the dense model
                statistics=statistics,
                progress=said,
            )
            rows.append(
                {
                    "what": what,
                    "method": method,
                    "options": shown,
                    "perplexity": perplexity(sc.apply(plan, model)),
                    "removed": f"{removed_fraction(plan, sc.anatomy(model, heads=plan.head_unit)):.4f}",
                    "left out": left_out(plan),
                }
            )
            print(rows[-1], flush=True)
            write_result(name, TITLE, setting, rows, TEXT)
    write_result(name, TITLE, setting, rows, TEXT)


def said(stage: str, done: int, total: int) -> None:
    """The steps of a search as they are made: they take minutes."""
    if stage == "search":
        print(f"{time.strftime('%H:%M:%S')} {stage} {done}/{total}", file=sys.stderr, flush=True)


def left_out(plan: sc.Plan) -> str:
    """The blocks, attentions (a) and FFNs (f) that leave, by their number."""
    found = [str(layer) for layer in (plan.removed("layers").tolist() if "layers" in plan.keep else ())]
    for name, kept in plan.keep.items():
        if name != "layers" and not len(kept):
            _, layer, kind = name.split(".")
            found.append(f"{layer}{'a' if kind == 'attention' else 'f'}")
    return " ".join(sorted(found, key=lambda place: int(place.rstrip("af"))))


if __name__ == "__main__":
    main()
