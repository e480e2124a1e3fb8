"""What a Sparsifier costs in a training step, averaged over the time from one update of the masks to the next.

    python benchmarks/sparsifier_cost.py

A ResNet-20 on 64 pictures of 32x32 and a GPT of 10 million parameters on 64 sequences of 32 tokens, both random, on one
thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import finished_rows, write_result
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc

NAME, TITLE = "sparsifier-cost", "What a Sparsifier costs in a training step"
METHODS = {
    "gmp": {"end": 10_000},
    "rigl": {"end": 10_000},
    "snfs": {"end": 10_000},
    "granet": {"end": 10_000, "steps": 20_000},
    "set": {"end": 10_000},
    "gmp, global": {"end": 10_000, "scope": "global"},
}
TEXT = """
Milliseconds of CPU time on one thread, medians; wall time would tell what else the machine does. `step` is a training
step without masks: forward, backward and optimizer. `hold` is what `sparsifier.step()` takes where masks don't change:
dead weights, and what the optimizer remembers of them, are zeroed. `update` is what it takes where they do; with `rigl`
also the copy from which the optimizer's step is taken back. `per cent` is the mean over a period of {every} steps with
one update, in per cent of `step`. `bits at rest` are those of the saved masks per weight.

Every row is far below 5 % of a step: zeroing is one pass over the weights and over what the optimizer remembers, and a
step goes through them many times. An update of the GPT takes up to two thirds of a step, for random numbers, partitions
and copies. The machine was busy with other work meanwhile, which CPU time doesn't count.
"""


class Block(nn.Module):
    """A basic block of a ResNet for small pictures; the shortcut subsamples and pads."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.stride = 1 if before == width else 2
        self.conv1 = nn.Conv2d(before, width, 3, self.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.pad = width - before

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.pad))
        return (y + shortcut).relu()


class ResNet(nn.Module):
    """ResNet-(6n + 2) of He et al. for pictures of 32x32: three stages of ``blocks`` blocks; 3 make a ResNet-20."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        widths = [16] * blocks + [32] * blocks + [64] * blocks
        self.blocks = nn.Sequential(*[Block(a, b) for a, b in zip([16, *widths], widths, strict=False)])
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def resnet() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], Tensor]]:
    module = ResNet()
    x, y = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    return module, torch.optim.SGD(module.parameters(), 0.1, momentum=0.9), lambda: F.cross_entropy(module(x), y)


def gpt() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=2048, n_positions=32, n_embd=320, n_layer=8, n_head=5, use_cache=False)
    module = GPT2LMHeadModel(config)
    ids = torch.randint(0, 2048, (64, 32))
    return module, torch.optim.AdamW(module.parameters(), 1e-3), lambda: module(input_ids=ids, labels=ids).loss


MODELS = {"ResNet-20": resnet, "GPT, 10M": gpt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=100, help="steps from one update to the next (default 100)")
    parser.add_argument("--repeats", type=int, default=2, help="updates that are timed (default 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = finished_rows(NAME)
    for model, make in MODELS.items():
        for method in METHODS:
            if any(row["model"] == model and row["method"] == method for row in rows):
                continue
            rows.append({"model": model, "method": method, **measured(make, method, arguments)})
            print(rows[-1], flush=True)
            setting = {"sparsity": 0.9, "batch": 64, "every": arguments.every, "repeats": arguments.repeats}
            write_result(NAME, TITLE, setting, rows, TEXT.format(every=arguments.every))


def measured(make: Callable[[], Any], method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Three steps from one update to the next, so that it doesn't take hours; the period is put together afterwards."""
    module, optimizer, loss = make()
    options = {**METHODS[method], "every": 3, "begin": 3}
    pruned = sc.Sparsifier(module, optimizer, method=method.partition(",")[0], sparsity=0.9, **options)
    steps, takes, ordinary, updates, usual = [], [], [], [], []
    for number in range(1, 3 * arguments.repeats + 4):
        start = time.process_time()
        optimizer.zero_grad()
        loss().backward()
        before = time.process_time()
        optimizer.step()
        middle = time.process_time()
        due = pruned.step()
        end = time.process_time()
        if number <= 3:
            continue  # warms up
        (updates if due else ordinary).append(end - middle)
        (takes if due else usual).append(middle - before)
        if not due:
            steps.append(middle - start)
    step, hold = statistics.median(steps), statistics.median(ordinary)
    # what the optimizer takes longer where its step may be taken back is the method's too
    update = statistics.median(updates) + max(statistics.median(takes) - statistics.median(usual), 0.0)
    mean = (hold * (arguments.every - 1) + update) / arguments.every
    state = pruned.state_dict()["masks"].values()
    weights = sum(mask.numel() for mask in pruned.masks.values())
    return {
        "k weights": weights / 1e3,
        "step": 1e3 * step,
        "hold": 1e3 * hold,
        "update": 1e3 * update,
        "per cent": 100 * mean / step,
        "bits at rest": 8 * sum(packed.numel() for packed in state) / weights,
    }


if __name__ == "__main__":
    main()
