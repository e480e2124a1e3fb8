"""Is a language model that was cut to a latency as fast as asked, alone and together with a smaller KV cache?

python benchmarks/budgets.py --calibration wikitext2_valid.txt --evaluation wikitext2_test.txt
python benchmarks/budgets.py --calibration builtin --evaluation builtin --quick
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import write_result

import secateur as sc

TOLERANCE = 0.05

TEXT = f"""
Heads and neurons removed with `{{method}}`, so that budgets are met: a request ({{workload}}) in a fraction of the
dense model's time, alone and together with a smaller KV cache. `expected` is what the table of latencies, measured on
this machine, says of the cut model, and `measured` the median of {{repeats}} interleaved repeats of all models, both
as fractions of the dense model. `off` is how far what was measured is from what was asked; it is to stay within
{TOLERANCE:.0%} (`within`). What variants lose is their KL divergence, measured one at a time; in the row `by scores`
it is the sum of the method's scores. The `uniform` row has equal widths in every layer. `plan s` is the time of
plan and cut; calibration and variants are part of the first row and found again by the others. The table of latencies
took {{table_seconds:.0f}} s.
"""


def settings(latency: float, kv_bytes: float) -> dict[str, dict[str, Any]]:
    """Rows of the study: name → what is asked."""
    return {
        "latency": {"budget": {"latency": latency}},
        "latency and KV cache": {"budget": {"latency": latency, "kv_bytes": kv_bytes}},
        "latency, by scores": {"budget": {"latency": latency}, "options": {"variants": "scores"}},
        "latency, uniform": {"budget": {"latency": latency}, "options": {"uniform": True}},
    }


def compare(
    model: Any,
    tokenizer: Any,
    asked: Mapping[str, dict[str, Any]],
    *,
    method: str,
    workload: str,
    repeats: int,
    evaluate: list[str],
    options: Mapping[str, Any],
    windows: int,
    **calibration: Any,
) -> list[dict[str, Any]]:
    """One row per setting, the dense model first: what was asked, expected and measured, and the perplexity."""
    models, plans, seconds = {"dense": model}, {}, {}
    for name, setting in asked.items():
        start = time.perf_counter()
        own = {**options, "workload": workload, **setting.get("options", {})}
        result = sc.prune(model, tokenizer, method=method, budget=setting["budget"], options=own, **calibration)
        models[name], plans[name] = result.model, result.plan
        seconds[name] = time.perf_counter() - start
        print(name, f"{seconds[name]:.0f} s", dict(result.plan.provenance[0].budgets), flush=True)
    tasks = [f"request:{workload},repeats={repeats}", *evaluate]
    table = sc.evaluate(models, tokenizer, tasks, windows=windows, length=calibration.get("length", 512))
    taken = table["latency of a request"].values
    rows: list[dict[str, Any]] = []
    for name in models:
        budgets = plans[name].provenance[0].budgets if name in plans else {}
        row: dict[str, Any] = {"model": name}
        if budgets:
            latency = budgets["latency"]
            measured = taken[name] / taken["dense"]
            row |= {
                "asked": latency.asked,
                "expected": latency.pruned / latency.dense,
                "measured": measured,
                "off": measured / latency.asked - 1,
                "within": abs(measured / latency.asked - 1) <= TOLERANCE,
                "KV bytes asked": budgets["kv_bytes"].asked if "kv_bytes" in budgets else 1.0,
                "KV bytes left": _kv_left(plans[name], model),
                "plan s": seconds[name],
            }
        row |= {"request ms": taken[name], "parameters": sum(p.numel() for p in models[name].parameters())}
        row |= {m.name: m.values[name] for m in table.metrics if m.name.startswith("perplexity")}
        rows.append(row)
        print(row, flush=True)
    return rows


def _kv_left(plan: Any, model: Any) -> float:
    """The fraction of the bytes of the KV cache that is left."""
    groups = [g for g in sc.anatomy(model) if g.kind == "kv_head"]
    return sum(g.cost.kv_bytes * len(plan.keep[g.name]) for g in groups) / sum(
        g.cost.kv_bytes * g.units for g in groups
    )


def time_table(model: Any, workload: str) -> float:
    """Seconds that the table of latencies takes, or no more than a moment when the cache has it."""
    start = time.perf_counter()
    sc.plan(model, method="random_sp", budget={"latency": 0.99}, options={"workload": workload, "variants": "scores"})
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="flap")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--latency", type=float, default=0.7)
    parser.add_argument("--kv-bytes", type=float, default=0.7)
    parser.add_argument("--workload", default="batch=1,prompt=256,new=32")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--variant-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a short run that shows that it works; writes no result")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.samples, arguments.length, arguments.windows = 4, 64, 2
        arguments.variant_tokens, arguments.repeats, arguments.workload = 64, 2, "batch=1,prompt=32,new=4"
    torch.set_num_threads(arguments.threads)
    model, tokenizer = sc.load(arguments.model)
    table_seconds = time_table(model, arguments.workload)
    # statistics, and what variants lose, are the same for all budgets
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(
            model,
            tokenizer,
            settings(arguments.latency, arguments.kv_bytes),
            method=arguments.method,
            workload=arguments.workload,
            repeats=arguments.repeats,
            evaluate=[f"perplexity:{arguments.evaluation}"],
            options={"variant_tokens": arguments.variant_tokens},
            windows=arguments.windows,
            calibration=arguments.calibration,
            samples=arguments.samples,
            length=arguments.length,
            dtype="float32",
            statistics=folder,
        )
    if arguments.quick:
        return
    names = {what: Path(getattr(arguments, what)).name for what in ("calibration", "evaluation")}
    setting = {**vars(arguments), **names, "dtype": "float32", "seed": 0, "tolerance": TOLERANCE}
    del setting["quick"]
    text = TEXT.format(**vars(arguments), table_seconds=table_seconds)
    write_result(
        f"budgets-{arguments.model}", "Budgets of latency and KV cache, asked and measured", setting, rows, text
    )


if __name__ == "__main__":
    main()
