"""Perplexity after pruning, for every method of the release, beside the dense model and reference values.

    python benchmarks/quality.py --calibration VALID.txt --evaluation TEST.txt

The result is written after every row; a second call goes on where the first stopped.
Calibration: 64 consecutive windows of 512 tokens. Evaluation: the first 40 windows of 512 tokens. The reference
column holds what a plain second implementation gave with the same windows.
"""

from __future__ import annotations

import argparse
from typing import Any

from common import finished_rows, perplexity_of, write_result

import secateur as sc
from secateur.report.build import removed_fraction

# (method, options, reference perplexity)
RUNS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("magnitude", {"sparsity": 0.5}, "483"),
    ("wanda", {"sparsity": 0.5}, "48.4"),
    ("sparsegpt", {"sparsity": 0.5}, "38.2–38.8"),
    ("magnitude", {"pattern": "2:4"}, "1773"),
    ("wanda", {"pattern": "2:4"}, "127"),
    ("sparsegpt", {"pattern": "2:4"}, "55.2"),
    ("flap", {"sparsity": 0.2}, "37.7"),
    ("flap", {"sparsity": 0.2, "bias": False}, "39.9"),
    ("wanda_sp", {"sparsity": 0.2}, "39.0"),
    ("magnitude_sp", {"sparsity": 0.2}, ""),
    ("random_sp", {"sparsity": 0.2}, ""),
    ("shortgpt", {"layers": 6}, "57.0"),
    ("flap", {"sparsity": 0.5}, ""),
    ("flap", {"sparsity": 0.5, "bias": False}, ""),
    ("wanda_sp", {"sparsity": 0.5}, ""),
)

NAME = "quality-smollm2-135m"
TEXT = """
Perplexity of SmolLM2-135M-Instruct (dequantised from Q4_1) after pruning, no training afterwards. Unstructured and
N:M rows: fraction of every matrix of the blocks. Structured rows: fraction of the blocks' linear weights.

- At 50 % and at 2:4, SparseGPT < Wanda < magnitude. At 20 % of the blocks, FLAP with its bias is better than without
  and than Wanda-sp; random and magnitude-sp are far behind.
- The weights are on a 4-bit grid, so magnitudes tie: in 15 % of the runs of four the 2:4 cut falls between two equal
  weights. Which of them leaves is a matter of convention: 1,419 when it is the first (as here), 2,873 when it is the
  last. The reference value lies between.
- "spread" is the largest distance of a matrix (or of the total, for structured rows) from the sparsity asked for.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    arguments = parser.parse_args()
    model, tokenizer = sc.load(arguments.model)
    anatomy = sc.anatomy(model)

    def perplexity(one: Any) -> float:
        return perplexity_of(one, tokenizer, arguments.evaluation, windows=40)

    setting = {
        "model": arguments.model,
        "calibration": "WikiText-2 validation, file as it is, 64 consecutive windows of 512 tokens",
        "evaluation": "WikiText-2 test, file as it is, first 40 consecutive windows of 512 tokens",
        "seed": 0,
        "dtype": "float32",
    }
    rows = finished_rows(NAME) or [{"method": "dense", "perplexity": perplexity(model), "reference": "25.6"}]
    for method, options, reference in RUNS:
        shown = ", ".join(f"{k}={v}" for k, v in options.items())
        if any(row["method"] == method and row.get("options") == shown for row in rows):
            continue
        plan = sc.plan(
            model,
            tokenizer,
            method=method,
            options=options,
            calibration=arguments.calibration,
            samples=64,
            length=512,
            dtype="float32",
        )
        removed = removed_fraction(plan, anatomy)
        rows.append(
            {
                "method": method,
                "options": shown,
                "removed": f"{removed:.4f}",
                "spread": f"{_spread(plan, options, removed):.5f}",
                "perplexity": perplexity(sc.apply(plan, model)),
                "reference": reference,
                "notes": len(plan.provenance[0].notes),
            }
        )
        print(rows[-1], flush=True)
        write_result(NAME, "What every method costs in quality", setting, rows, TEXT)


def _spread(plan: sc.Plan, options: dict[str, Any], removed: float) -> float:
    asked = options.get("sparsity", 0.5)
    if plan.masks:
        return max(abs(plan.sparsity(name) - asked) for name in plan.masks)
    return 0.0 if "layers" in options else abs(removed - asked)


if __name__ == "__main__":
    main()
