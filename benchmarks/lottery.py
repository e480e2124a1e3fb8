"""Lottery tickets, rewinding, SAP and stability: what their papers claim, on digits, and on pictures if there are some.

    python benchmarks/lottery.py                                digits, needs scikit-learn
    python benchmarks/lottery.py --cifar cifar10_train.parquet  and pictures, needs pyarrow and pillow

Everything runs on one thread. Every training is kept (``--work``), so a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import finished_rows, write_result
from precropping import Data, cifar
from sparsifier_cost import ResNet
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.criteria.sparsity import pq_index
from secateur.files import cache_folder
from secateur.methods import Contest, option
from secateur.methods.training.sap import SAP
from secateur.rounds import Entry, Run
from sparse_training import MLP, about_pictures, accuracy, digits, mirrored, perceptron

NAME, TITLE = "lottery", "Lottery tickets"
EARLY = 150
COMPARED = (7, 12, 16, 20)
"""Levels at which 21.0, 6.9, 2.8 and 1.1 % are left."""

TEXT = """
Accuracies on pictures that were not trained on, in per cent: mean and standard deviation over the seeds. A seed decides
the first weights, the order of batches at every level, and the controls. `left` is the fraction of weights that is
left.

- `tickets`: a perceptron 64-256-128-10, 1500 steps of SGD at 0.1 on batches of 64 of 1000 digits; 20 % of what is left
  leaves at every level, all weights compete. `early` is the accuracy after 150 steps, `accuracy` that in the end.
  `reinit` has the mask of the ticket on newly drawn weights, `shuffle` its first weights with live ones at random
  places within every layer.
- `fixed rate` and `SAP`: the same with 1000 steps per level and one seed; `index` is the PQ index (p = 0.5, q = 1) of
  the live weights behind the training, `removed` the share of them that leaves then.
- `floor in float64`, `in float32`: the same, but what leaves of a row is worked out in floating point as it stands in
  the paper, floor(d · (1 - r / d)). That can be d - r - 1, by rounding. The official code does it in float32.
- `stability`: two copies that part at a step, and are trained in different orders; `barrier` is how much the error
  rises on the line between them (30 points), in points. The network has no batch norms.

What the papers claim, and what shows here on digits:

- Tickets learn faster than the dense network: at 21 % they are ahead of it by a point and a half after 150 steps, and
  level in the end. New weights in the same mask, and shuffled masks, learn much more slowly.
- At 6.9 % tickets end ahead of new weights by 2 points and of shuffled masks by 7, and at 2.8 % by 5 and by 60.
- The index falls while accuracy holds, is least at 3 to 7 % of the weights, and rises as the network becomes too small.
- The share that SAP removes falls from 15 to 18 % of what is left to 1 to 3 %, and what it stops at is as good as the
  dense network but for half a point.
- How far SAP gets by neurons hangs on one rounding. A row here has at most 256 weights, and of 30 that are left a
  level takes one, or none where the floor errs: without it 41 % are left after 24 levels, with it 46 % in float64 and
  47 % in float32. `sap` takes the whole number that the formula says, and layers or everything together have so many
  weights that it doesn't show.
- Training is stable from the first step on, so that weights can go back to it.

On pictures, by a small ResNet (`pictures`; `from 3 %`: weights go back to where they were after 3 % of the steps):

- Tickets are ahead of their controls at both sizes: at 21 % by 4 to 9 points, and at 4.4 % by 10 to 13. They are ahead
  of the dense network, too, for which 600 steps are few: by 5 points at 21 %. So are weights that go back to the first
  step, of one seed.
- SAP, with one seed, comes to 16.6 % of the weights in 4 levels and to 6.1 % in 8, where a fixed rate takes 8 and 12,
  and is as good there. The share that leaves falls from 45 to 17 % of what is left, and the index with it; at 3.1 % it
  is too much.
"""


@dataclass(frozen=True)
class Task:
    """A network, its data, and how it is trained."""

    network: Callable[[], nn.Module]
    data: Data
    steps: int
    batch: int = 64
    rate: float = 0.1
    momentum: float = 0.0
    decay: float = 0.0
    cosine: bool = False

    def train(self, net: nn.Module, run: Run) -> dict[str, float]:
        """A plain loop; the accuracy on the way."""
        optimizer = torch.optim.SGD(net.parameters(), lr=self.rate, momentum=self.momentum, weight_decay=self.decay)
        order = torch.Generator().manual_seed(run.seed)
        (x, y), taken, seen = self.data.train, torch.empty(0, dtype=torch.int64), {}
        net.train()
        for step in run.steps(self.steps):
            if len(taken) < self.batch:
                taken = torch.randperm(len(x), generator=order)
            index, taken = taken[: self.batch], taken[self.batch :]
            if self.cosine:
                optimizer.param_groups[0]["lr"] = self.rate * (1 + math.cos(math.pi * step / self.steps)) / 2
            optimizer.zero_grad()
            F.cross_entropy(net(mirrored(x[index], self.data.mirrored, order)), y[index]).backward()
            optimizer.step()
            if step + 1 == EARLY:
                seen["early"] = accuracy(net, self.data)
                net.train()
        return seen

    def evaluate(self, net: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(net, self.data)}


def tickets(
    task: Task, name: str, arguments: argparse.Namespace, levels: int, at: Sequence[int], **options: Any
) -> None:
    """Tickets of several seeds against their controls."""
    for seeds in range(1, arguments.seeds + 1):
        found = sc.lottery(
            task.network, task.train, evaluate=task.evaluate, levels=levels, seeds=range(seeds), at=at,
            controls=["reinit", "shuffle"], folder=arguments.work / name, resume=True, **options,
        )  # fmt: skip
        shown = {0, *at}
        put(arguments, name, [row for row in summary(name, found.entries) if row["level"] in shown])


def summary(name: str, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """A row by level and branch."""
    groups: dict[tuple[int, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.level, entry.branch), []).append(entry)
    rows = []
    for (level, branch), same in sorted(groups.items(), key=lambda item: item[0][0]):
        left = statistics.fmean(e.remaining for e in same)
        row = {
            "part": name,
            "what": branch if level else "dense",
            "level": level,
            "left": f"{left:.2%}",
            "seeds": len(same),
        }
        for metric in ("early", "accuracy"):
            values = [e.metrics[metric] for e in same]
            row |= {metric: round(statistics.fmean(values), 2), f"± {metric}": round(spread(values), 2)}
        rows.append(row)
    return rows


def spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


@sc.register("sap_rounded")
@dataclass(frozen=True, kw_only=True)
class RoundedSAP(SAP):
    """SAP whose floor is taken of a product that was rounded, as in the official code."""

    dtype: str = option("float32", "in which numbers", choices=("float32", "float64"))

    def leaving(self, contest: Contest) -> torch.Tensor:
        dtype = getattr(torch, self.dtype)
        d_U = contest.live_U.to(dtype)
        index_U = pq_index(contest.weight_UW, self.p, self.q, dim=1, mask=contest.mask_UW).to(dtype)
        bound_U = d_U * (1 + self.eta) ** (self.q / (self.p - self.q))
        r_U = (bound_U * (1 - index_U) ** (self.p * self.q / (self.q - self.p))).ceil()
        share_U = (self.gamma * (1.0 - r_U / d_U.clamp_min(1))).clamp(0.0, self.beta)
        return (d_U * share_U).floor().to(torch.int64)


def adaptive(task: Task, name: str, arguments: argparse.Namespace, levels: int, **options: Any) -> None:
    """One seed by level, with the index and what leaves."""
    rounds = sc.lottery(
        task.network, task.train, evaluate=task.evaluate, levels=levels, folder=arguments.work / name, resume=True,
        **options,
    )  # fmt: skip
    entries = rounds.entries
    rows = []
    for number, entry in enumerate(entries):
        row = {
            "part": name,
            "what": "ticket" if number else "dense",
            "level": entry.level,
            "left": f"{entry.remaining:.2%}",
        }
        row |= {"seeds": 1, "accuracy": round(entry.metrics["accuracy"], 2), "index": round(entry.pq_index, 4)}
        if number + 1 < len(entries):
            row["removed"] = f"{1 - entries[number + 1].weights / entry.weights:.1%}"
        rows.append(row)
    put(arguments, name, [row for row in rows if row["level"] % 4 == 0 or row["level"] == levels])


def stability(task: Task, name: str, arguments: argparse.Namespace, at: Sequence[int], seeds: int, **more: Any) -> None:
    """The barrier between copies by the step at which they part."""
    found = [
        sc.instability(
            task.network, task.train, task.evaluate, at=at, length=task.steps, seed=seed,
            folder=arguments.work / name / f"seed-{seed}", resume=True, **more,
        )
        for seed in range(seeds)
    ]  # fmt: skip
    rows = []
    for step in at:
        barriers = [one[step].barriers["accuracy"] for one in found]
        rows.append({"part": name, "what": f"copies from step {step}", "seeds": seeds})
        rows[-1] |= {"barrier": round(statistics.fmean(barriers), 2), "± barrier": round(spread(barriers), 2)}
    put(arguments, name, rows)


def put(arguments: argparse.Namespace, name: str, rows: list[dict[str, Any]]) -> None:
    """Rows of one part in place of those that there were."""
    parts = arguments.parts
    kept = [row for row in finished_rows(NAME) if row["part"] != name] + rows
    kept.sort(key=lambda row: parts.index(row["part"]) if row["part"] in parts else len(parts))
    about = {"data": "digits of scikit-learn, 1000 trained on and 797 tested on"}
    if arguments.cifar:
        about["pictures"] = about_pictures(arguments)
    write_result(NAME, TITLE, about, kept, TEXT)
    print(name, *rows[-1:], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="parquet file with pictures and labels")
    parser.add_argument("--train", type=int, default=10_000, help="pictures to train on (default 10000)")
    parser.add_argument("--test", type=int, default=2000, help="pictures to test on (default 2000)")
    parser.add_argument("--steps", type=int, default=1200, help="steps on pictures (default 1200)")
    parser.add_argument("--blocks", type=int, default=3, help="of a stage; 3 make a ResNet-20 (default 3)")
    parser.add_argument("--seeds", type=int, default=5, help="how many, of tickets (default 5)")
    parser.add_argument("--work", type=Path, default=cache_folder() / "lottery-study", help="where trainings are kept")
    parser.add_argument("--only", help="one part alone, such as 'tickets'")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = digits()
    mlp = Task(lambda: perceptron(*MLP), data, 1500)
    short = Task(lambda: perceptron(*MLP), data, 1000)
    parts: dict[str, Callable[[str], None]] = {
        "stability": lambda name: stability(mlp, name, arguments, (0, 20, 100), 3),
        "tickets": lambda name: tickets(mlp, name, arguments, 20, COMPARED),
        "fixed rate": lambda name: adaptive(short, name, arguments, 28),
        "SAP, global": lambda name: adaptive(short, name, arguments, 24, method="sap", scope="global"),
        "SAP, layer": lambda name: adaptive(short, name, arguments, 24, method="sap", scope="layer"),
        "SAP, neuron": lambda name: adaptive(short, name, arguments, 24, method="sap", scope="neuron"),
        **{
            f"SAP, neuron, floor in {dtype}": lambda name, dtype=dtype: adaptive(
                short, name, arguments, 24, method="sap_rounded", scope="neuron", dtype=dtype
            )
            for dtype in ("float64", "float32")
        },
    }
    if arguments.cifar:
        parts |= pictures(arguments)
    arguments.parts = list(parts)
    for name, work in parts.items():
        if arguments.only in (None, name):
            work(name)


def pictures(arguments: argparse.Namespace) -> dict[str, Callable[[str], None]]:
    """The same of a small ResNet on CIFAR-10, with weights that go back to the first step or to 3 % of the training."""
    task = Task(
        lambda: ResNet(arguments.blocks), cifar(arguments.cifar, arguments.train, arguments.test), arguments.steps,
        batch=128, momentum=0.9, decay=5e-4, cosine=True,
    )  # fmt: skip
    x, _ = task.data.train
    part = round(0.03 * task.steps)
    rewound = {"method": "lottery_rewind", "start_at": str(part), "steps": task.steps}
    sap = {"method": "sap", "gamma": 3.0}
    return {
        "pictures, stability": lambda name: stability(
            task, name, arguments, (0, part, 4 * part), 1, data=list(x[:2000].split(200))
        ),
        # 20.97 and 4.4 % are left
        "pictures, from the first step": lambda name: tickets(task, name, arguments, 14, (7, 14)),
        "pictures, from 3 %": lambda name: tickets(task, name, arguments, 14, (7, 14), **rewound),
        "pictures, fixed rate": lambda name: adaptive(task, name, arguments, 12),
        "pictures, SAP, layer": lambda name: adaptive(task, name, arguments, 12, scope="layer", **sap),
        "pictures, SAP, neuron": lambda name: adaptive(task, name, arguments, 12, scope="neuron", **sap),
    }


if __name__ == "__main__":
    main()
