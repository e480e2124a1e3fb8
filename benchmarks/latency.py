"""Is a network that was cut to a latency as fast as expected? On a small convolutional network, dense and cut.

python benchmarks/latency.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import write_result
from torch import Tensor, nn

import secateur as sc

TOLERANCE = 0.15

TEXT = f"""
A convolutional network of six layers and random weights, cut with `spa_l1` and `budget="latency"` to several fractions
of its measured time. `expected ms` is what the table of calls that were timed alone says, `measured ms` the median of
interleaved repeats of the dense and the cut network, taken later. `expected` and `measured` are the same as fractions
of the dense network's time, so that a machine that has become faster or slower meanwhile doesn't count. `off` is how
much more is expected than was measured; it is to stay within {TOLERANCE:.0%}. `MACs left` is the fraction of the
multiply-accumulates.
"""


class Small(nn.Sequential):
    """Six convolutions with norms, three of which halve the image; 10 classes."""

    def __init__(self, width: int = 64) -> None:
        layers: list[nn.Module] = []
        inputs = 3
        for stage in range(3):
            for stride in (2 if stage else 1, 1):
                outputs = width * 2**stage
                layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)]
                layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def compare(
    module: nn.Module, x: Tensor, sparsities: list[float], *, round_to: int, repeats: int, table: Path
) -> list[dict[str, Any]]:
    """One row per sparsity: what was expected of the cut network, and what it takes."""
    rows = []
    for sparsity in sparsities:
        result = sc.prune(
            module,
            example_inputs=(x,),
            method="spa_l1",
            sparsity=sparsity,
            budget="latency",
            options={"round_to": round_to},
            latency_table=table,
        )
        expected = next(m for m in result.report.metrics if m.name == "expected latency").values
        found = sc.evaluate([module, result.model], tasks=["macs", f"latency:repeats={repeats}"], example_inputs=(x,))
        measured, macs = found["latency"].values, found["MACs"].values
        left, of_dense = (values["pruned"] / values["dense"] for values in (expected, measured))
        rows.append(
            {
                "sparsity": sparsity,
                "dense ms": measured["dense"],
                "expected ms": expected["pruned"],
                "measured ms": measured["pruned"],
                "expected": left,
                "measured": of_dense,
                "off": left / of_dense - 1,
                "within": abs(left / of_dense - 1) <= TOLERANCE,
                "MACs left": macs["pruned"] / macs["dense"],
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--round-to", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--name", default="latency", help="of the result in docs/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    module, x = Small().eval(), torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(
            module,
            x,
            arguments.sparsities,
            round_to=arguments.round_to,
            repeats=arguments.repeats,
            table=Path(folder) / "table.json",
        )
    setting = {
        "model": "six 3x3 convolutions of 64, 64, 128, 128, 256, 256 channels, random weights",
        "seed": 0,
        "data": "random images",
        "inputs": "x".join(map(str, x.shape)),
        "round_to": arguments.round_to,
        "repeats": arguments.repeats,
        "tolerance": TOLERANCE,
    }
    write_result(arguments.name, "Expected and measured latency", setting, rows, TEXT)


if __name__ == "__main__":
    main()
