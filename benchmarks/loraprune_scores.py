"""How much of what true gradients tell of heads and neurons do adapters tell, by their rank and by the text of a step?

    python benchmarks/loraprune_scores.py --calibration TEXT.txt

Scores of `loraprune` at the beginning of a training, means over steps in which nothing is learned, so that two ways
look at the very same gradients: those of adapters of several ranks and those of the weights. Beside them stand true
gradients of other windows of the text, adapters that are drawn from another seed, and magnitudes. The result is written
after every number of windows.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import write_result
from torch import Tensor
from torch.nn.functional import cross_entropy

import secateur as sc
from secateur.healing.recovery.options import RecoveryOptions
from secateur.healing.recovery.shrinking import Shrinking
from secateur.healing.recovery.trained import Lora
from secateur.methods import make_method

TITLE = "LoRAPrune: what adapters tell of gradients"
KINDS = ("kv_head", "neuron")
TEXT = """
`correlation` is the rank correlation (Spearman) of the scores of the units of a group, its mean over the
groups, and `half` the share of units on which two ways agree when each removes half of every group (0.5 by
chance). Heads are key-value heads with their queries, few of them in a group. Scores are those of the method,
summed over the projections of a unit, each divided by its norm, and means over {steps} steps of {length} tokens
a window. Adapters are as they begin, with B = 0, and nothing is learned on the way.

`gradient, other windows` is how far the text of a step decides: what remains there is noise of the text. An
adapter shows a gradient G as s G A'A, with A of `rank` rows, drawn once. What is lost in that remains with any
amount of text, and is another loss with other rows (`other seed`).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--steps", type=int, default=8, help="whose scores are averaged")
    parser.add_argument("--windows", default="1,16", help="numbers of windows of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--ranks", default="8,64,512", help="of adapters")
    arguments = parser.parse_args()
    ranks = [int(rank) for rank in arguments.ranks.split(",")]
    tokens = _tokens(arguments)
    rows: list[dict[str, Any]] = []
    for windows in map(int, arguments.windows.split(",")):
        first, second = (tokens[at : at + arguments.steps * windows] for at in (0, len(tokens) // 2))
        grad, magnitude = _scores(arguments.model, first, windows, ("grad", "magnitude"))
        (elsewhere,) = _scores(arguments.model, second, windows, ("grad",))
        (drawn,) = _scores(arguments.model, first, windows, ("lora",), rank=ranks[0], seed=1)
        ways = {"gradient, other windows": elsewhere}
        for rank in ranks:
            (ways[f"lora, rank {rank}"],) = _scores(arguments.model, first, windows, ("lora",), rank=rank)
        found = [(way, "gradient", grad, scores) for way, scores in ways.items()]
        found.append((f"lora, rank {ranks[0]}", "other seed", drawn, ways[f"lora, rank {ranks[0]}"]))
        found.append(("magnitude", "gradient", grad, magnitude))
        for way, beside, one, other in found:
            row = {"scores": way, "beside": beside, "windows a step": windows, **_agreement(one, other)}
            rows.append(row)
            print(row, flush=True)
        write_result(
            f"loraprune-scores-{Path(arguments.model).name}",
            TITLE,
            {"model": Path(arguments.model).name, "text": Path(arguments.calibration).name},
            rows,
            TEXT.format(steps=arguments.steps, length=arguments.length),
        )


def _tokens(arguments: argparse.Namespace) -> Tensor:
    """Windows of a text, two times as many as the most that a way sees."""
    _, tokenizer = sc.load(arguments.model)
    most = 2 * arguments.steps * max(map(int, arguments.windows.split(",")))
    ids = tokenizer(Path(arguments.calibration).read_text(encoding="utf8"))["input_ids"]
    if len(ids) < most * arguments.length:
        raise SystemExit(f"{arguments.calibration} has {len(ids)} tokens, and {most * arguments.length} are needed")
    # all over the text
    starts = range(0, len(ids) - arguments.length + 1, (len(ids) - arguments.length) // max(most - 1, 1))
    return torch.tensor([ids[start : start + arguments.length] for start in list(starts)[:most]])


def _scores(
    source: str, tokens: Tensor, windows: int, metrics: tuple[str, ...], *, rank: int = 8, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Mean scores over the steps of every group, by each of the metrics, at the very same gradients."""
    model, _ = sc.load(source, dtype="float32")
    groups = sc.anatomy(model).of_kind(*KINDS)
    names = sorted({piece.tensor.rpartition(".")[0] for group in groups for piece in group.pieces})
    adapters = Lora(model, RecoveryOptions(rank=rank, dropout=0.0, seed=seed), {}, modules=names)
    totals: list[dict[str, Tensor]] = [defaultdict(lambda: torch.zeros(())) for _ in metrics]
    watching = []
    # true gradients last, since who asks for them clears them away
    for metric in sorted(metrics, key=lambda metric: metric == "grad"):
        method = make_method("loraprune", {"metric": metric})
        shrinking = Shrinking(groups, method.entries, _nothing, beta=0.0, gradients=metric == "grad")
        shrinking.begin(model)
        watching.append((totals[metrics.index(metric)], shrinking))
    for step, batch in enumerate(tokens.split(windows), start=1):
        logits = model(batch).logits[:, :-1]
        cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        for total, shrinking in watching:
            shrinking.on_pre_optimizer_step(step)
            for name, scores in shrinking.scores.items():
                total[name] = total[name] + scores
        model.zero_grad()
    for _, shrinking in watching:
        shrinking.end()
    adapters.finish(learnt=False)
    return totals


def _nothing(step: int, scores: object) -> None:
    """Nothing leaves."""
    return None


def _agreement(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Rank correlation, and the share of units that both would remove or keep at a half, by kind of unit."""
    from scipy.stats import spearmanr

    found: dict[str, list[tuple[float, float]]] = {"heads": [], "neurons": []}
    for name, scores in one.items():
        low, low_too = (s.argsort().argsort() < len(s) // 2 for s in (scores, other[name]))
        same = (low == low_too).double().mean().item()
        kind = "heads" if name.endswith("attention") else "neurons"
        found[kind].append((float(spearmanr(scores, other[name]).statistic), same))
    means = {kind: torch.tensor(pairs).mean(dim=0).tolist() for kind, pairs in found.items()}
    return {f"{what}, {kind}": means[kind][at] for kind in means for at, what in enumerate(("correlation", "half"))}


if __name__ == "__main__":
    main()
