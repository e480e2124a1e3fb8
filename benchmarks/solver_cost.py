"""What second-order solvers cost beside SparseGPT's sweep, and how quickly Gram matrices are summed.

    python benchmarks/solver_cost.py --calibration VALID.txt

Solvers get the real inputs and weights of one block of a model in the middle of its depth, all its matrices, and take
turns; the matrices of a block that read one input share its factorisation, as they do in a run. Gram matrices are
summed over random inputs of the widths that the model has, and of wider ones, beside a product of two square matrices.
Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import write_result
from torch import Tensor

import secateur as sc
from secateur.methods import Target, WeightMethod, get_method
from secateur.observe import Gram
from secateur.observe.calibration import load_tokens

REFERENCE, SOLVERS = "sparsegpt", ("sparsegpt", "admm", "alps")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

TEXT = """
`solver`: seconds that all matrices of one block take once their inputs have been seen (median), and how many times as
long as SparseGPT's sweep that is (median of the ratios within a repeat). Every step of `admm` and `alps` is a product
as large as the whole sweep. Forwards and statistics, which all of them need, come on top in a run: in whole plans with
64 windows, on SmolLM2-135M and Gemma 3 270M and at 50, 60, 70 % and 2:4, ADMM takes 1.1 to 1.3 times as much processor
time as SparseGPT, and ALPS 1.7 to 3.0 times ([one](second-order-smollm2-135m.md),
[the other](second-order-gemma3-270m.md)).
`gram`: speed of adding X^T X of 2,048 tokens to a Gram matrix, in GFLOP/s of the whole product, and the `ratio` to the
speed of the product of two float32 squares of 2,048. By symmetry only blocks on and above the diagonal are computed,
so that more than 1 is possible. bfloat16 inputs are multiplied as bfloat16, which is exact, with float32 sums, where
the machine has such products, and as float32 elsewhere. `error` is that of the sum, relative to its largest entry.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True, help="text file")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    model, tokenizer = sc.load(arguments.model)
    model = model.float()
    rows = [*solvers(arguments, model, tokenizer), *grams(arguments, model)]
    setting = {
        "model": arguments.model,
        "calibration": f"{Path(arguments.calibration).name}, {arguments.samples} consecutive windows of 512 tokens",
        "block": _middle(model),
        "sparsity": arguments.sparsity,
        "repeats": arguments.repeats,
    }
    name = f"solver-cost-{Path(arguments.model).name}"
    write_result(name, "What second-order solvers cost", setting, rows, TEXT)


def _middle(model: Any) -> int:
    return model.config.num_hidden_layers // 2


def solvers(arguments: argparse.Namespace, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Seconds of every solver on one block."""
    tokens = load_tokens(arguments.calibration, tokenizer, samples=arguments.samples, length=512, seed=0)
    targets, seen = _block(model, tokens.ids)
    methods = {name: get_method(name)(sparsity=arguments.sparsity) for name in SOLVERS}
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(arguments.repeats + 1):
        for name, method in methods.items():
            seconds = _solve(method, targets, seen)
            if repeat:  # the first one warms up
                taken[name].append(seconds)
                print(name, f"{seconds:.2f} s", flush=True)
    rows = []
    for name, seconds in taken.items():
        ratios = [one / other for one, other in zip(seconds, taken[REFERENCE], strict=True)]
        row: dict[str, Any] = {"what": "solver", "name": name, "seconds": statistics.median(seconds)}
        rows.append(row | {"ratio": statistics.median(ratios)})
    return rows


def _block(model: Any, ids_NT: Tensor) -> tuple[list[Target], dict[str, Gram]]:
    """The matrices of the middle block, and a Gram matrix for each; those that read the same input share one."""
    layer = _middle(model)
    matrices = [m for m in sc.anatomy(model).matrices if m.layer == layer]
    targets = [
        Target(m.module, "weight", layer, model.get_submodule(m.module).weight.detach().float()) for m in matrices
    ]
    seen: dict[str, Gram] = {}
    # held while a batch runs, so that no other tensor can be taken for one of them
    inputs: list[tuple[Tensor, Gram]] = []

    def hook(name: str) -> Callable[..., None]:
        def update(module: Any, args: tuple[Tensor, ...]) -> None:
            known = next((gram for x, gram in inputs if x is args[0]), None)
            if known is None:
                inputs.append((args[0], seen.setdefault(name, Gram())))
                seen[name].update(args[0])
            else:
                seen[name] = known

        return update

    hooks = [model.get_submodule(t.name).register_forward_pre_hook(hook(t.name)) for t in targets]
    with torch.no_grad():
        for start in range(0, len(ids_NT), 4):
            inputs.clear()
            model(ids_NT[start : start + 4])
    for one in hooks:
        one.remove()
    return targets, seen


def _solve(method: WeightMethod, targets: list[Target], seen: dict[str, Gram]) -> float:
    for gram in seen.values():
        gram._cache.clear()
    started = time.perf_counter()
    for target in targets:
        method.prune(target, {"gram": seen[target.name]})
    return time.perf_counter() - started


def grams(arguments: argparse.Namespace, model: Any) -> list[dict[str, Any]]:
    """Speed of summing Gram matrices."""
    square = torch.randn(2048, 2048)
    widths = sorted({model.config.hidden_size, model.config.intermediate_size, 4096})
    kinds = [(width, dtype) for width in widths for dtype in DTYPES]
    taken: dict[tuple[int, str], list[float]] = {kind: [] for kind in kinds}
    errors = {}
    for repeat in range(arguments.repeats + 1):
        for width, dtype in kinds:
            torch.manual_seed(repeat)
            x_BTC = torch.randn(4, 512, width).to(DTYPES[dtype])
            gram = Gram()
            gram.update(x_BTC)
            own = 2 * 2048 * width**2 / _seconds(lambda gram=gram, x=x_BTC: gram.update(x))
            product = 2 * 2048**3 / _seconds(lambda: square @ square)
            if repeat:
                taken[width, dtype].append(own / product)
                errors[width, dtype] = (own, _error(x_BTC))
    return [
        {
            "what": "gram",
            "name": f"{width} inputs, {dtype}",
            "GFLOP/s": errors[width, dtype][0] / 1e9,
            "ratio": statistics.median(ratios),
            "error": f"{errors[width, dtype][1]:.0e}",
        }
        for (width, dtype), ratios in taken.items()
    ]


def _seconds(call: Callable[[], Any], times: int = 5) -> float:
    started = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - started) / times


def _error(x_BTC: Tensor) -> float:
    gram = Gram()
    gram.update(x_BTC)
    x = x_BTC.flatten(0, 1).double()
    exact = x.T @ x
    return float((gram.total_CC.double() - exact).abs().max() / exact.abs().max())


if __name__ == "__main__":
    main()
