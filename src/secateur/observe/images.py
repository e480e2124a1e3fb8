"""Labelled images as batches for a classifier: resized, cropped, scaled and normalised as ImageNet models expect.

    x = (pixel / 255 - mean) / std          mean and std per channel

The shorter side of a picture is brought to size / crop (256 for 224) by bilinear interpolation with antialiasing, and
the centre is cut out; a picture that has the size already stays as it is. Arrays of bytes are divided by 255, arrays of
floating-point numbers are taken as they are.

Source: A. Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", NIPS 2012, for resize
and centre crop; mean, std and 224/256 are those with which torchvision's models are evaluated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import DataError, UsageError, nearest
from secateur.observe.imagefiles import Rows, Where, decoded, open_rows
from secateur.remote import expanded

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# what the shorter side is to the crop: 224 pixels of 256
CROP = 0.875


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the input of a network. ``size`` is (height, width) in pixels, or None: as it comes."""

    size: tuple[int, int] | None = None
    crop: float = CROP
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    channels: int = 3

    def __call__(self, image: np.ndarray[Any, Any], where: str) -> Tensor:
        """[channels, height, width] float32. Raises DataError."""
        x_CHW = self._scaled(image, where)
        if self.size is not None and tuple(x_CHW.shape[1:]) != self.size:
            x_CHW = self._fitted(x_CHW)
        mean, std = (
            self._per_channel(values, name, x_CHW) for name, values in (("mean", self.mean), ("std", self.std))
        )
        return (x_CHW - mean) / std

    def _scaled(self, image: np.ndarray[Any, Any], where: str) -> Tensor:
        if image.dtype.kind not in "fiu":
            raise DataError(f"the image in {where} must be uint8 (0 to 255) or floating-point, got {image.dtype}")
        x = torch.from_numpy(np.ascontiguousarray(image, dtype=image.dtype.newbyteorder("=")))
        if x.dim() == 2:
            x = x[None]
        elif x.dim() == 3 and x.shape[-1] in (1, 3, 4) and x.shape[0] not in (1, 3):
            x = x.permute(2, 0, 1)
        if x.dim() != 3:
            raise DataError(f"the image in {where} must have 2 or 3 dimensions, got {list(image.shape)}")
        if x.dtype == torch.uint8:
            return x.float() / 255
        if not x.is_floating_point():
            raise DataError(f"the image in {where} must be uint8 (0 to 255) or floating-point, got {image.dtype}")
        return x.float()

    def _fitted(self, x_CHW: Tensor) -> Tensor:
        assert self.size is not None
        height, width = x_CHW.shape[1:]
        target = [int(n / self.crop) for n in self.size]
        # the side that fits exactly is the shorter one; the other is rounded down, as torchvision does
        scale = max(target[0] / height, target[1] / width)
        shape = [max(n, int(side * scale + 1e-6)) for n, side in zip(target, (height, width), strict=True)]
        x_CHW = F.interpolate(x_CHW[None], shape, mode="bilinear", align_corners=False, antialias=True)[0]
        top, left = (round((n - m) / 2) for n, m in zip(shape, self.size, strict=True))
        return x_CHW[:, top : top + self.size[0], left : left + self.size[1]]

    def _per_channel(self, values: tuple[float, ...], name: str, x_CHW: Tensor) -> Tensor:
        if len(values) not in (1, len(x_CHW)):
            raise DataError(
                f"images have {len(x_CHW)} channel(s) and {name} {len(values)} numbers: say ?mean=M&std=S with one"
                " number per channel (mean=0&std=1 leaves pixels between 0 and 1)"
            )
        return torch.tensor(values)[:, None, None]

    def __str__(self) -> str:
        shape = "as they come"
        if self.size is not None:
            shape = f"{self.size[0]}x{self.size[1]}, centre {self.crop:g} of the resized image"
        mean, std = (", ".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        return f"{shape}; mean {mean}; std {std}"


@dataclass(frozen=True)
class Images:
    """Batches (x [images, channels, height, width] float32, y [images] int64) of a source; can be read many times.

    Usable wherever batches are asked for, as in ``data=`` of ``secateur.prune``. ``count`` is the number of images, or
    None where it isn't known before all are read; ``seed`` draws ``limit`` of them.
    """

    name: str
    rows: Rows
    prepare: Preprocessing
    batch: int = 64
    limit: int | None = None
    seed: int = 0

    @property
    def count(self) -> int | None:
        """How many images the batches hold."""
        if self.rows.count is None:
            return self.limit
        return self.rows.count if self.limit is None else min(self.limit, self.rows.count)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Raises DataError for a picture that can't be read, a label that is no class index, or mixed sizes."""
        x: list[Tensor] = []
        y: list[int] = []
        for cell, label, where in self._chosen():
            where = f"{where} of {self.name}"
            x.append(self.prepare(decoded(cell, self.prepare.channels, where), where))
            y.append(_class_index(label, where))
            if x[-1].shape != x[0].shape:
                raise DataError(f"images of {self.name} have several sizes: say which one with ?size=224")
            if len(x) == self.batch:
                yield torch.stack(x), torch.tensor(y)
                x, y = [], []
        if x:
            yield torch.stack(x), torch.tensor(y)

    def _chosen(self) -> Iterator[tuple[Any, Any, str]]:
        if self.limit is None:
            yield from self.rows.take(None)
        elif self.rows.count is not None:
            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.randperm(self.rows.count, generator=generator)[: self.limit]
            yield from self.rows.take(drawn.sort().values.tolist())
        else:
            rows = self.rows.shuffle(self.seed) if self.rows.shuffle else self.rows
            for number, row in enumerate(rows.take(None), start=1):
                yield row
                if number == self.limit:
                    return

    def protocol(self, seen: int) -> str:
        """How the images were chosen and prepared; ``seen`` of them were."""
        of_all = f" of {self.rows.count}" if self.rows.count is not None and self.limit is not None else ""
        drawn = f"{seen}{of_all} images" + (f" drawn with seed {self.seed}" if self.limit is not None else "")
        split = [f"split {self.rows.split}"] if self.rows.split else []
        return "; ".join([self.name, *split, drawn, str(self.prepare), f"batch {self.batch}"])


def _class_index(label: Any, where: str) -> int:
    index = label.item() if isinstance(label, np.generic) else label
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise DataError(f"the label in {where} must be a class index from 0, got {label!r}")
    return index


@dataclass(frozen=True)
class ImageSource:
    """``SOURCE?split=test&size=224&limit=1000``: what is read, how it is prepared, and how many at a time.

    ``size`` is that of the example inputs where it isn't given, and of the arrays themselves where there are none.
    """

    source: str
    where: Where = field(default_factory=Where)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, what: str) -> ImageSource:
        """From the text; ``what`` names it in errors. Raises UsageError."""
        source, _, query = text.partition("?")
        if not source:
            raise UsageError(f"{what} needs images: {what}:FOLDER, {what}:FILE.npz or the name of a data set")
        given = [_setting(what, part) for part in query.split("&") if part]
        places = [f.name for f in dataclasses.fields(Where)]
        where = Where(**{key: value for key, value in given if key in places})
        return cls(source, where, {key: value for key, value in given if key not in places})

    @property
    def name(self) -> str:
        """The source without the folders of this machine."""
        return Path(self.source).name if expanded(self.source).exists() else self.source

    def open(self, example: tuple[int, ...] | None = None, seed: int = 0) -> Images:
        """The images, for inputs like ``example`` [images, channels, height, width]. Raises DataError."""
        settings = dict(self.settings)
        batch, limit = settings.pop("batch", 64), settings.pop("limit", None)
        if example is not None and len(example) == 4:
            settings = {"channels": example[1], "size": (example[2], example[3]), **settings}
        elif self.source.startswith("sklearn:"):
            settings = {"mean": (0.0,), "std": (1.0,), **settings}
        elif not self.source.endswith(".npz"):
            settings.setdefault("size", (224, 224))
        rows = open_rows(self.source, self.where)
        return Images(self.name, rows, Preprocessing(**settings), batch, limit, seed)


def _setting(what: str, part: str) -> tuple[str, Any]:
    key, _, value = part.partition("=")
    places = [f.name for f in dataclasses.fields(Where)]
    known = [*places, *_READ]
    if key not in known:
        raise UsageError(f"{what} has no setting '{key}'{nearest(key, known)} (it has {', '.join(known)})")
    if key in places:
        return key, value
    read, right = _READ[key]
    try:
        return key, read(value)
    except ValueError:
        raise UsageError(f"{what}: {key} must be {right}, got {value!r}") from None


def _whole(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def _pixels(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return _whole(height), _whole(width or height)


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise ValueError(text)
    return float(text)


def _numbers(text: str) -> tuple[float, ...]:
    found = tuple(map(float, text.split(",")))
    if not np.isfinite(found).all():
        raise ValueError(text)
    return found


def _deviations(text: str) -> tuple[float, ...]:
    found = _numbers(text)
    if min(found) <= 0:
        raise ValueError(text)
    return found


_READ: dict[str, tuple[Any, str]] = {
    "size": (_pixels, "pixels, as in 224 or 224x320"),
    "crop": (_share, "the fraction of the resized image that is kept, in (0, 1]"),
    "mean": (_numbers, "numbers, one per channel, as in 0.5,0.5,0.5"),
    "std": (_deviations, "positive numbers, one per channel, as in 0.5,0.5,0.5"),
    "batch": (_whole, "a whole number of at least 1"),
    "limit": (_whole, "a whole number of at least 1"),
}
