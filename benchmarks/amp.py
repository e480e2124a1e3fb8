"""AMP: whether its scores tell what counts, and whether heads and neurons together beat either of them.

    python benchmarks/amp.py --calibration VALID.txt --evaluation TEST.txt [--model MODEL] [--only ROW …]
    python benchmarks/amp.py … --steps 300

The result is written after every row; a second call goes on where the first stopped. ``sparsity`` is the fraction of
the blocks' linear weights that leaves, whatever it leaves from. Calibration: ``--samples`` consecutive windows of
``--length`` tokens, each of which weighs the same, as prompts do in the paper. Evaluation: the first ``--windows``
windows of 512 tokens. With ``--steps`` every order is trained as well, with adapters on the calibration text.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import finished_rows, healed, perplexity_of, write_result
from torch import Tensor

import secateur as sc
from secateur.criteria import random_scores
from secateur.errors import BudgetError
from secateur.methods import Seen, Target, option
from secateur.methods.structure.amp import AMP
from secateur.report.build import removed_fraction


@sc.register("amp_by_chance")
@dataclass(frozen=True, kw_only=True)
class ByChance(AMP):
    """The control: as many heads and neurons of every layer, which a seed draws."""

    seed: int = option(0, "seed of the lot", ge=0)

    def score(self, target: Target, seen: Seen) -> Tensor:
        return random_scores(target.name, self.seed, (target.units,))


STANDARD, REVERSED = "standard", "reversed"
ORDERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (STANDARD, "amp", {}),
    *((f"random {seed}", "amp_by_chance", {"seed": seed}) for seed in range(3)),
    (REVERSED, "amp", {"order": "reversed"}),
)
PARTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("heads alone", "amp", {"parts": "heads"}),
    ("neurons alone", "amp", {"parts": "mlp"}),
)
TRAINED = (STANDARD, "random 0", REVERSED)
TITLE = "AMP: orders of heads and neurons"
TEXT = """
Perplexity after a fraction of the blocks' linear weights has left: what scores lowest, chance, or (reversed) what
scores highest; and heads or neurons alone, for the same number of weights. `trained` are the same models after
training of adapters.

- The scores tell what counts: what scores lowest costs far less than any of three lots, and what scores highest far
  more than all of them.
- After the same training of adapters the order is kept, as published: what scores lowest, chance, what scores highest.
  The training is on text of the kind that is evaluated, and so in part adaptation to it. The dense model has not had
  it, and no other text is measured, so how much of a model comes back isn't shown.
- Heads and neurons together are far better than heads alone, as published. Neurons alone are better than both on this
  model, whose layers have three key-value heads: the least that can leave of attention is a third. At 30 % there are
  not enough heads.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--sparsities", default="0.17,0.3")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--steps", type=int, default=0, help="of training; 0 leaves it out")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--train-length", type=int, default=128, help="tokens of a window that is trained on")
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of the rows to run now")
    arguments = parser.parse_args()
    name = f"amp-{Path(arguments.model).name}"
    model, tokenizer = sc.load(arguments.model)
    anatomy = sc.anatomy(model)
    setting = {
        "model": Path(arguments.model).name,
        "calibration": f"{Path(arguments.calibration).name}, {arguments.samples} windows of {arguments.length} tokens",
        "evaluation": f"{Path(arguments.evaluation).name}, first {arguments.windows} windows of 512 tokens",
        "seed": "0; random orders 0, 1 and 2",
    }
    if arguments.steps:
        about = f"{arguments.steps} steps of {arguments.batch} x {arguments.train_length} tokens"
        setting["training"] = f"lora, cross-entropy, {about} of the calibration text"

    def perplexity(one: Any) -> float:
        return perplexity_of(one, tokenizer, arguments.evaluation, windows=arguments.windows)

    rows = finished_rows(name) or [{"what": "dense", "sparsity": 0.0, "perplexity": perplexity(model)}]
    with tempfile.TemporaryDirectory() as statistics:
        for sparsity in map(float, arguments.sparsities.split(",")):
            for what, method, options in (*ORDERS, *PARTS):
                row = next((r for r in rows if (r["what"], r["sparsity"]) == (what, sparsity)), None)
                trains = bool(arguments.steps) and what in TRAINED and (row is None or "trained" not in row)
                if (row and not trains) or (arguments.only and not what.startswith(tuple(arguments.only))):
                    continue
                try:
                    plan = sc.plan(
                        model,
                        tokenizer,
                        method=method,
                        sparsity=sparsity,
                        options=options,
                        calibration=arguments.calibration,
                        samples=arguments.samples,
                        length=arguments.length,
                        dtype="float32",
                        # plans share what they see of the dense model
                        statistics=statistics,
                    )
                except BudgetError as error:
                    # heads are too small a part of some models
                    print(f"{what} at {sparsity:g}: {error}", flush=True)
                    continue
                cut = sc.apply(plan, model)
                if row is None:
                    removed = f"{removed_fraction(plan, anatomy):.4f}"
                    row = {"what": what, "sparsity": sparsity, "perplexity": perplexity(cut), "removed": removed}
                    rows.append(row)
                if trains:
                    training = {"batch": arguments.batch, "length": arguments.train_length}
                    trained = healed(cut, tokenizer, plan, arguments.calibration, steps=arguments.steps, **training)
                    row["trained"] = perplexity(trained)
                print(row, flush=True)
                write_result(name, TITLE, setting, rows, TEXT)


if __name__ == "__main__":
    main()
