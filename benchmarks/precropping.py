"""Does a network pruned before training need its mask, or only the densities of its layers?

    python benchmarks/precropping.py --cifar cifar10_train.parquet

needs scikit-learn (digits) and, for images in a parquet file, pyarrow and pillow; without ``--cifar`` that part is
left out. Everything runs on one thread. Rows are kept as they come, so a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import finished_rows, write_result
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.allocate import global_masks, uniform
from secateur.networks.applying import module_anatomy
from secateur.networks.example import Example
from secateur.observe.flow import synaptic_flow
from secateur.structure.layers import Layer, layers_of

NAME, TITLE = "precropping", "Pruning before training: masks, densities, widths"
SEEDS = (0, 1, 2)
ROUNDS = 100

TEXT = """
Each network is pruned before training to the same number of parameters in several ways, and trained:

- SynFlow mask: the weights that SynFlow keeps in 100 rounds, held by a mask.
- shuffled: as many weights per layer, drawn at random. scaled: and multiplied by 1/sqrt(density).
- cropped: `precrop` with SynFlow's densities: a dense, narrower network. cropped, synexp: with the closed form instead.
- same channels: shuffled, but only among the inputs and outputs of each layer that SynFlow's mask has left.
- uniform width: every group loses the same share of its channels. random mask: the same density in every layer.

Accuracies are in percent, mean and standard deviation over the seeds; `parameters` counts what stays, with norms and
biases. A seed decides the start, the mask or the new draw, and the order of the data. Channels of the ResNet's residual
connections are cropped too.

The claim is that only the densities of layers count. On digits it holds: SynFlow's mask, the shuffled mask and the
cropped network lie within a point of each other. Only the random mask falls behind, at 5 %, and it is the least stable.
That cropping by densities beats uniform width doesn't show there.

On CIFAR-10, trained for 2.5 epochs, it holds for networks that use as many channels. Cropped networks come within 2
points of SynFlow's mask and are ahead of uniform width by a point, which is no more than the seeds differ by. The
shuffled mask is ahead of both by 2 to 3 points at equal densities; at 20 % so is the random mask, which is the worst at
5 %. The reason is width: `channels used` are those that have any weight (the outputs of all layers, counted layer by
layer). SynFlow's mask leaves channels without a weight, half of them at 5 %, and a cropped network has as few or fewer;
a shuffled mask uses nearly all. `shuffled, same channels` draws the mask anew among the inputs and outputs that
SynFlow's has left, and falls back to the level of SynFlow's mask at both densities. So it doesn't matter which weights
are kept there either, but densities of layers aren't all that counts: it also matters over how many channels they are
spread. Longer training closes the gap: after 12.8 epochs, at 5 %, SynFlow's mask, the one drawn anew among the same
channels and the cropped network are level at 51 %, the shuffled mask is 1.4 points above them, hardly more than the
seeds differ by, and uniform width 1.5 below.

That widths from densities beat uniform width is not shown, on digits or on pictures: 51.2 ± 1.4 and 49.7 ± 1.5 can't be
told apart with three seeds. Widths by `preconfig`, which may also grow, are not measured.

Without norms the claim fails for masks: a shuffled mask doesn't train at all, where SynFlow's does. Scaled weights
bring it to the level of SynFlow's mask. Cropped layers are drawn at the scale of their width and don't have that
problem.
"""


class Convolutions(nn.Module):
    """Convolutions with norms, the second with a stride of 2; mean over positions; a linear head."""

    def __init__(self, inputs: int = 1, widths: tuple[int, ...] = (32, 64, 64, 64)) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for number, (before, width) in enumerate(zip((inputs, *widths), widths, strict=False)):
            conv = nn.Conv2d(before, width, 3, stride=2 if number == 1 else 1, padding=1, bias=False)
            parts += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        self.body, self.head = nn.Sequential(*parts), nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(dim=(2, 3)))


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut = None if stride == 1 else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + (x if self.shortcut is None else self.shortcut(x))).relu()


class ResNet(nn.Module):
    """Stages of 16, 32 and 64 channels with one block each, after a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.stages = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean(dim=(2, 3)))


def perceptron() -> nn.Module:
    """Four linear layers without norms."""
    sizes = (64, 256, 128, 128, 10)
    parts: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        parts += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


@dataclass(frozen=True)
class Data:
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    mirrored: bool = False


@dataclass(frozen=True)
class Setting:
    """One network on one set of data, and how it is trained."""

    name: str
    network: Callable[[], nn.Module]
    data: Callable[[], Data]
    steps: int
    rate: float
    densities: tuple[float, ...]
    variants: tuple[str, ...]
    momentum: float = 0.9
    cosine: bool = True
    batch: int = 64
    options: tuple[tuple[str, Any], ...] = ()


def digits() -> Data:
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return _split(torch.from_numpy(loaded.images / 16).float()[:, None], torch.from_numpy(loaded.target), 360)


def _split(x: Tensor, y: Tensor, tests: int) -> Data:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order].long()
    return Data((x[tests:], y[tests:]), (x[:tests], y[:tests]))


def cifar(path: Path, train: int, tests: int) -> Data:
    """The first images of a file at half their size, of which ``tests`` are held back."""
    import pyarrow.parquet
    from PIL import Image

    table = pyarrow.parquet.read_table(path).slice(0, train + tests)
    images = [np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in table["image"].to_pylist()]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    x = F.avg_pool2d(x, 2)
    x = (x - x.mean(dim=(0, 2, 3), keepdim=True)) / x.std(dim=(0, 2, 3), keepdim=True)
    return replace(_split(x, torch.tensor(table["label"].to_pylist()), tests), mirrored=True)


# -- ways to prune: (network, masks held while it is trained) ----------------------------------------------------------

Masks = dict[str, Tensor]


@dataclass(frozen=True)
class Asked:
    """What a variant starts from."""

    setting: Setting
    network: nn.Module
    x: Tensor
    density: float
    seed: int

    def layers(self) -> list[Layer]:
        return layers_of(module_anatomy(self.network, Example((self.x,))))

    def synflow(self) -> Masks:
        weights = dict(self.network.named_parameters())

        def scores(masks: Masks) -> dict[str, Tensor]:
            return synaptic_flow(self.network, (self.x,), {}, {n: weights[n] * mask for n, mask in masks.items()})

        return global_masks(scores, {layer.tensor: layer.shape for layer in self.layers()}, self.density, ROUNDS)

    def sparsity(self) -> float:
        """What a narrower network must lose to have as many parameters as a masked one, norms and biases included."""
        total = sum(p.numel() for p in self.network.parameters())
        weights = sum(layer.weights for layer in self.layers())
        return (1 - self.density) * weights / total


def dense(asked: Asked) -> tuple[nn.Module, Masks]:
    return asked.network, {}


def synflow(asked: Asked) -> tuple[nn.Module, Masks]:
    return asked.network, asked.synflow()


def shuffled(asked: Asked) -> tuple[nn.Module, Masks]:
    return asked.network, _random({name: int(mask.sum()) for name, mask in asked.synflow().items()}, asked)


def same_channels(asked: Asked) -> tuple[nn.Module, Masks]:
    """Shuffled among the inputs and outputs of each layer that SynFlow's mask has left."""
    masks = asked.synflow()
    left = {name: _touched(mask, 0)[:, None] & _touched(mask, 1) for name, mask in masks.items()}
    places = {
        name: left[name].reshape(*left[name].shape, *[1] * (mask.dim() - 2)).expand_as(mask)
        for name, mask in masks.items()
    }
    return asked.network, _random({name: int(mask.sum()) for name, mask in masks.items()}, asked, places)


def _touched(mask: Tensor, dim: int) -> Tensor:
    """Which positions along a dimension have any weight left."""
    return mask.movedim(dim, 0).flatten(1).any(dim=1)


def scaled(asked: Asked) -> tuple[nn.Module, Masks]:
    """Shuffled, with the scale that the layers had when they were dense."""
    network, masks = shuffled(asked)
    with torch.no_grad():
        for name, mask in masks.items():
            network.get_parameter(name).mul_(mask.float().mean().rsqrt())
    return network, masks


def random(asked: Asked) -> tuple[nn.Module, Masks]:
    layers = asked.layers()
    shares = uniform([layer.shape for layer in layers], asked.density)
    counts = {layer.tensor: round(share * layer.weights) for layer, share in zip(layers, shares, strict=True)}
    return asked.network, _random(counts, asked)


def _random(counts: dict[str, int], asked: Asked, places: Masks | None = None) -> Masks:
    """Masks with so many weights, anywhere or in ``places``."""
    generator = torch.Generator().manual_seed(asked.seed)
    masks = {}
    for name, count in counts.items():
        shape = asked.network.get_parameter(name).shape
        allowed = torch.ones(shape, dtype=torch.bool) if places is None else places[name]
        where = allowed.flatten().nonzero().flatten()
        flat = torch.zeros(shape.numel(), dtype=torch.bool)
        flat[where[torch.randperm(len(where), generator=generator)[:count]]] = True
        masks[name] = flat.reshape(shape)
    return masks


def cropped(asked: Asked) -> tuple[nn.Module, Masks]:
    return _cropped(asked, densities="synflow", rounds=ROUNDS), {}


def closed_form(asked: Asked) -> tuple[nn.Module, Masks]:
    return _cropped(asked, densities="synexp"), {}


def _cropped(asked: Asked, **options: Any) -> nn.Module:
    options |= dict(asked.setting.options)
    result = sc.prune(
        asked.network,
        example_inputs=(asked.x,),
        method="precrop",
        sparsity=asked.sparsity(),
        seed=asked.seed,
        options=options,
    )
    assert not result.report.notes
    return result.model


def uniform_width(asked: Asked) -> tuple[nn.Module, Masks]:
    result = sc.prune(
        asked.network,
        example_inputs=(asked.x,),
        method="random_channels",
        sparsity=asked.sparsity(),
        seed=asked.seed,
        options={"scope": "uniform"},
    )
    torch.manual_seed(asked.seed)
    for part in result.model.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            part.reset_parameters()
    return result.model, {}


VARIANTS: dict[str, Callable[[Asked], tuple[nn.Module, Masks]]] = {
    "dense": dense,
    "SynFlow mask": synflow,
    "shuffled": shuffled,
    "shuffled, same channels": same_channels,
    "shuffled, scaled": scaled,
    "cropped": cropped,
    "cropped, synexp": closed_form,
    "uniform width": uniform_width,
    "random mask": random,
}

# -- training ----------------------------------------------------------------------------------------------------------


def accuracy(network: nn.Module, masks: Masks, data: Data, setting: Setting, seed: int) -> float:
    """Percent right on the test part after training; masked weights are zero throughout."""
    held = [(network.get_parameter(name), mask) for name, mask in masks.items()]
    optimizer = torch.optim.SGD(network.parameters(), lr=setting.rate, momentum=setting.momentum)
    generator = torch.Generator().manual_seed(seed)
    network.train()
    for step, (x, y) in zip(range(setting.steps), _batches(data, setting.batch, generator), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = setting.rate * (0.5 * (1 + math.cos(math.pi * step / setting.steps)) if setting.cosine else 1)
        with torch.no_grad():
            for weight, mask in held:
                weight.mul_(mask)
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for weight, mask in held:
            weight.mul_(mask)
        network.eval()
        right = [(network(x).argmax(dim=1) == y).sum() for x, y in zip(*(t.split(500) for t in data.test), strict=True)]
    return 100 * int(sum(right)) / len(data.test[1])


def _batches(data: Data, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    x, y = data.train
    while True:
        for chosen in torch.randperm(len(x), generator=generator).split(size)[: len(x) // size]:
            images = x[chosen]
            if data.mirrored:
                turn = torch.rand(len(images), generator=generator) < 0.5
                images = torch.where(turn[:, None, None, None], images.flip(-1), images)
            yield images, y[chosen]


def pruned(setting: Setting, data: Data, density: float, variant: str, seed: int) -> tuple[nn.Module, Masks]:
    torch.manual_seed(seed)
    return VARIANTS[variant](Asked(setting, setting.network(), data.train[0][:1], density, seed))


def channels_used(network: nn.Module, masks: Masks, setting: Setting) -> float:
    """Percent of the outputs of all layers of the dense network that have any weight."""
    used, whole = (
        {name: p for name, p in module.named_parameters() if p.dim() > 1} for module in (network, setting.network())
    )
    left = sum(int(_touched(masks[name], 0).sum()) if name in masks else len(p) for name, p in used.items())
    return 100 * left / sum(map(len, whole.values()))


def row(setting: Setting, data: Data, density: float, variant: str) -> dict[str, Any]:
    found, parameters, used = [], [], []
    for seed in SEEDS:
        network, masks = pruned(setting, data, density, variant, seed)
        gone = sum(int((~mask).sum()) for mask in masks.values())
        parameters.append(sum(p.numel() for p in network.parameters()) - gone)
        used.append(channels_used(network, masks, setting))
        found.append(accuracy(network, masks, data, setting, seed))
    return {
        "network": setting.name,
        "weights kept": _kept(density),
        "pruned by": variant,
        "accuracy": f"{np.mean(found):.1f} ± {np.std(found, ddof=1):.1f}",
        "parameters": f"{np.mean(parameters):,.0f}",
        "channels used %": round(float(np.mean(used)), 1),
        "seeds": " ".join(f"{a:.1f}" for a in found),
    }


def settings(cifar_path: Path | None) -> list[Setting]:
    compared = ("SynFlow mask", "shuffled", "cropped", "cropped, synexp", "uniform width", "random mask")
    found = [
        Setting("CNN, digits", Convolutions, digits, 400, 0.05, (0.2, 0.1, 0.05), compared),
        Setting(
            "MLP without norms, digits",
            perceptron,
            digits,
            1500,
            0.1,
            (0.05, 0.02),
            ("SynFlow mask", "shuffled", "shuffled, scaled", "cropped", "uniform width"),
            momentum=0.0,
            cosine=False,
        ),
    ]
    if cifar_path is not None:
        residual = Setting(
            "ResNet, CIFAR-10",
            ResNet,
            lambda: cifar(cifar_path, train=10_000, tests=2_000),
            400,
            0.1,
            (0.2, 0.05),
            (*compared[:2], "shuffled, same channels", *compared[2:]),
            options=(("crop_residual", True),),
        )
        # only what the claim names, and what explained where it fails
        few = ("SynFlow mask", "shuffled", "shuffled, same channels", "cropped", "uniform width")
        longer = replace(residual, name="ResNet, CIFAR-10, longer", steps=2000, densities=(0.05,), variants=few)
        found += [residual, longer]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", type=Path, help="parquet file with images and labels")
    given = parser.parse_args()
    torch.set_num_threads(1)
    about = {
        "model": "as the rows say; convolutions of 32, 64, 64, 64 channels; residual stages of 16, 32, 64 channels",
        "data": "load_digits of scikit-learn, 360 of 1797 held back; the first 12,000 training images of CIFAR-10"
        " averaged to 16x16 pixels, 2,000 of them held back, mirrored at random",
        "training": "SGD, batches of 64; digits CNN 400 steps at 0.05 and CIFAR-10 400, or 2,000 where it says longer,"
        " at 0.1, momentum 0.9, cosine; MLP 1500 steps at 0.1",
        "seeds": " ".join(map(str, SEEDS)),
        "threads": 1,
    }
    rows = {_key(row): row for row in finished_rows(NAME)}
    for setting in settings(given.cifar):
        data = setting.data()
        cases = [(1.0, "dense"), *((d, v) for d in setting.densities for v in setting.variants)]
        for density, variant in cases:
            key = (setting.name, _kept(density), variant)
            # in the order of the settings, also where some of them were measured later
            rows[key] = rows.pop(key, None) or _printed(row(setting, data, density, variant))
            write_result(NAME, TITLE, about, list(rows.values()), TEXT)


def _printed(row: dict[str, Any]) -> dict[str, Any]:
    print(row, flush=True)
    return row


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["network"], row["weights kept"], row["pruned by"]


def _kept(density: float) -> str:
    return "all" if density == 1 else f"{density:.0%}"


if __name__ == "__main__":
    main()
