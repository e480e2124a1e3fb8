"""CFSP's two stages apart: scores of FFN neurons, and what every block keeps.

    python benchmarks/cfsp.py --calibration VALID.txt --evaluation TEST.txt [--model MODEL] [--only ROW …]

The result is written after every row; a second call goes on where the first stopped. Only FFN neurons leave, and the
sparsity is a fraction of these, as published. Calibration: ``--samples`` consecutive windows of ``--length`` tokens.
Evaluation: the first ``--windows`` windows of 512 tokens.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from common import finished_rows, perplexity_of, write_result
from torch import Tensor

import secateur as sc
from secateur.allocate import Allocator, UniformAllocator
from secateur.criteria import random_scores
from secateur.methods import Descriptor, NeuronMethod, Seen, Target, option
from secateur.methods.structure.flap import FLAP


@sc.register("random_neurons")
@dataclass(frozen=True, kw_only=True)
class RandomNeurons(NeuronMethod):
    """The control: neurons that a seed draws."""

    seed: int = option(0, "seed of the lot", ge=0)

    descriptor: ClassVar = Descriptor(
        object="heads_and_neurons", granularity="structured_group", score="random", allocation="uniform", data="none",
        speedup="real",
    )  # fmt: skip

    def score(self, target: Target, seen: Seen) -> Tensor:
        return random_scores(target.name, self.seed, (target.units,))

    def allocator(self) -> Allocator:
        return UniformAllocator(self.sparsity)


@sc.register("flap_neurons")
@dataclass(frozen=True, kw_only=True)
class FlapNeurons(FLAP, NeuronMethod):
    """FLAP as the code of CFSP compares with it: neurons alone, ranked over all blocks, with the bias."""


ROWS: tuple[tuple[str, str, dict[str, Any], str | None], ...] = (
    ("activations, blocks by the angle (CFSP)", "cfsp", {}, None),
    ("activations, blocks alike", "cfsp", {}, "uniform"),
    ("eq. 8, blocks by the angle", "cfsp", {"metric": "eq8"}, None),
    ("Wanda-sp, blocks alike", "cfsp", {"metric": "wanda_base"}, "uniform"),
    ("FLAP with its bias", "flap_neurons", {}, None),
    ("magnitude, blocks alike", "cfsp", {"metric": "mag_base"}, "uniform"),
    ("random 0, blocks alike", "random_neurons", {"seed": 0}, None),
    ("random 1, blocks alike", "random_neurons", {"seed": 1}, None),
    ("random 2, blocks alike", "random_neurons", {"seed": 2}, None),
)
TITLE = "CFSP: scores of neurons, and shares of blocks"
TEXT = """
Perplexity after a fraction of the FFN neurons has left, without training. `densest` are the four blocks that keep most,
and `sparsest` the four that keep least.

- What neurons do counts, and not how large their weights are: activations alone, Wanda-sp and eq. 8 lie close together,
  and magnitude and chance far away, at 20 % and more so at 50 %.
- Shares of blocks gain more than the choice of a score. They protect the first two blocks and the last one.
- FLAP, with its own way to rank the neurons of all blocks and a bias, keeps up at 20 % and not at 50 %, where it takes
  most from the first and the last block.
- The published score and eq. 8 of the paper are the same within what such windows can tell.
- The training that belongs to the method, adapters with ranks by importance (IG-LoRA, `lora:ranks=importance`), is not
  measured beside equal ranks, here or on another page.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--sparsities", default="0.2,0.5")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of the rows to run now")
    arguments = parser.parse_args()
    name = f"cfsp-{Path(arguments.model).name}"
    model, tokenizer = sc.load(arguments.model)

    def perplexity(one: Any) -> float:
        return perplexity_of(one, tokenizer, arguments.evaluation, windows=arguments.windows)

    setting = {
        "model": Path(arguments.model).name,
        "calibration": f"{Path(arguments.calibration).name}, {arguments.samples} windows of {arguments.length} tokens",
        "evaluation": f"{Path(arguments.evaluation).name}, first {arguments.windows} windows of 512 tokens",
        "seed": "0; random neurons 0, 1 and 2",
    }
    rows = finished_rows(name) or [{"what": "dense", "sparsity": 0.0, "perplexity": perplexity(model)}]
    with tempfile.TemporaryDirectory() as statistics:
        for sparsity in map(float, arguments.sparsities.split(",")):
            for what, method, options, allocate in ROWS:
                done = any(row["what"] == what and row["sparsity"] == sparsity for row in rows)
                if done or (arguments.only and not what.startswith(tuple(arguments.only))):
                    continue
                started = time.perf_counter()
                plan = sc.plan(
                    model,
                    tokenizer,
                    method=method,
                    sparsity=sparsity,
                    budget="neurons",
                    allocate=allocate,
                    options=options,
                    calibration=arguments.calibration,
                    samples=arguments.samples,
                    length=arguments.length,
                    # plans share what they see of the dense model
                    statistics=statistics,
                )
                cut = sc.apply(plan, model)
                rows.append({"what": what, "sparsity": sparsity, "perplexity": perplexity(cut), **ends(plan)})
                print(rows[-1], f"{time.perf_counter() - started:.0f} s", flush=True)
                write_result(name, TITLE, setting, rows, TEXT)
    write_result(name, TITLE, setting, rows, TEXT)


def ends(plan: sc.Plan) -> dict[str, str]:
    """The blocks that keep most, and those that keep least, by their number; nothing where all keep as many."""
    kept = {int(name.split(".")[1]): len(units) for name, units in plan.keep.items()}
    ordered = sorted(kept, key=lambda layer: (-kept[layer], layer))
    if len(set(kept.values())) == 1:
        return {"densest": "", "sparsest": ""}
    return {"densest": " ".join(map(str, sorted(ordered[:4]))), "sparsest": " ".join(map(str, sorted(ordered[-4:])))}


if __name__ == "__main__":
    main()
