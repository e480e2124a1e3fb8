"""Tyr: cut every layer to several levels by second order, and search which level each layer takes, coarse to fine.

Local pruning of the heads read by o_proj or the neurons read by down_proj, for each level on its own:

    H = X^T X + damping * mean(diag) I of the inputs as they are;   G = W H with the dense weight W
    round:  for every unit g that is left
            obj_g = sum over outputs of  1/2 W[:,g] ([H^-1]_gg)^-1 W[:,g]^T  +  sum over columns p in g of <W_p, G_p>
            the units P with the smallest obj leave together:
            W <- W - W[:,P] ([H^-1]_PP)^-1 [H^-1]_P,:;   H^-1 <- H^-1 - [H^-1]_:,P ([H^-1]_PP)^-1 [H^-1]_P,:
    finally W_K = G_K (H_KK)^-1 on the columns K that stay

Neurons leave in 16 rounds, heads in one. `first_order` is the second term: signed in the code, its absolute value in
the paper, `off` for what the loss really grows by, which gave the better model at 40 % (one seed).

Supernet: level e of a layer loses e steps more than its middle; levels that would lose less than nothing or leave too
little are left out. Later blocks see the mean of what all levels give (eq. 5), weighted by what they keep:

    X = sum_e (1 - S_e) X_e / sum_e (1 - S_e)

Search: offspring shift levels between layers, heads among heads and neurons among neurons, so that each kind loses what
it did. Candidates are measured on few calibration tokens, survivors on more, by KL(dense || candidate) over the `top`
tokens of the dense model. Then all is cut again from the dense weights, around the levels that were found, with half
the step (one head and 32 neurons at least). Layers start alike; where heads don't divide evenly, every so many layers
lose one more, and neurons make up for what is left of the budget. With `parts=mlp` neurons give all of it: where few
key-value heads make one of them a large part of a layer, such a start is the better one.

Published: 9 levels, 4 iterations of 50 generations, 128 offspring, stage_tokens 2048,16384,131072, survivors 16,4, and
4 million calibration tokens. The defaults here are for two cores and a small model. All candidates go through the model
together, block by block, so that it may be larger than memory; all levels lie in the folder of the run until the next
search has its own.

Source: G. Li et al., "Tyr-the-Pruner: Structural Pruning LLMs via Global Sparsity Distribution Optimization", NeurIPS
2025, arXiv:2503.09657; official code AMD-AGI/Tyr-the-Pruner. Differs from the official code: the mean of eq. 5 is
really handed on (there the dense activations are, `accumulation=none`); a key-value head leaves with all of its queries
(`heads=kv`; there query heads, whose rows stay in the checkpoint); what leaves is cut out; steps and kept units are
whole numbers, so that the budget is met exactly; equal offspring and the parent are not measured twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.criteria.fitness import CrossEntropy, Fitness, FullKL, SparseKL
from secateur.errors import DataError, OptionError
from secateur.healing import EXACT_INPUTS, problem_of
from secateur.methods import Descriptor, Seen, SupernetMethod, Target, option, register
from secateur.observe import Gram
from secateur.search import FIXED, Evolution
from secateur.solver import FIRST_ORDER, elimination_flops, in_rounds, refit_columns

_SHIFTS = 4
_STAGES = (512, 2048)
# offspring that are equal are drawn again, this many times as many in all
_TRIES = 10


@register("tyr")
@dataclass(frozen=True, kw_only=True)
class Tyr(SupernetMethod):
    """Options of Tyr; rounds, damping, step and fitness from the official script, the size of the search smaller."""

    neuron_rounds: int = option(16, "rounds in which neurons leave", unit="rounds", ge=1)
    head_rounds: int = option(1, "rounds in which heads leave", unit="rounds", ge=1)
    first_order: str = option("signed", "the term <W_p, G_p> of a unit's score", choices=tuple(FIRST_ORDER))
    damping: float = option(0.01, "added to the diagonal of H, relative to its mean", ge=0)
    refit: bool = option(True, "solve for the columns that stay; without, they stay as they are")
    fitness: str = option(
        "sparse_kl",
        "what candidates are measured by: the KL divergence over the top tokens, over all, or perplexity",
        choices=("sparse_kl", "kl", "ppl"),
    )
    top: int = option(8192, "tokens of the vocabulary that sparse_kl looks at", ge=1)
    generations: int = option(10, "parents after the first, in every search; 0 = layers stay alike", ge=0)
    offspring: int = option(8, "candidates per generation", ge=1)
    stage_tokens: str = option(
        "", "what candidates are measured on, stage by stage; empty: 512,2048, or what there is", unit="tokens"
    )
    survivors: str = option("2", "candidates left after every stage but the last")
    fixed: str = option("none", "stages that always read the same tokens", choices=FIXED)

    statistics: ClassVar = {"gram": Gram}
    sequential: ClassVar[bool] = True
    costly: ClassVar[bool] = True
    descriptor: ClassVar = Descriptor(
        object="heads_and_neurons",
        granularity="structured_group",
        score="second_order",
        allocation="global",
        recovery="least_squares",
        data="unlabelled_calibration",
        speedup="real",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        stages, survivors = len(self._numbers("stage_tokens")) or len(_STAGES), self._numbers("survivors")
        if len(survivors) != stages - 1:
            raise OptionError(
                f"tyr: survivors must hold one number for every stage but the last, got {self.survivors!r} for"
                f" {stages} stages"
            )

    def levels_of(
        self, target: Target, seen: Seen, removed: Sequence[int], balance: int
    ) -> tuple[list[tuple[Tensor, Tensor | None]], tuple[str, ...]]:
        weight_OI = target.weight
        exact = weight_OI.shape[1] <= EXACT_INPUTS
        problem, notes = problem_of(target.name, weight_OI, seen, self.damping, exact=exact)
        problem = problem.without_silent()
        rounds = self.neuron_rounds if target.kind == "neuron" else self.head_rounds
        levels: list[tuple[Tensor, Tensor | None]] = []
        for count in removed:
            gone_U = in_rounds(
                problem, target.columns, count, rounds=rounds, first_order=self.first_order, balance=balance
            )
            gone_I = torch.zeros(weight_OI.shape[1], dtype=torch.bool, device=gone_U.device)
            gone_I[target.columns.to(gone_U.device)[gone_U].flatten()] = True
            fitted = self.refit and bool(gone_I.any())
            levels.append((gone_U, refit_columns(problem, gone_I).to(weight_OI.dtype) if fitted else None))
        return levels, notes

    def evolution(self, tokens: int) -> Evolution:
        stages = self._numbers("stage_tokens")
        if self.generations and max(stages, default=0) > tokens:
            raise DataError(
                f"tyr: stage_tokens measures candidates on {max(stages)} tokens, and the calibration text has {tokens}:"
                " give more samples, or smaller stages"
            )
        return Evolution(
            generations=self.generations,
            offspring=self.offspring,
            tokens=stages or tuple(min(stage, tokens) for stage in _STAGES),
            survivors=self._numbers("survivors"),
            shifts=_SHIFTS,
            tries=_TRIES,
            fixed=self.fixed,
            seed=self.seed,
        )

    def measured_by(self) -> Fitness:
        found: dict[str, Fitness] = {"sparse_kl": SparseKL(self.top), "kl": FullKL(), "ppl": CrossEntropy()}
        return found[self.fitness]

    def solve_flops(self, outputs: int, inputs: int) -> int:
        return self.iterations * self.levels * elimination_flops(outputs, inputs)

    def _numbers(self, name: str) -> tuple[int, ...]:
        """An option that lists numbers, those of tokens at least 2. Raises OptionError."""
        text, least = str(getattr(self, name)), 2 if name == "stage_tokens" else 1
        parts = [part.strip() for part in text.split(",")] if text else []
        if not all(part.isdecimal() and int(part) >= least for part in parts):
            raise OptionError(f"tyr: {name} must be whole numbers of at least {least} with commas, got {text!r}")
        return tuple(int(part) for part in parts)
