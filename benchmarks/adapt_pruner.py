"""Adapt-Pruner: shares of blocks by their importance, by nothing, or against it; and pruning and training in turns.

    python benchmarks/adapt_pruner.py --calibration VALID.txt --evaluation TEST.txt [--model MODEL] [--only ROW …]
    python benchmarks/adapt_pruner.py … --turns --work FOLDER

The result is written after every row; a second call goes on where the first stopped. Calibration: ``--samples`` windows
of 64 tokens, all of them before every step. Evaluation: the first ``--windows`` windows of 512 tokens. ``--turns`` adds
the rows of training: ``--stages`` stages of one training of ``--steps`` steps, and one cut before all of them.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from common import finished_rows, perplexity_of, write_result

import secateur as sc

ARMS = (
    ("as published", 0.02),
    ("every block alike", 0.0),
    ("against the importance", -0.02),
)
TITLE = "Adapt-Pruner: a little at a time"
TEXT = """
Perplexity after a fraction of the blocks' parameters has left, as heads and neurons, by first-order Taylor scores that
are taken anew. `densest` are the four blocks that keep most neurons.

Shares by the importance of blocks are better than equal ones, and these better than shares against it, by more at 40 %
than at 20 %; and most neurons stay in the first and the last blocks: what the paper claims shows. Pruned and trained
in turns the model ends lower than pruned at once and then trained in as many steps, with one seed. Both are trained on
text of the kind that is evaluated, and the dense model isn't: that they end near it or below is adaptation to such
text, and shows no recovery. The dense model after the same training, and text of another kind, are not measured.
`held out` are windows of the text that is trained on.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--sparsities", default="0.2,0.4")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--refresh", type=int, default=1)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--turns", action="store_true")
    parser.add_argument("--stages", type=int, default=6)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--work", default="adapt-pruner-runs", help="folder for checkpoints on the way")
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of the rows to run now")
    arguments = parser.parse_args()
    name = f"adapt-pruner-{Path(arguments.model).name}"
    model, tokenizer = sc.load(arguments.model)

    def perplexity(one: Any) -> float:
        return perplexity_of(one, tokenizer, arguments.evaluation, windows=arguments.windows)

    setting = {
        "model": Path(arguments.model).name,
        "calibration": f"{Path(arguments.calibration).name}, {arguments.samples} windows of 64 tokens, refreshed every "
        f"{arguments.refresh} of 50 steps",
        "evaluation": f"{Path(arguments.evaluation).name}, first {arguments.windows} windows of 512 tokens",
        "seed": 0,
    }
    rows = finished_rows(name) or [{"what": "dense", "sparsity": 0.0, "perplexity": perplexity(model)}]

    def wanted(what: str, sparsity: float) -> bool:
        done = any(row["what"] == what and row["sparsity"] == sparsity for row in rows)
        return not done and (not arguments.only or what.startswith(tuple(arguments.only)))

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)
        write_result(name, TITLE, setting, rows, TEXT)

    for sparsity in map(float, arguments.sparsities.split(",")):
        for what, amplitude in ARMS:
            if not wanted(what, sparsity):
                continue
            plan = sc.plan(
                model,
                tokenizer,
                method="adapt_pruner",
                sparsity=sparsity,
                options={"amplitude": amplitude, "refresh": arguments.refresh, "step_windows": 0},
                calibration=arguments.calibration,
                samples=arguments.samples,
                length=64,
                dtype="float32",
            )
            cut = sc.apply(plan, model)
            add({"what": what, "sparsity": sparsity, "perplexity": perplexity(cut), "densest": densest(plan)})
    if not arguments.turns:
        return
    training = f"batch={arguments.batch},length={arguments.length},loss=ce,schedule=wsd,warmup=0.05,floor=0.1,lr=2e-5"
    for what, stages in (("pruned and trained in turns", arguments.stages), ("pruned at once, then trained", 1)):
        if not wanted(what, 0.3):
            continue
        out = Path(arguments.work) / f"{name}-{stages}"
        step = {
            "method": "adapt_pruner",
            "sparsity": 0.3,
            "stages": stages,
            "heal": f"full:steps={arguments.steps},{training}",
            # scores are taken as often in all
            "options": {"refresh": arguments.refresh * stages, "step_windows": 0},
        }
        job = {
            "model": arguments.model,
            "out": str(out),
            "dtype": "float32",
            "calibration": {"source": arguments.calibration, "samples": arguments.samples, "length": 64},
            "steps": [step],
        }
        report = sc.run(job, resume=out.with_name(f"{out.name}.run").exists())
        trained, _ = sc.load(out, trust_remote_code=True)
        held_out = report.recoveries[-1]["after"]
        about = f"{arguments.steps} steps of {arguments.batch} × {arguments.length} tokens, {stages} stage(s)"
        add({"what": what, "sparsity": 0.3, "perplexity": perplexity(trained), "held out": held_out, "training": about})
        shutil.rmtree(out)


def densest(plan: sc.Plan) -> str:
    kept = {int(name.split(".")[1]): len(units) for name, units in plan.keep.items() if name.endswith("mlp")}
    ordered = sorted(kept, key=lambda layer: (-kept[layer], layer))
    return " ".join(map(str, sorted(ordered[:4]))) if len(set(kept.values())) > 1 else ""


if __name__ == "__main__":
    main()
