"""Compressed caches on disk: one safetensors file, whose header says in JSON what its tensors are.

    metadata["secateur_cache"] = {version, model, methods, layers: [{kind, numbers, stores}, ...]}
    tensors:  layers.N.keys, layers.N.values, layers.N.kept, layers.N.store.keys.x, layers.N.eviction.carried, ...

Nothing is rounded or left out, so that a loaded cache goes on as the saved one would, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from secateur.cache.layer import CompressedLayer
from secateur.cache.rows import DenseRows, Rows, ThinRows, require
from secateur.cache.store import Store
from secateur.cache.tiles import LANES_OF, BitmapRows
from secateur.errors import CorruptFileError, PlanMismatchError, UnsupportedModelError, UsageError
from secateur.files import check_output_file, output_file
from secateur.methods.caching import CacheMethod
from secateur.methods.prompts import Rope
from secateur.methods.registry import make_method
from secateur.models.fingerprint import memory_fingerprint
from secateur.tensorfiles import read_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.cache.compressed import CompressedCache

VERSION = 1
KEY = "secateur_cache"
_ROWS: dict[str, type[Any]] = {cls.__name__: cls for cls in (DenseRows, ThinRows, BitmapRows)}
_NUMBERS = ("seen", "prompt", "settled", "packed", "padding", "cut")
# what Python alone looks at isn't on the device of the model
_ON_CPU = (".counts",)
_EVICTION = ("carried", "queries", "positions")


def save_cache(cache: CompressedCache, model: PreTrainedModel, path: str | Path, overwrite: bool = False) -> None:
    """Write a cache that was read into. Raises UsageError, UnsupportedModelError and OutputError."""
    if not cache.get_seq_length():
        raise UsageError("this cache is empty: let the model read a prompt before it is saved")
    check_output_file(Path(path), overwrite)
    tensors: dict[str, Tensor] = {}
    layers = [_describe(f"layers.{index}", layer, tensors) for index, layer in enumerate(cache.layers)]
    header = {
        "version": VERSION,
        "model": memory_fingerprint(model).model_dump(),
        "methods": [{"name": m.name, "options": m.options()} for m in cache.methods],
        "layers": layers,
    }
    # the library refuses tensors that share memory or lie with gaps
    whole = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    with output_file(path) as temporary:
        save_file(whole, temporary, metadata={"format": "pt", KEY: json.dumps(header)})


def _describe(name: str, layer: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The numbers of one layer; its tensors are added to ``tensors``."""
    if not layer.is_initialized:
        raise UsageError("this cache has layers that have read nothing, so that it can't be saved")
    tensors |= {f"{name}.keys": layer.keys, f"{name}.values": layer.values}
    if type(layer) is DynamicSlidingWindowLayer:
        return {"kind": "sliding", "cumulative_length": layer.cumulative_length}
    if not isinstance(layer, CompressedLayer):
        raise UnsupportedModelError(
            f"{name.replace('.', ' ')} is of the kind {type(layer).__name__}, which can't be saved"
        )
    if layer.kept is not None:
        tensors[f"{name}.kept"] = layer.kept
    found: dict[str, Any] = {"kind": "compressed", **{n: getattr(layer, n) for n in _NUMBERS}}
    if (store := layer.store) is not None:
        found["store"] = {"lengths": store.lengths.tolist(), "positions": store.positions is not None}
        if store.positions is not None:
            tensors[f"{name}.store.positions"] = store.positions
        for side in ("keys", "values"):
            found["store"][side] = _describe_rows(f"{name}.store.{side}", getattr(store, side), tensors)
    if (eviction := layer.eviction) is not None:
        tensors |= {f"{name}.{n}": tensor for n, tensor in eviction.tensors().items()}
        found["waiting"] = eviction.waiting
        if eviction.rope is not None:
            tensors[f"{name}.eviction.frequencies"] = eviction.rope.frequencies
            found["rope_scale"] = eviction.rope.scale
    return found


def _describe_rows(name: str, rows: Rows, tensors: dict[str, Tensor]) -> dict[str, Any]:
    fields = {f.name: getattr(rows, f.name) for f in dataclasses.fields(rows)}  # type: ignore[arg-type]
    tensors |= {f"{name}.{field}": value for field, value in fields.items() if isinstance(value, Tensor)}
    return {"kind": type(rows).__name__, **{n: v for n, v in fields.items() if not isinstance(v, Tensor)}}


# -- reading -----------------------------------------------------------------------------------------------------------


def read_cache(
    path: str | Path, model: PreTrainedModel, methods: tuple[CacheMethod, ...] | None = None
) -> CompressedCache:
    """The cache that a file holds, on the device of the model; ``methods``, if given, must be those it was made with.

    Raises CorruptFileError, PlanMismatchError for another model, UsageError for other methods.
    """
    from secateur.cache.compressed import CompressedCache

    path = Path(path)
    stored = read_header(path)
    header = _header(path)
    _check_model(path, header, model)
    try:
        made = tuple(make_method(entry["name"], entry["options"]) for entry in header["methods"])
        entries = list(header["layers"])
    except (KeyError, TypeError) as error:
        raise CorruptFileError(f"{path} is no whole cache: {error} is missing from its header") from None
    if methods is not None and methods != made:
        raise UsageError(f"{path} holds a cache made by {_named(made)}, and {_named(methods)} was asked for")
    cache = CompressedCache(made, model)  # type: ignore[arg-type]
    if len(entries) != len(cache.layers):
        raise CorruptFileError(f"{path} is no whole cache: it has {len(entries)} layers of {len(cache.layers)}")
    tensors = {
        name: entry.read() if name.endswith(_ON_CPU) else entry.read().to(model.device)
        for name, entry in stored.items()
    }
    for index, (layer, entry) in enumerate(zip(cache.layers, entries, strict=True)):
        try:
            _fill(layer, entry, _below(tensors, f"layers.{index}"))
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise CorruptFileError(f"{path} is no whole cache: layer {index}: {error}") from None
    return cache


def _header(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(KEY)
    if text is None:
        raise CorruptFileError(f"{path} holds no compressed cache: cache.save writes one")
    try:
        header = json.loads(text)
        version = header["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CorruptFileError(f"{path} is no whole cache: its header can't be read") from None
    if version != VERSION:
        raise CorruptFileError(
            f"{path} has the format {version!r} of caches, and this version of secateur reads {VERSION}"
        )
    return header


def _check_model(path: Path, header: Mapping[str, Any], model: PreTrainedModel) -> None:
    mine, theirs = memory_fingerprint(model), header.get("model")
    if not isinstance(theirs, dict) or not {"architecture", "shapes", "weights", "name"} <= set(theirs):
        raise CorruptFileError(f"{path} is no whole cache: its header doesn't say of which model it is")
    if (mine.architecture, mine.shapes) != (theirs["architecture"], theirs["shapes"]):
        raise PlanMismatchError(
            f"{path} is a cache of {theirs['name']} ({theirs['architecture']}), whose shapes aren't those of"
            f" {mine.name} ({mine.architecture})"
        )
    if mine.weights != theirs["weights"]:
        raise PlanMismatchError(
            f"{path} is a cache of {theirs['name']} with other weights or another dtype than those of this {mine.name}:"
            " keys and values of one model mean nothing to another"
        )


def _named(methods: tuple[Any, ...]) -> str:
    parts = (f"{m.name}:" + ",".join(f"{key}={value}" for key, value in m.options().items()) for m in methods)
    return "'" + "+".join(parts) + "'"


def _below(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _fill(layer: Any, entry: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    keys, values = tensors["keys"], tensors["values"]
    if keys.dim() != 4 or keys.shape[:3] != values.shape[:3]:
        raise ValueError("keys and values don't belong together")
    sliding = not isinstance(layer, CompressedLayer)
    if (entry["kind"] == "sliding") != sliding:
        raise ValueError(f"it is {entry['kind']}")
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if sliding:
        layer.cumulative_length = int(entry["cumulative_length"])
        return
    for name in _NUMBERS:
        setattr(layer, name, entry[name])
    layer.set_kept(tensors.get("kept"))
    if layer.kept is not None:
        shape = (*keys.shape[:2], min(layer.kept.shape[-1], keys.shape[2]))
        # blank rows are hidden where attention goes over a store
        _check_positions(layer.kept, shape, layer.seen, least=-1 if "store" in entry else 0)
    if layer.seen < keys.shape[2] - (0 if layer.kept is None else layer.kept.shape[2]):
        raise ValueError("it has more rows than tokens")
    if "store" in entry:
        layer.store = _store(entry["store"], _below(tensors, "store"), layer)
    if layer.eviction is not None:
        layer.eviction.waiting = int(entry["waiting"])
        for name in _EVICTION:
            setattr(layer.eviction, name, tensors.get(f"eviction.{name}"))
        if "rope_scale" in entry:
            layer.eviction.rope = Rope(tensors["eviction.frequencies"], float(entry["rope_scale"]))


def _store(entry: Mapping[str, Any], tensors: dict[str, Tensor], layer: CompressedLayer) -> Store:
    lengths = torch.tensor(entry["lengths"], dtype=torch.int64)
    if lengths.shape != layer.keys.shape[:2] or bool((lengths < 0).any()):
        raise ValueError("its store isn't that of its heads")
    sides: dict[str, Any] = {}
    for side in ("keys", "values"):
        numbers = dict(entry[side])
        rows = sides[side] = _ROWS[numbers.pop("kind")](**_below(tensors, side), **numbers)
        rows.check(lengths, getattr(layer, side))
        if isinstance(rows, BitmapRows) and rows.by != LANES_OF[side]:
            raise ValueError(f"its {side} lie by {rows.by}")
    blocks = [rows.counts for rows in sides.values() if isinstance(rows, BitmapRows)]
    if any(not torch.equal(counts, blocks[0]) for counts in blocks):
        raise ValueError("keys and values lie in different blocks")
    positions = tensors["positions"] if entry["positions"] else None
    if positions is not None:
        _check_positions(positions, (int(lengths.sum()),), layer.seen)
    elif bool((lengths > layer.seen).any()):  # row r is token r
        raise ValueError(f"it has more rows than {layer.seen} tokens")
    return Store(lengths, positions=positions, **sides)


def _check_positions(positions: Tensor, shape: tuple[int, ...], tokens: int, least: int = 0) -> None:
    require(positions, shape, torch.int32, "positions")
    if bool(((positions < least) | (positions >= tokens)).any()):
        raise ValueError(f"its positions aren't all within {tokens} tokens")
