"""What a compressed cache holds, in bytes that are really there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.cache.layer import CompressedLayer
from secateur.report.numbers import format_bytes, percent, ranges
from secateur.report.tables import plain_text

if TYPE_CHECKING:
    from secateur.cache.compressed import CompressedCache


class CacheReport(dict[str, Any]):
    """A dict that prints as a table.

    ``tokens`` is the length of the text; ``bytes_dense`` what a dense cache of it takes, ``bytes_held`` what this one
    takes, indices and bitmaps included, ``bytes_ideal`` what the kept numbers alone take; ``layers`` says the same of
    every layer, with ``tokens_kept`` [sequences][heads], ``channels_kept`` of keys and values, and ``elements_kept``,
    the fraction of the elements of the tokens that stay.
    """

    def __str__(self) -> str:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for name in ("layers", "tokens per head", "channels k/v", "elements", "dense", "held", ""):
            table.add_column(name, justify="left" if name == "layers" else "right")
        for cells, layers in _folded(self["layers"]):
            table.add_row(ranges(layers), *cells)
        head = (
            f"{self['tokens']:,} tokens: {format_bytes(self['bytes_held'])} held of {format_bytes(self['bytes_dense'])}"
            f" ({_share(self)}); the kept numbers alone are {format_bytes(self['bytes_ideal'])}"
        )
        return plain_text(Group(Text(head), Text(), table))

    __repr__ = __str__


def _share(entry: dict[str, Any]) -> str:
    return percent(entry["bytes_held"] / entry["bytes_dense"]) if entry["bytes_dense"] else "-"


def _folded(layers: Iterable[dict[str, Any]]) -> list[tuple[tuple[str, ...], list[int]]]:
    rows: list[tuple[tuple[str, ...], list[int]]] = []
    for entry in layers:
        kept = [n for sequence in entry["tokens_kept"] for n in sequence]
        cells = (
            entry["left_alone"] or (f"{min(kept):,}" if min(kept) == max(kept) else f"{min(kept):,} to {max(kept):,}"),
            "{}/{}".format(*entry["channels_kept"]),
            percent(entry["elements_kept"]),
            format_bytes(entry["bytes_dense"]),
            format_bytes(entry["bytes_held"]),
            _share(entry),
        )
        if rows and rows[-1][0] == cells:
            rows[-1][1].append(entry["layer"])
        else:
            rows.append((cells, [entry["layer"]]))
    return rows


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind these tensors, each counted once and as a whole, even where a tensor shows a part."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def cache_report(cache: CompressedCache) -> CacheReport:
    """Walk the tensors of a cache."""
    layers = [
        _layer(index, layer) for index, layer in enumerate(cache.layers) if getattr(layer, "is_initialized", False)
    ]
    totals = {name: sum(entry[name] for entry in layers) for name in ("bytes_dense", "bytes_held", "bytes_ideal")}
    methods = [{"name": m.name, **m.options()} for m in cache.methods]
    return CacheReport(tokens=cache.get_seq_length(), methods=methods, **totals, layers=layers)


def _layer(index: int, layer: Any) -> dict[str, Any]:
    keys, values = layer.keys, layer.values
    batch, heads, rows = keys.shape[:3]
    widths = (keys.shape[-1], values.shape[-1])
    if not isinstance(layer, CompressedLayer):
        size = held_bytes([keys, values])
        return {
            "layer": index,
            "left_alone": "sliding window" if getattr(layer, "is_sliding", False) else "other attention",
            "tokens_kept": [[rows] * heads] * batch,
            "channels_kept": list(widths),
            "elements_kept": 1.0,
            "bytes_dense": size,
            "bytes_held": size,
            "bytes_ideal": size,
        }
    store = layer.store
    dense = torch.full((batch, heads), rows)
    if layer.blank:
        dense = (layer.tail_positions() >= 0).sum(dim=-1).cpu()
    kept = (dense + store.lengths if store is not None else dense).tolist()
    elements = int(dense.sum()) * sum(widths) + (
        store.keys.elements + store.values.elements if store is not None else 0
    )
    whole = sum(n for sequence in kept for n in sequence) * sum(widths)
    return {
        "layer": index,
        "left_alone": "",
        "tokens_kept": kept,
        "channels_kept": [
            side.x.shape[-1] if hasattr(side, "channels") else width  # type: ignore[union-attr]
            for side, width in zip((store.keys, store.values) if store else (None, None), widths, strict=True)
        ],
        "elements_kept": elements / whole if whole else 1.0,
        "bytes_dense": batch * heads * layer.seen * sum(widths) * keys.element_size(),
        "bytes_held": held_bytes(layer.tensors().values()),
        "bytes_ideal": elements * keys.element_size(),
    }
