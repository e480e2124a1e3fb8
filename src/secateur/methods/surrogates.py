"""Small networks that predict the score of a token from the input of the attention: their files, and what they say.

A folder holds ``config.json`` (input_dim, output_dim, n_modules, hidden_dim or null) and ``model.safetensors``
(layers.N.weight and .bias, or layers.N.0 and layers.N.2 around a GELU): the files of NVIDIA's KVzap models, so that
those can be used here, and those that ``secateur cache fit`` writes can be used there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import CorruptFileError, PlanMismatchError
from secateur.finite import all_finite
from secateur.reading import read_json
from secateur.tensorfiles import read_header

# Shapes: B sequences, T tokens, D hidden size, K key-value heads, L layers, M neurons.

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Surrogate:
    """``layers`` holds the weights and biases of every layer: [(W [K, D], b [K])] or [(W [M, D], b), (W [K, M], b)]."""

    layers: tuple[tuple[tuple[Tensor, Tensor], ...], ...]

    def scores(self, layer: int, layers: int, hidden_BTD: Tensor, heads: int) -> Tensor:
        """Scores of tokens in one of ``layers`` layers, [B, K, T] float32. Raises PlanMismatchError."""
        steps = self.layers[layer] if layers == len(self.layers) else None
        if steps is None or steps[0][0].shape[1] != hidden_BTD.shape[-1] or len(steps[-1][1]) != heads:
            raise PlanMismatchError(
                f"this surrogate is for {len(self.layers)} layers with hidden states of {self.layers[0][0][0].shape[1]}"
                f" and {len(self.layers[0][-1][1])} key-value heads, and the model has {layers}, {hidden_BTD.shape[-1]}"
                f" and {heads}: fit one with 'secateur cache fit'"
            )
        x = hidden_BTD.float()
        for number, (weight, bias) in enumerate(steps):
            x = F.gelu(x) if number else x
            x = F.linear(x, weight.to(x.device), bias.to(x.device))
        return x.mT

    def tensors(self) -> dict[str, Tensor]:
        """Everything by the names of the file."""
        names = [("",)] if len(self.layers[0]) == 1 else [("0.",), ("2.",)]
        return {
            f"layers.{n}.{names[step][0]}{kind}": tensor
            for n, steps in enumerate(self.layers)
            for step, pair in enumerate(steps)
            for kind, tensor in zip(("weight", "bias"), pair, strict=True)
        }

    def config(self) -> dict[str, int | str | None]:
        """What ``config.json`` says."""
        first, last = self.layers[0][0][0], self.layers[0][-1][0]
        return {
            "model_type": "kvzap",
            "input_dim": first.shape[1],
            "output_dim": last.shape[0],
            "hidden_dim": None if len(self.layers[0]) == 1 else first.shape[0],
            "n_modules": len(self.layers),
        }


def read_surrogate(folder: str) -> Surrogate:
    """The surrogate in a folder, in float32; read once. Raises CorruptFileError."""
    path = Path(folder)
    try:
        stamp = (path / WEIGHTS).stat().st_mtime_ns
    except OSError:
        raise CorruptFileError(
            f"{folder} holds no surrogate ({CONFIG} and {WEIGHTS}): 'secateur cache fit MODEL --out FOLDER' writes one"
        ) from None
    return _read(path, stamp)


@lru_cache(maxsize=4)
def _read(path: Path, stamp: int) -> Surrogate:
    document, stored = read_json(path / CONFIG, CorruptFileError), read_header(path / WEIGHTS)
    config: dict[str, Any] = document if isinstance(document, dict) else {}
    sizes, hidden = [config.get(name, 0) for name in ("n_modules", "input_dim", "output_dim")], config.get("hidden_dim")
    if not all(isinstance(size, int) and size > 0 for size in [*sizes, 1 if hidden is None else hidden]):
        raise CorruptFileError(f"{path / CONFIG} doesn't say how large its surrogate is")
    modules, inputs, outputs = sizes
    shapes = {"": (outputs, inputs)} if hidden is None else {"0.": (hidden, inputs), "2.": (outputs, hidden)}
    layers = []
    for n in range(modules):
        steps = []
        for name, shape in shapes.items():
            pair = [stored.get(f"layers.{n}.{name}{kind}") for kind in ("weight", "bias")]
            if any(p is None or tuple(p.shape) != s for p, s in zip(pair, (shape, shape[:1]), strict=True)):
                raise CorruptFileError(f"{path / WEIGHTS} doesn't hold the layers that {CONFIG} names: layer {n}")
            steps.append(tuple(p.read().to(torch.float32) for p in pair if p is not None))
        if not all(all_finite(tensor) for pair in steps for tensor in pair):
            raise CorruptFileError(f"{path / WEIGHTS} holds NaN or inf in layer {n}")
        layers.append(tuple(steps))
    return Surrogate(tuple(layers))
