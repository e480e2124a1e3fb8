"""Where labelled images come from: folders, arrays, parquet files, and the libraries ``datasets`` and ``torchvision``.

Nothing is decoded before its turn comes, and only rows that are wanted are read.
"""

from __future__ import annotations

import inspect
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from secateur.errors import DataError, UsageError, first_line, nearest, require_extra
from secateur.remote import expanded

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
IMAGE_COLUMNS = ("image", "img", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "cls")
SPLITS = ("test", "validation", "val", "valid", "train")
"""In the order in which one is taken when none is named."""

_DIGITS_TO_TRAIN = 1000

Row = tuple[Any, Any, str]
"""What holds an image, what holds its label, and where it stands, for messages."""


@dataclass(frozen=True)
class Where:
    """Which part of a source is read: a split, the columns of a table, the folder of a torchvision data set."""

    split: str | None = None
    image: str | None = None
    label: str | None = None
    root: str | None = None


@dataclass(frozen=True)
class Rows:
    """Labelled images that are not decoded yet.

    ``count`` is None where it isn't known before everything was read. ``take`` gives the rows of ascending numbers, or
    with None all of them; ``shuffle(seed)`` is for sources without numbers. ``split`` is what was read.
    """

    count: int | None
    take: Callable[[Sequence[int] | None], Iterator[Row]]
    split: str = ""
    shuffle: Callable[[int], Rows] | None = None


def open_rows(source: str, where: Where) -> Rows:
    """The rows of a source: folder, ``.npz``, ``.parquet``, ``torchvision:CLASS``, ``sklearn:digits`` or a data set.

    Raises UsageError, DataError or MissingExtraError.
    """
    path = expanded(source)
    if source.startswith("torchvision:"):
        return _torchvision(source.removeprefix("torchvision:"), where)
    if source.startswith("sklearn:"):
        return _sklearn(source.removeprefix("sklearn:"), where)
    if path.suffix == ".npz":
        return _arrays(path, where)
    if path.suffix == ".parquet":
        return _parquet([path], where)
    if path.is_dir():
        return _folder(path, where)
    if (
        path.exists()
        or source.startswith((".", "/", "~"))
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source)
    ):
        said = "is no folder, .npz or .parquet file" if path.exists() else "does not exist"
        raise DataError(f"{source} {said}: give one with labelled images, or the name of a data set")
    return _named(source, where)


# -- folders -----------------------------------------------------------------------------------------------------------


def _folder(path: Path, where: Where) -> Rows:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, where)
    tables = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    if tables:
        splits = list(dict.fromkeys(re.split(r"[-.]", table.name)[0] for table in tables))
        split = _chosen(splits, where.split, path.name)
        return _parquet([t for t in tables if re.split(r"[-.]", t.name)[0] == split], where, split)
    split = where.split or next((s for s in SPLITS if (path / s).is_dir()), "")
    if split and not (path / split).is_dir():
        raise DataError(f"{path.name} has no folder '{split}'{nearest(split, _subfolders(path))}")
    return _class_folders(path / split, split)


def _class_folders(path: Path, split: str) -> Rows:
    """One sub-folder per class; the class index is its place in the order of the names."""
    found = [
        (file, label)
        for label, name in enumerate(_subfolders(path))
        for file in sorted((path / name).rglob("*"))
        if file.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise DataError(f"{path} holds no images: give a folder with one sub-folder of images per class")

    def take(numbers: Sequence[int] | None) -> Iterator[Row]:
        for number in range(len(found)) if numbers is None else numbers:
            file, label = found[number]
            yield file, label, str(file.relative_to(path))

    return Rows(len(found), take, split)


def _subfolders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _chosen(splits: Sequence[str], wanted: str | None, name: str) -> str:
    if wanted is None:
        return next((s for s in SPLITS if s in splits), splits[0])
    if wanted not in splits:
        raise DataError(f"{name} has no split '{wanted}'{nearest(wanted, splits)} (it has {', '.join(splits)})")
    return wanted


# -- arrays ------------------------------------------------------------------------------------------------------------


def _arrays(path: Path, where: Where) -> Rows:
    """``x`` and ``y``, or ``x_test`` and ``y_test`` for a split, of a NumPy archive; nothing pickled is read."""
    try:
        # np.load leaves a file open that it can't read
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            splits = [name[2:] for name in archive.files if name.startswith("x_")]
            split = where.split or ("" if "x" in archive.files else _chosen(splits or [""], None, path.name))
            names = [f"{letter}_{split}" if split else letter for letter in "xy"]
            if missing := [name for name in names if name not in archive.files]:
                raise DataError(f"{path.name} has no array '{missing[0]}' (it has {', '.join(archive.files)})")
            x, y = (archive[name] for name in names)
    except DataError:
        raise
    except Exception as error:  # zipfile, NumPy and the operating system each have their own
        raise DataError(f"{path} can't be read as an .npz file: {first_line(error)}") from None
    if x.ndim < 3 or len(x) != len(y) or y.ndim != 1:
        raise DataError(
            f"{path.name} must hold images [number, ...] and as many labels, got {names[0]} {list(x.shape)} and"
            f" {names[1]} {list(y.shape)}"
        )

    def take(numbers: Sequence[int] | None) -> Iterator[Row]:
        for number in range(len(x)) if numbers is None else numbers:
            yield x[number], y[number], f"row {number}"

    return Rows(len(x), take, split)


# -- tables ------------------------------------------------------------------------------------------------------------


def _parquet(files: Sequence[Path], where: Where, split: str = "") -> Rows:
    parquet = require_extra("pyarrow.parquet", "vision", files[0].name)
    try:
        opened = [parquet.ParquetFile(file) for file in files]
    except Exception as error:  # pyarrow's own kinds, and those of the operating system
        raise DataError(f"{files[0]} can't be read as a parquet file: {first_line(error)}") from None
    image, label = _columns(opened[0].schema_arrow.names, where, files[0].name)

    def take(numbers: Sequence[int] | None) -> Iterator[Row]:
        wanted = None if numbers is None else set(numbers)
        number = 0
        for file in opened:
            for batch in file.iter_batches(batch_size=64, columns=[image, label]):
                for at in range(len(batch)):
                    if wanted is None or number in wanted:
                        yield batch[image][at].as_py(), batch[label][at].as_py(), f"row {number}"
                    number += 1

    return Rows(sum(file.metadata.num_rows for file in opened), take, split)


def _columns(names: Sequence[str], where: Where, what: str) -> tuple[str, str]:
    """The columns with the images and with the class indices."""
    found = []
    for kind, wanted, usual in (("image", where.image, IMAGE_COLUMNS), ("label", where.label, LABEL_COLUMNS)):
        name = wanted or next((n for n in usual if n in names), None)
        if name is None or name not in names:
            near = nearest(name or kind, names)
            raise DataError(
                f"{what} has no column '{name or kind}'{near} (it has {', '.join(names)}); name it with ?{kind}=COLUMN"
            )
        found.append(name)
    return found[0], found[1]


# -- libraries ---------------------------------------------------------------------------------------------------------


def _saved(path: Path, where: Where) -> Rows:
    datasets = require_extra("datasets", "vision", f"{path.name}")
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever its storage layers raise
        raise DataError(f"{path} can't be read as a saved data set: {first_line(error)}") from None
    split = ""
    if hasattr(loaded, "keys"):
        split = _chosen(list(loaded.keys()), where.split, path.name)
        loaded = loaded[split]
    return _of_dataset(datasets, loaded, where, path.name, split, len(loaded))


def _named(source: str, where: Where) -> Rows:
    datasets = require_extra("datasets", "vision", f"data set {source}")
    name, _, config = source.partition(":")
    try:
        split = _chosen(datasets.get_dataset_split_names(name, config or None), where.split, source)
        loaded = datasets.load_dataset(name, config or None, split=split, streaming=True)
    except DataError:
        raise
    except Exception as error:  # whatever its storage layers raise; all of it is about this source
        raise DataError(f"data set {source} can't be loaded: {first_line(error)}") from None
    return _of_dataset(datasets, loaded, where, source, split, None)


def _of_dataset(datasets: Any, loaded: Any, where: Where, name: str, split: str, count: int | None) -> Rows:
    image, label = _columns(list(loaded.column_names or next(iter(loaded))), where, name)
    if loaded.features and isinstance(loaded.features.get(image), datasets.Image):
        # our own decoding tells which row is broken
        loaded = loaded.cast_column(image, datasets.Image(decode=False))

    def take(numbers: Sequence[int] | None) -> Iterator[Row]:
        chosen = enumerate(loaded) if numbers is None else ((n, loaded[n]) for n in numbers)
        for number, row in chosen:
            yield row[image], row[label], f"row {number}"

    def shuffle(seed: int) -> Rows:
        return _of_dataset(datasets, loaded.shuffle(seed=seed), where, name, split, None)

    return Rows(count, take, split, None if count is not None else shuffle)


def _torchvision(name: str, where: Where) -> Rows:
    library = require_extra("torchvision.datasets", "vision", f"torchvision data set {name}")
    known = [n for n in library.__all__ if n[0].isupper()]
    if name not in known:
        raise UsageError(f"torchvision has no data set '{name}'{nearest(name, known)}")
    if where.root is None:
        raise UsageError(f"torchvision:{name} needs the folder that holds it: torchvision:{name}?root=FOLDER")
    kind, split = getattr(library, name), where.split or "test"
    accepted = inspect.signature(kind).parameters
    chosen: dict[str, Any] = {"train": split == "train"} if "train" in accepted else {}
    if "split" in accepted:
        chosen["split"] = split
    try:
        loaded = kind(root=where.root, **chosen)
    except Exception as error:  # each data set checks its files in its own way
        raise DataError(f"torchvision:{name} can't be read from {where.root}: {first_line(error)}") from None

    def take(numbers: Sequence[int] | None) -> Iterator[Row]:
        for number in range(len(loaded)) if numbers is None else numbers:
            image, label = loaded[number]
            yield image, label, f"row {number}"

    return Rows(len(loaded), take, split)


def _sklearn(name: str, where: Where) -> Rows:
    """The digits that every scikit-learn carries, 8x8 pixels in [0, 1]; 1000 of 1797 in ``train``, drawn once."""
    if name != "digits":
        raise UsageError(f"of scikit-learn's data sets there is sklearn:digits, not sklearn:{name}")
    sklearn = require_extra("sklearn.datasets", "vision", "sklearn:digits")
    split = _chosen(("test", "train"), where.split, "sklearn:digits")
    loaded = sklearn.load_digits()
    order = np.random.RandomState(0).permutation(len(loaded.target))
    # RandomState's streams are frozen, and so is the split
    numbers = order[:_DIGITS_TO_TRAIN] if split == "train" else order[_DIGITS_TO_TRAIN:]
    x, y = (loaded.images[numbers] / 16).astype(np.float32), loaded.target[numbers]

    def take(chosen: Sequence[int] | None) -> Iterator[Row]:
        for number in range(len(y)) if chosen is None else chosen:
            yield x[number], y[number], f"row {number}"

    return Rows(len(y), take, split)


# -- decoding ----------------------------------------------------------------------------------------------------------


def decoded(cell: Any, channels: int, where: str) -> np.ndarray[Any, Any]:
    """An image as an array: uint8 [height, width, ``channels``] of a picture, or an array as it is.

    A cell is an array, a file, bytes of a file, ``{"bytes", "path"}`` as ``datasets`` stores it, or a PIL image.
    Raises DataError.
    """
    if isinstance(cell, np.ndarray):
        return cell
    if isinstance(cell, list | tuple):
        return np.asarray(cell)
    pillow = require_extra("PIL.Image", "vision", "reading pictures")
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    try:
        if isinstance(cell, bytes):
            cell = io.BytesIO(cell)
        picture = cell if hasattr(cell, "convert") else pillow.open(cell)
        return np.array(picture.convert("L" if channels == 1 else "RGB")).reshape(picture.height, picture.width, -1)
    except Exception as error:  # PIL raises its own, and those of every format
        raise DataError(f"the image in {where} can't be read: {first_line(error)}") from None
