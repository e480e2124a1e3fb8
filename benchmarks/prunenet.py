"""PruneNet: what its policy learns, beside neurons drawn at random and beside a search for the same reward.

    python benchmarks/prunenet.py --evaluation TEST.txt [--model MODEL] [--only ROW …]

The result is written after every row; a second call goes on where the first stopped. Policies are kept in ``--work``
and found again. Only FFN neurons leave, and the sparsity is a fraction of these. No text is read but for the
evaluation: the first ``--windows`` windows of 512 tokens. ``distance`` is the Kolmogorov-Smirnov distance of the
singular values of ``gate_proj`` before and after, mean over blocks, and ``reward`` the sum of the inverses, by which a
policy is selected.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from common import finished_rows, write_result
from torch import Tensor

import secateur as sc
from secateur.allocate import Allocator, UniformAllocator
from secateur.criteria import random_scores
from secateur.methods import Descriptor, NeuronMethod, Seen, Target, option
from secateur.models.decoders import decoder_blocks
from secateur.search.policy import distance

TITLE = "PruneNet: a policy from weights alone"
TEXT = """
Perplexity after a fraction of the FFN neurons has left, without training and without data. `below random` counts the
blocks whose distance is below the mean of the random draws at that sparsity.

- What the policy draws has the reward of a random draw. Its perplexities are no worse than those of chance, by their
  geometric means a little better at both sparsities; that it beats chance, as published, can't be told from so few
  draws of such a spread.
- A policy can be used again: learnt at 40 %, it draws at 20 % what one learnt at 20 % draws from the same seed, within
  a few percent of perplexity, as published.
- It has learnt something: the neurons of largest alpha have the reward of the best among many random subsets.
- All draws are of one policy for each sparsity, learnt from one seed: how far policies of other seeds differ is not
  measured, and neither is SliceGPT at the same ratio, which the paper compares with.
- The reward doesn't tell what a model loses. The longest rows of `gate_proj` have by far the highest, and the worst
  perplexity.
"""


@sc.register("given_neurons")
@dataclass(frozen=True, kw_only=True)
class GivenNeurons(NeuronMethod):
    """Neurons that somebody else has scored: ``GivenNeurons.scores`` by group."""

    seed: int = option(0, "seed of the lot, where nobody has", ge=0)

    scores: ClassVar[dict[str, Tensor]] = {}
    descriptor: ClassVar = Descriptor(
        object="heads_and_neurons", granularity="structured_group", score="random", allocation="uniform", data="none",
        speedup="real",
    )  # fmt: skip

    def score(self, target: Target, seen: Seen) -> Tensor:
        drawn = random_scores(target.name, self.seed, (target.units,))
        return self.scores.get(target.name, drawn)

    def allocator(self) -> Allocator:
        return UniformAllocator(self.sparsity)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5, help="draws of every policy, and random ones")
    parser.add_argument("--subsets", type=int, default=50, help="random subsets of a block, of which the best is taken")
    parser.add_argument("--work", default="prunenet-policies", help="folder for the policies")
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of the rows to run now")
    arguments = parser.parse_args()
    study = Study(arguments)
    study.row("dense", 0.0, lambda: None)
    for seed in range(arguments.seeds):
        study.row(f"random {seed}", 0.3, lambda seed=seed: study.plan("given_neurons", 0.3, seed=seed))
    study.row("longest rows of gate_proj", 0.3, lambda: study.scored(0.3, study.lengths()))
    for seed in range(arguments.seeds):
        study.row(f"policy learnt at 0.3, draw {seed}", 0.3, lambda seed=seed: study.drawn(0.3, 0.3, seed))
    study.row("policy learnt at 0.3, largest alpha", 0.3, lambda: study.drawn(0.3, 0.3, 42, selection="topk"))
    study.row(f"best of {arguments.subsets} random subsets", 0.3, lambda: study.scored(0.3, study.greedy(0.3)))
    for seed in range(arguments.seeds):
        study.row(f"random {seed}", 0.2, lambda seed=seed: study.plan("given_neurons", 0.2, seed=seed))
    for learnt in (0.2, 0.4):
        for seed in range(arguments.seeds):
            what = f"policy learnt at {learnt}, draw {seed}"
            study.row(what, 0.2, lambda learnt=learnt, seed=seed: study.drawn(learnt, 0.2, seed))
    study.write()


class Study:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.name = f"prunenet-{Path(arguments.model).name}"
        self.model, self.tokenizer = sc.load(arguments.model)
        self.rows = finished_rows(self.name)
        blocks = decoder_blocks(self.model)[1]
        self.gates: list[Tensor] = [block.mlp.gate_proj.weight.detach().float() for block in blocks]  # type: ignore[union-attr]
        self.spectra: list[Tensor] = []

    def row(self, what: str, sparsity: float, make: Any) -> None:
        done = any(row["what"] == what and row["sparsity"] == sparsity for row in self.rows)
        if done or (self.arguments.only and not what.startswith(tuple(self.arguments.only))):
            return
        GivenNeurons.scores.clear()
        plan = make()
        found = {} if plan is None else self.distances(plan)
        task = [f"perplexity:{self.arguments.evaluation}"]
        cut = self.model if plan is None else sc.apply(plan, self.model)
        table = sc.evaluate({"model": cut}, self.tokenizer, task, length=512, windows=self.arguments.windows)
        perplexity = table["perplexity"].values["model"]
        self.rows.append({"what": what, "sparsity": sparsity, "perplexity": perplexity, **found})
        print({k: v for k, v in self.rows[-1].items() if k != "by block"}, flush=True)
        self.write()

    def write(self) -> None:
        shown = []
        for row in self.rows:
            others = [
                r["by block"] for r in self.rows if r["what"].startswith("random") and r["sparsity"] == row["sparsity"]
            ]
            more = {}
            if "by block" in row and others and not row["what"].startswith("random"):
                mean = [sum(column) / len(others) for column in zip(*others, strict=True)]
                below = sum(a < b for a, b in zip(row["by block"], mean, strict=True))
                more = {"below random": f"{below} of {len(mean)}"}
            shown.append({**row, **more})
        setting = {
            "model": Path(self.arguments.model).name,
            "evaluation": f"{Path(self.arguments.evaluation).name}, first {self.arguments.windows} windows of 512",
            "policy": "20 episodes, seed 0",
        }
        write_result(self.name, TITLE, setting, shown, TEXT, leave_out=("by block",))

    def plan(self, method: str, sparsity: float, **options: Any) -> sc.Plan:
        return sc.plan(self.model, None, method=method, sparsity=sparsity, budget="neurons", options=options)

    def scored(self, sparsity: float, scores: list[Tensor]) -> sc.Plan:
        GivenNeurons.scores.update({f"layers.{layer}.mlp": one for layer, one in enumerate(scores)})
        return self.plan("given_neurons", sparsity)

    def drawn(self, learnt: float, sparsity: float, seed: int, **options: Any) -> sc.Plan:
        """A plan by the policy that was learnt at one sparsity, which another seed then draws from."""
        folder = Path(self.arguments.work) / f"{self.name}-{learnt}"
        if not folder.exists():
            self.plan("prunenet", learnt, policy=str(folder))
        return self.plan("prunenet", sparsity, policy=str(folder), seed=seed, **options)

    def lengths(self) -> list[Tensor]:
        return [gate.norm(dim=1) for gate in self.gates]

    def spectrum(self, layer: int) -> Tensor:
        if not self.spectra:
            self.spectra = [torch.linalg.svdvals(gate) for gate in self.gates]
        return self.spectra[layer]

    def greedy(self, sparsity: float) -> list[Tensor]:
        """For every block the best of so many random subsets, by the distance that the reward is made of."""
        generator = torch.Generator().manual_seed(0)
        found = []
        for layer, gate in enumerate(self.gates):
            kept = int((1 - sparsity) * len(gate))
            subsets = [torch.randperm(len(gate), generator=generator)[:kept] for _ in range(self.arguments.subsets)]
            best = min(
                subsets, key=lambda rows, a=layer, w=gate: distance(self.spectrum(a), torch.linalg.svdvals(w[rows]))
            )
            found.append(torch.zeros(len(gate)).index_fill(0, best, 1.0))
        return found

    def distances(self, plan: sc.Plan) -> dict[str, Any]:
        each = [
            distance(self.spectrum(layer), torch.linalg.svdvals(gate[plan.keep[f"layers.{layer}.mlp"]]))
            for layer, gate in enumerate(self.gates)
        ]
        return {"reward": sum(1 / one for one in each), "distance": sum(each) / len(each), "by block": each}


if __name__ == "__main__":
    main()
