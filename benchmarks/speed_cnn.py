"""How much faster a cut convolutional network is, in torch and in onnxruntime.

python benchmarks/speed_cnn.py

Needs torchvision, onnx, onnxscript and onnxruntime beside secateur. torch runs eagerly, without torch.compile.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from common import write_result
from torch import Tensor, nn

import secateur as sc

TEXT = """
A network with random weights, dense and cut with `spa_l1`, run eagerly in torch and, exported by torch's own exporter,
in onnxruntime. Times are medians of repeats that take turns over all four; `peak MB` are the live tensors of one call
in torch, weights and activations.
"""


def measure(
    module: nn.Module, x: Tensor, *, sparsity: float, budget: str, round_to: int, repeats: int, folder: Path
) -> list[dict[str, Any]]:
    """One row for torch and one for onnxruntime."""
    result = sc.prune(
        module,
        example_inputs=(x,),
        method="spa_l1",
        sparsity=sparsity,
        budget=budget,
        options={"round_to": round_to},
    )
    models: dict[str, Any] = {"torch dense": module, "torch cut": result.model}
    weights = sc.evaluate(models, tasks=["size", "macs"], example_inputs=(x,))
    for name, model in list(models.items()):
        models[name.replace("torch", "onnxruntime")] = folder / f"{name.split()[1]}.onnx"
        torch.onnx.export(model, (x,), folder / f"{name.split()[1]}.onnx", dynamo=True, verbose=False)
    latency = sc.evaluate(models, tasks=f"latency:repeats={repeats}", example_inputs=(x,))["latency"].values
    rows = []
    for runtime in ("torch", "onnxruntime"):
        dense, cut = latency[f"{runtime} dense"], latency[f"{runtime} cut"]
        row = {"runtime": runtime, "round_to": round_to, "dense ms": dense, "cut ms": cut, "times faster": dense / cut}
        for name, label, scale in (("MACs", "GMACs", 1e9), ("parameters", "M parameters", 1e6)):
            row |= {f"{label} {kind}": weights[name].values[f"torch {kind}"] / scale for kind in ("dense", "cut")}
        if runtime == "torch":
            row |= {f"peak MB {k}": weights["peak memory"].values[f"torch {k}"] / 1e6 for k in ("dense", "cut")}
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="resnet50", help="a classifier of torchvision.models")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--budget", default="macs", choices=("params", "macs", "bytes", "channels", "latency"))
    parser.add_argument("--round-to", type=int, nargs="+", default=[8])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--name", default="speed-cnn", help="of the result in docs/results")
    arguments = parser.parse_args()
    import torchvision

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    module = torchvision.models.get_model(arguments.model, weights=None).eval()
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    rows: list[dict[str, Any]] = []
    for round_to in arguments.round_to:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(
                module,
                x,
                sparsity=arguments.sparsity,
                budget=arguments.budget,
                round_to=round_to,
                repeats=arguments.repeats,
                folder=Path(folder),
            )
    setting = {
        "model": f"torchvision {arguments.model}, random weights",
        "seed": 0,
        "data": "random images",
        "inputs": "x".join(map(str, x.shape)),
        "removed": f"{arguments.sparsity:.0%} of the {arguments.budget}, spa_l1",
        "repeats": arguments.repeats,
        "torch": "eager, without torch.compile",
        "runtimes": {name: metadata.version(name) for name in ("torchvision", "onnxruntime")},
    }
    write_result(arguments.name, "Speed of a cut convolutional network", setting, rows, TEXT)


if __name__ == "__main__":
    main()
