"""Tyr, part by part: local pruning, what later blocks see, and the search, beside FLAP at the same sparsity.

    python benchmarks/tyr.py --calibration VALID.txt --evaluation TEST.txt

The result is written after every row; a second call goes on where the first stopped. Calibration: the first windows of
512 tokens, ``--samples`` of them. Evaluation: the first ``--windows`` windows of 512 tokens. The divergence from the
dense model is measured on windows of the calibration text behind those that are calibrated on.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import finished_rows, write_result

import secateur as sc
from secateur.criteria.divergence import Divergence
from secateur.observe.calibration import load_tokens
from secateur.plans import Plan
from secateur.report.build import removed_fraction

HELD_OUT = 4
ALIKE = {"generations": 0}
SEARCHED = {"iterations": 1, "accumulation": "centre"}
# (label, method, options); rows that end in "no refit" are the plan of the row before without its new values
LOCAL: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("flap, layers alike", "flap", {"structure": "UL-UM"}),
    ("tyr, layers alike, dense inputs", "tyr", {**ALIKE, "levels": 1, "accumulation": "none"}),
    ("the same units, no refit", "", {}),
)
HANDED_ON: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("tyr, layers alike, centre handed on", "tyr", {**ALIKE, "levels": 1, "accumulation": "centre"}),
    ("tyr, layers alike, expectation handed on", "tyr", {**ALIKE, "accumulation": "expectation"}),
    ("tyr, searched, expectation handed on", "tyr", {"iterations": 1}),
    ("tyr, searched, centre handed on", "tyr", SEARCHED),
    ("tyr, searched, centre handed on, seed 1", "tyr", {**SEARCHED, "seed": 1}),
    ("tyr, searched, centre handed on, seed 2", "tyr", {**SEARCHED, "seed": 2}),
)
RUNS = {0.5: (*LOCAL, *HANDED_ON), 0.25: (*LOCAL, HANDED_ON[0])}
ORDER = [(sparsity, label) for sparsity, runs in RUNS.items() for label, _, _ in runs]

TEXT = """
Perplexity of SmolLM2-135M-Instruct (dequantised from Q4_1) after pruning heads and neurons, no training afterwards,
with the divergence of its predictions from the dense model's (nats per token) on text that no row has seen. `removed`
is the fraction of the blocks' linear weights, `heads` and `neurons` what the model loses of each in all. `alike`: every
layer loses the same. `no refit` are the units of the row above with the weights as they were. What later blocks see
while they are pruned: the dense model (`dense inputs`), the blocks before at the level in the middle (`centre`), or the
mean of all levels (`expectation`, the default). Seconds were taken while the machine did other work.

- Without the refit the same units cost three times as much at 50 %, and 1.4 times at 25 %. With it, layers alike and
  dense inputs, Tyr is ahead of FLAP at both, by both measures.
- Handing on the level in the middle, or the mean, is better than dense inputs by both measures.
- The search lowers both beside the same levels unsearched, with each of three seeds (76.6 on average, standard
  deviation 2.1, beside 81.3), and heads and neurons lose in all what they did before. Searched, the level in the middle
  and the mean handed on are no further apart than seeds are.
- OSSCAR, a local method without a search, is ahead of Tyr as published: 32.6, 38.6 and 50.0 at 20, 30 and 40 %, beside
  34.6, 43.8 and 53.5 ([measured](second-order-smollm2-135m.md) with two rounds of a smaller search). Without its term
  of first order, and with the level in the middle handed on, Tyr has 32.6, 39.7 and 49.7 (49.1 and 50.1 with two other
  seeds of the search): level with OSSCAR at 20 and 40 %. On web text Tyr as published is ahead at 20 and 40 %, 93.2 and
  203 beside 104.6 and 209.
- The published search of four rounds is not measured, nor is the absolute value of the term of first order.
"""

MISSING = """
Rows that the table doesn't show have not been run yet; the same command goes on with them.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows")
    parser.add_argument("--levels", type=int, default=5)
    parser.add_argument("--generations", type=int, default=10)
    parser.add_argument("--offspring", type=int, default=8)
    parser.add_argument("--stage-tokens", default="512,2048")
    parser.add_argument("--survivors", default="2")
    _Study(parser.parse_args()).run()


class _Study:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._model, self._tokenizer = sc.load(arguments.model)
        self._anatomy = sc.anatomy(self._model)
        self._name = f"tyr-{Path(arguments.model).name}"
        samples = arguments.samples
        ids = load_tokens(arguments.calibration, self._tokenizer, samples=samples + HELD_OUT, length=512, seed=0).ids
        self._held_out = ids[samples:]
        self._dense = [Divergence(self._logits(self._model, window)) for window in self._held_out]

    def run(self) -> None:
        rows = finished_rows(self._name) or [{"sparsity": "", "method": "dense", **self._measured(self._model)}]
        local: dict[float, Plan] = {}
        for sparsity, runs in RUNS.items():
            for label, method, options in runs:
                if any((row["sparsity"], row["method"]) == (sparsity, label) for row in rows):
                    continue
                row: dict[str, Any] = {"sparsity": sparsity, "method": label}
                if method:
                    started = time.perf_counter()
                    plan = local[sparsity] = self._plan(method, {**options, "sparsity": sparsity})
                    row["seconds"] = time.perf_counter() - started
                else:
                    # the row above may have been made by a run that was interrupted behind it
                    plan = local.get(sparsity) or self._plan("tyr", {**LOCAL[1][2], "sparsity": sparsity})
                    plan = replace(plan, masks={}, values={})
                rows.append({**row, **self._lost(plan), **self._measured(sc.apply(plan, self._model))})
                print(rows[-1], flush=True)
                self._write(rows)
        self._write(rows)

    def _plan(self, method: str, options: dict[str, Any]) -> Plan:
        given = self._arguments
        if method == "tyr":
            own = {"levels": given.levels, "generations": given.generations, "offspring": given.offspring}
            own |= {"stage_tokens": given.stage_tokens, "survivors": given.survivors}
            options = {**own, **options}
        return sc.plan(
            self._model,
            self._tokenizer,
            method=method,
            options=options,
            calibration=given.calibration,
            samples=given.samples,
            length=512,
            dtype="float32",
        )

    def _lost(self, plan: Plan) -> dict[str, Any]:
        lost: Counter[str] = Counter()
        for group in self._anatomy.of_kind("kv_head", "neuron"):
            lost[group.kind] += len(plan.removed(group.name)) if group.name in plan.keep else 0
        removed = removed_fraction(plan, self._anatomy)
        return {"removed": f"{removed:.4f}", "heads": lost["kv_head"], "neurons": lost["neuron"]}

    def _measured(self, model: Any) -> dict[str, float]:
        task = f"perplexity:{self._arguments.evaluation}"
        table = sc.evaluate({"model": model}, self._tokenizer, [task], length=512, windows=self._arguments.windows)
        apart = [
            dense.of(self._logits(model, window)) for dense, window in zip(self._dense, self._held_out, strict=True)
        ]
        return {"perplexity": table["perplexity"].values["model"], "divergence": sum(apart) / len(apart)}

    @torch.no_grad()
    def _logits(self, model: Any, window: torch.Tensor) -> torch.Tensor:
        return model(input_ids=window[None], use_cache=False).logits[0]

    def _write(self, rows: list[dict[str, Any]]) -> None:
        given = self._arguments
        setting = {
            "model": given.model,
            "calibration": f"WikiText-2 validation, file as it is, {given.samples} consecutive windows of 512 tokens",
            "evaluation": f"WikiText-2 test, file as it is, first {given.windows} consecutive windows of 512 tokens",
            "divergence": f"WikiText-2 validation, the {HELD_OUT} windows behind those",
            "search": f"{given.levels} levels, {given.generations} generations of {given.offspring} offspring, one"
            f" iteration, stages of {given.stage_tokens} tokens, survivors {given.survivors}",
            "seed": "0 where a row names none",
            "dtype": "float32",
            "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        }
        rows.sort(key=lambda row: ORDER.index((row["sparsity"], row["method"])) if row["sparsity"] else -1)
        missing = len(rows) <= len(ORDER)
        write_result(self._name, "Tyr, part by part", setting, rows, TEXT + (MISSING if missing else ""))


if __name__ == "__main__":
    main()
