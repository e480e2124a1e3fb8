"""What calibration costs beside the forwards that any implementation must run.

    python benchmarks/cost.py --calibration VALID.txt --evaluation TEST.txt

One run, interleaved, medians: the bare walk over the blocks (one forward for FLAP; two for a sequential method: one
to observe, one to go on with the pruned block) against the whole plan. In float32 and in bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import finished_rows, write_result

import secateur as sc
from secateur.models.sources import Source
from secateur.observe.calibration import load_tokens
from secateur.observe.driver import BlockWalk
from secateur.observe.precision import bfloat16_speedup, compute_dtype

METHODS = {"wanda": 2, "sparsegpt": 2, "flap": 1}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

TEXT = """
`ratio` is the time of the whole plan divided by that of the calibration forwards alone (`forwards`: one per block for
FLAP, two for the sequential methods), in the same dtype, same process, alternating; medians. `perplexity` is that of
the pruned model, evaluated in float32. `auto` takes the dtype that a one-second probe found faster on this machine.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="default: both")
    arguments = parser.parse_args()
    model, tokenizer = sc.load(arguments.model)
    dtypes = arguments.dtype or list(DTYPES)
    # rows of an earlier run in other dtypes stay; every ratio compares times of one run
    rows = [row for row in finished_rows("cost-smollm2-135m") if row["dtype"] not in dtypes]
    rows += [row for dtype in dtypes for row in _measure(dtype, model, tokenizer, arguments)]
    device = torch.device("cpu")
    setting = {
        "model": arguments.model,
        "calibration": f"WikiText-2 validation, {arguments.samples} consecutive windows of 512 tokens",
        "evaluation": "WikiText-2 test, first 40 consecutive windows of 512 tokens",
        "repeats": arguments.repeats,
        "auto": f"{compute_dtype('auto', device)} (bfloat16 multiplies {bfloat16_speedup(device):.2f}x as fast)",
    }
    write_result("cost-smollm2-135m", "What calibration costs in time", setting, rows, TEXT)


def _measure(dtype: str, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    ids = load_tokens(arguments.calibration, tokenizer, samples=arguments.samples, length=512).ids
    plans: dict[str, sc.Plan] = {}

    def whole(method: str) -> Callable[[], None]:
        def run() -> None:
            plans[method] = sc.plan(
                model,
                tokenizer,
                method=method,
                calibration=arguments.calibration,
                samples=arguments.samples,
                length=512,
                dtype=dtype,
            )

        return run

    tasks: dict[str, Callable[[], None]] = {"forwards x1": lambda: _forwards(model, ids, DTYPES[dtype], 1)}
    tasks["forwards x2"] = lambda: _forwards(model, ids, DTYPES[dtype], 2)
    tasks |= {method: whole(method) for method in METHODS}
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(arguments.repeats):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - start)
            print(dtype, name, round(times[name][-1], 1), flush=True)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    rows = []
    for method, forwards in METHODS.items():
        pairs = zip(times[method], times[f"forwards x{forwards}"], strict=True)
        table = sc.evaluate(
            {"model": sc.apply(plans[method], model)},
            tokenizer,
            [f"perplexity:{arguments.evaluation}"],
            length=512,
            windows=40,
        )
        rows.append(
            {
                "dtype": dtype,
                "method": method,
                "seconds": medians[method],
                "forwards": medians[f"forwards x{forwards}"],
                "ratio": statistics.median(whole / bare for whole, bare in pairs),
                "perplexity": table["perplexity"].values["model"],
            }
        )
        print(rows[-1], flush=True)
    return rows


def _forwards(model: Any, ids: torch.Tensor, dtype: torch.dtype, times: int) -> None:
    walk = BlockWalk(Source(model), ids, dtype=dtype)
    for layer in range(model.config.num_hidden_layers):
        block = walk.open(layer)
        for _ in range(times - 1):
            walk.observe(block, layer, [], {}, advance=False)
        walk.advance(block, layer)


if __name__ == "__main__":
    main()
