"""Structured methods side by side at equal budgets, as ``secateur compare`` gives it.

    python benchmarks/structured.py --calibration VALID.txt --evaluation TEST.txt --work FOLDER

Calibration: 64 consecutive windows of 512 tokens. Evaluation: the first 40 windows of 512 tokens. ``FOLDER`` is that
of the comparison: page, plans, and what is done, so that a second call goes on where the first stopped. Methods join
one after the other, and the result is written after each.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import write_result

import secateur as sc
from secateur.comparison import Comparison
from secateur.comparison.table import mark

METHODS = ("flap", "wanda_sp", "shortgpt", "magnitude_sp", "osscar", "flap:heal=refit", "random_sp")
SPARSITIES = (0.2, 0.4)
SEEDS = (0, 1, 2)
TEXT = """
Perplexity after structured pruning, no training afterwards. `removed` is the fraction of the linear weights of the
blocks that is really gone; who misses what was asked for by more than 0.01 has no part in the verdict. Random methods
run with three seeds, and ± is the standard deviation over them. `p` is the probability that the best method of a
budget is better, when the windows are drawn anew (paired bootstrap); below 0.95 two methods are not distinguishable.
Seconds and memory are those of planning and cutting, in one process that also holds the dense model; `shared` times
would be longer without statistics that another row had taken.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--work", required=True, help="folder of the comparison")
    parser.add_argument("--methods", type=int, default=len(METHODS), help="how many of them, the first ones")
    arguments = parser.parse_args()
    for count in range(2, arguments.methods + 1):
        publish(compared(arguments, METHODS[:count]), Path(arguments.model).name)


def compared(arguments: argparse.Namespace, methods: tuple[str, ...], **more: Any) -> Comparison:
    """The comparison of the first methods; what an earlier call has done is not done again."""
    return sc.compare(
        arguments.model,
        methods=methods,
        sparsity=SPARSITIES,
        seeds=SEEDS,
        tasks=[f"perplexity:{arguments.evaluation}"],
        calibration=arguments.calibration,
        dtype="float32",
        out=arguments.work,
        resume=(Path(arguments.work) / "journal.jsonl").exists(),
        **more,
    )


def publish(comparison: Comparison, model: str) -> None:
    """The table, with the verdicts above it."""
    base = comparison.results.sweep.base
    calibration = base.calibration
    setting = {
        "model": model,
        "calibration": f"{calibration.samples} consecutive windows of {calibration.length} tokens of "
        f"{Path(calibration.source).name}",
        "evaluation": next(m.protocol for m in comparison.results.dense.metrics if m.parts),  # type: ignore[union-attr]
        "seeds": list(comparison.asked.seeds),
        "dtype": base.dtype,
    }
    sentences = "\n".join(f"- {verdict.sentence}" for verdict in comparison.first_verdicts)
    title = f"Structured methods side by side on {model}"
    write_result(f"compare-{model}", title, setting, rows_of(comparison), f"{sentences}\n{TEXT}")


def rows_of(comparison: Comparison) -> list[dict[str, Any]]:
    """The dense model, then every method at every budget."""
    metric = next(iter(comparison.metrics))
    chances = {v.sparsity: v.probabilities or {} for v in comparison.first_verdicts}
    dense: Any = comparison.dense
    sizes = {"M parameters": dense.metric("parameters") / 1e6, "M MACs": dense.metric("MACs") / 1e6}
    rows = [{"sparsity": "", "method": "dense", "removed": "", **sizes, "perplexity": dense.metric(metric)}]
    for row in comparison.rows:
        found: dict[str, Any] = {"sparsity": row.sparsity, "method": row.method}
        if row.done:
            spread = row.spread(metric)
            found |= {
                "removed": f"{row.removed:.4f}",
                "M parameters": _mega(row.mean("parameters")),
                "M MACs": _mega(row.mean("MACs")),
                "perplexity": row.mean(metric),
                "±": "" if spread is None else spread,
                "seeds": len(row.records),
                "p": _chance(chances[row.sparsity].get(row.method)),
                "seconds": row.seconds,
                "shared": "yes" if row.shared else "",
                "peak MB": (row.peak_bytes or 0) / 1e6,
            }
        rows.append({**found, "verdict": mark(comparison, row)})
    return rows


def _mega(value: float | None) -> float | str:
    return "" if value is None else value / 1e6


def _chance(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
