"""SliceGPT beside methods that remove heads, neurons and blocks, on one model with one protocol.

    python benchmarks/slicing.py smollm2-135m --calibration wikitext2_valid.txt --evaluation wikitext2_test.txt

Nothing is trained. Rows that are there already are not made again; ``--rows slicegpt`` makes those of one method.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from typing import Any

from common import finished_rows, write_result

import secateur as sc
from secateur.models.fingerprint import display_name

TEXT = """
`asked` is the fraction of the hidden size for `slicegpt`, of blocks for `shortgpt`, and of the weights of the blocks
for the others. `blocks` is the fraction of the blocks' weights that really left, the products between the bases counted
in, and `model` that of all parameters: a head that was tied to the embedding gets a table of its own when hidden states
are rotated, which a small model with a large vocabulary pays for. `windows` are those of calibration and of evaluation.
`seconds` decide and cut, beside whatever else the machine does.
"""
METHODS = ("slicegpt", "flap", "wanda_sp", "shortgpt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.2, 0.25, 0.3])
    parser.add_argument("--rows", nargs="+", default=list(METHODS), help="methods")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--note", default="", help="what the table shows, for the page")
    arguments = parser.parse_args()
    name, title = f"slicing-{Path(arguments.model).name}", f"SliceGPT on {Path(arguments.model).name}"
    rows = finished_rows(name)
    model, tokenizer = sc.load(arguments.model)
    total = sum(p.numel() for p in model.parameters())

    def perplexity(one: Any) -> float:
        task = f"perplexity:{arguments.evaluation}"
        asked = {"windows": arguments.windows, "length": arguments.length}
        # text that is sampled is that of the dense model
        models = {"dense": model, "one": one} if arguments.evaluation == "self" else {"one": one}
        return next(iter(sc.evaluate(models, tokenizer, [task], **asked))).values["one"]

    setting = {
        "model": display_name(model),
        "parameters": total,
        "calibration": f"{Path(arguments.calibration).name}, windows of {arguments.length} tokens",
        "evaluation": f"{Path(arguments.evaluation).name}, windows of {arguments.length} tokens",
        "seed": "0 (random turns among the directions that stay)",
    }
    # rows of a shorter protocol are not those of a longer one
    windows = f"{arguments.samples}, {arguments.windows}"
    wanted = [("dense", 0.0), *((method, s) for method in arguments.rows for s in arguments.sparsities)]
    for method, sparsity in wanted:
        if any((row["method"], row["asked"], row["windows"]) == (method, sparsity, windows) for row in rows):
            continue
        started, cut, removed, seconds = time.perf_counter(), model, 0.0, 0.0
        if sparsity:
            made = sc.prune(
                model, tokenizer, method=method, sparsity=sparsity, calibration=arguments.calibration,
                samples=arguments.samples, length=arguments.length,
            )  # fmt: skip
            cut, removed, seconds = made.model, made.report.achieved, time.perf_counter() - started
        row = {"method": method, "asked": sparsity, "windows": windows, "blocks": f"{removed:.1%}"}
        row["model"] = f"{1 - sum(p.numel() for p in cut.parameters()) / total:.1%}"
        rows.append({**row, "perplexity": perplexity(cut), "seconds": seconds})
        order = ["dense", *METHODS]
        rows.sort(key=lambda row: (row["windows"], order.index(row["method"]), row["asked"]))
        print(row, flush=True)
        write_result(name, title, setting, rows, TEXT + arguments.note)
        del cut
        gc.collect()
    write_result(name, title, setting, rows, TEXT + arguments.note)


if __name__ == "__main__":
    main()
