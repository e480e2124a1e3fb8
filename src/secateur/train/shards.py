"""A sharded checkpoint: every rank writes its own part, any number of ranks reads it.

    sharded.json                 format version, ranks that wrote it, names, shapes and dtypes, files with their sizes
    config.json                  the model without its weights: class, widths of every layer
    shards/shard-*.safetensors   weight/<name>  rows of a weight
                                 mask/<name>    uint8, the same rows of its mask, bits packed along each row

The shards are those of torch.distributed.checkpoint in its safetensors form, since its usual one is pickled.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from torch import Tensor

from secateur.errors import MissingExtraError, ModelLoadError, OutputError
from secateur.files import output_folder
from secateur.models import weightless
from secateur.models.saving import write_config
from secateur.ranks import Ranks
from secateur.versions import library_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT_VERSION = 1


class _Weight(BaseModel):
    model_config = ConfigDict(extra="forbid")

    shape: tuple[int, ...]
    dtype: str

    @field_validator("dtype")
    @classmethod
    def _known(cls, name: str) -> str:
        if not isinstance(getattr(torch, name, None), torch.dtype):
            raise ValueError(f"torch has no dtype {name!r}")
        return name


class Contents(BaseModel):
    """What a sharded checkpoint holds; ``masks`` are the shapes of the masks before they are packed."""

    model_config = ConfigDict(extra="forbid")

    format_version: int
    ranks: int
    versions: dict[str, str]
    weights: dict[str, _Weight]
    masks: dict[str, tuple[int, ...]]
    files: dict[str, int]


def checkpoint_library() -> Any:
    """torch.distributed.checkpoint, when it can write safetensors from many ranks; raises MissingExtraError if not."""
    import torch.distributed.checkpoint as dcp

    writer = getattr(dcp, "HuggingFaceStorageWriter", None)
    if writer is None or "save_distributed" not in inspect.signature(writer).parameters:
        raise MissingExtraError("sharded training needs torch 2.9 or newer: pip install 'secateur[train]'")
    return dcp


def empty_model(folder: str | Path) -> PreTrainedModel:
    """The model of a sharded checkpoint with the widths of its layers, for ``Sharded(…).load(folder)`` to fill.

    Its weights hold whatever happens to be in memory. Raises ModelLoadError or MissingExtraError.
    """
    folder = Path(folder)
    contents = read_contents(folder)
    return weightless.empty_model(folder, {n: getattr(torch, w.dtype) for n, w in contents.weights.items()})


def write_sharded(
    ranks: Ranks,
    folder: str | Path,
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    overwrite: bool = False,
) -> None:
    """Write ``weights`` and packed ``masks``, each rank its part, and a description of ``model``, all or nothing.

    Raises OutputError on every rank when the folder exists or can't be written.
    """
    dcp = checkpoint_library()
    with _shared_output(ranks, folder, overwrite) as path:
        writer = dcp.HuggingFaceStorageWriter(str(path / "shards"), save_distributed=True)
        try:
            dcp.save(_entries(weights, masks), storage_writer=writer)
        except dcp.CheckpointException as error:
            raise OutputError(f"can't write {folder}: {_first_failure(error)}; nothing was left behind") from error
        ranks.on_main(lambda: _describe(path, ranks.size, model, weights, masks))


@contextmanager
def _shared_output(ranks: Ranks, folder: str | Path, overwrite: bool) -> Generator[Path, None, None]:
    """``output_folder`` for all ranks together: one temporary folder on a file system that they share."""
    with ranks.together(), ExitStack() as stack:
        yield ranks.on_main(lambda: stack.enter_context(output_folder(folder, overwrite)))
        # everybody has written before the folder takes its name, and it has its name before anybody goes on
        ranks.meet()
        ranks.on_main(stack.close)


def read_contents(folder: Path) -> Contents:
    """Read ``sharded.json`` and compare it with the files that are there. Raises ModelLoadError."""
    path = folder / "sharded.json"
    try:
        raw = json.loads(path.read_text(encoding="utf8"))
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if version != FORMAT_VERSION:
            raise ModelLoadError(f"{path} has sharded format {version!r}; this secateur reads format {FORMAT_VERSION}")
        contents = Contents.model_validate(raw)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelLoadError(f"{folder} holds no sharded model: there is no sharded.json in it") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelLoadError(f"{path} is not valid: {where}: {first['msg'].lower()}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelLoadError(f"{path} can't be read: {error}") from None
    # torch would leave the rows of a missing shard as they are, and say nothing
    found = _sizes(folder)
    for name in sorted({*contents.files, *found}):
        if contents.files.get(name) != found.get(name):
            raise ModelLoadError(
                f"{folder / 'shards' / name} should have {contents.files.get(name, 0)} bytes and has"
                f" {found.get(name, 0)}: the checkpoint is damaged"
            )
    return contents


def check_same(contents: Contents, weights: Mapping[str, Tensor], folder: str | Path) -> None:
    """Refuse a checkpoint of other weights than ``weights``, before anything is read. Raises ModelLoadError."""
    mine = {name: _weight(tensor) for name, tensor in weights.items()}
    for name in sorted({*mine, *contents.weights}):
        there, here = contents.weights.get(name), mine.get(name)
        if there != here:
            raise ModelLoadError(
                f"{folder} holds another model: {name} is {_words(there)} there and {_words(here)} here;"
                " secateur.train.empty_model(folder) makes the model that fits"
            )
    for name, shape in contents.masks.items():
        if name not in mine or mine[name].shape != shape:
            raise ModelLoadError(f"{folder} is damaged: it holds a mask of shape {list(shape)} for {name}")


def read_sharded(folder: str | Path, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Fill ``weights`` and packed ``masks`` in place, each rank its part. Raises ModelLoadError on every rank."""
    dcp = checkpoint_library()
    try:
        dcp.load(_entries(weights, masks), storage_reader=dcp.HuggingFaceStorageReader(str(Path(folder) / "shards")))
    except dcp.CheckpointException as error:
        raise ModelLoadError(f"can't load {folder}: {_first_failure(error)}") from error


def _entries(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Any]:
    return {f"weight/{n}": t for n, t in weights.items()} | {f"mask/{n}": t for n, t in masks.items()}


def _describe(
    path: Path, ranks: int, model: PreTrainedModel, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> None:
    write_config(model, path, {})
    contents = Contents(
        format_version=FORMAT_VERSION,
        ranks=ranks,
        versions=library_versions(),
        weights={name: _weight(tensor) for name, tensor in weights.items()},
        masks={name: tuple(weights[name].shape) for name in masks},
        files=_sizes(path),
    )
    text = json.dumps(contents.model_dump(mode="json"), indent=1, sort_keys=True)
    (path / "sharded.json").write_text(text + "\n", encoding="utf8")


def _weight(tensor: Tensor) -> _Weight:
    return _Weight(shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))


def _words(weight: _Weight | None) -> str:
    return f"{weight.dtype} {list(weight.shape)}" if weight else "missing"


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted((folder / "shards").glob("*.safetensors"))}


def _first_failure(error: Any) -> str:
    """The first line of what went wrong on the first rank that failed."""
    rank, (cause, _) = min(error.failures.items())
    text = getattr(cause, "strerror", None) or (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    return f"rank {rank}: {text}"
