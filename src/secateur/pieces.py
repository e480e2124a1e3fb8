"""Logits a few positions at a time: those of large vocabularies are the largest tensors there are."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_ENTRIES = {"cpu": 1 << 18}
_ENTRIES_ELSEWHERE = 1 << 27
"""What the caches of a core hold several of in float32, or enough for a device to be busy."""


def by_rows(logits_NV: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of a few rows of ``logits_NV`` and of ``others``, [N, ...], together.

    What is made of the rows, such as copies in float32, stays in the cache of a processor and takes memory that was
    there already, instead of pages that the system has to clear first.
    """
    most = _ENTRIES.get(logits_NV.device.type, _ENTRIES_ELSEWHERE)
    rows = max(1, most // logits_NV.shape[-1])
    return zip(*(tensor.split(rows) for tensor in (logits_NV, *others)), strict=True)
