"""Latency of a decoder by its widths: what a block takes on this machine, with fewer heads or neurons, and the rest.

    t(model) = rest + sum over blocks of ( t_block - sum over groups of (t_kind(all units) - t_kind(kept units)) )

t is the time of a request: reading the prompt, and writing the new tokens one by one with the KV cache. It is measured
on copies of the model with random weights, narrow in one kind of unit in all blocks alike, so that every block finds
the caches as it does in the real model; a copy has as many blocks as the model, or as many as take ``PROBE_BYTES``. A
narrow copy takes turns with the whole one, and the medians count. A copy with half of the blocks tells what a block
takes and what the rest does, embeddings and head above all. Between the measured widths t_kind is interpolated
linearly; a width never counts as slower than a larger one, since that would be noise more often than not.

Source: A. Bercovich et al., "Puzzle", arXiv:2411.19146, §4, for runtimes measured per block at a batch and length.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from secateur import timing
from secateur.drawing import apart
from secateur.errors import UnsupportedModelError
from secateur.latencytable import Entry, LatencyTable
from secateur.models.decoders import decoder_anatomy, typed_blocks
from secateur.models.surgery import Removal, layer_sizes, remove_units, shorten_config
from secateur.observe.calibration import cached_forward, check_length
from secateur.structure import Anatomy, Group
from secateur.timing import Workload

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.models.sources import Source

Progress = Callable[[str, int, int], None]

LEVELS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Shares of the neurons that are kept when a block is timed, beside all of them."""
STEP = 8
"""Measured numbers of neurons are multiples of this, which kernels like."""
REPEATS = 5
STEPS = 4
"""New tokens in a repeat; each takes about the same."""
PROBE_BYTES = 2**29
"""Blocks of a copy: beyond any processor cache, so that weights come from memory as they do in a large model."""


class DecoderLatency:
    """Milliseconds of a request to a decoder, whole or with fewer units in some groups."""

    def __init__(self, anatomy: Anatomy, table: LatencyTable, key: str, workload: Workload) -> None:
        self.table, self.workload = table, workload
        self._kinds = {kind: table.entries[f"{key}; {kind}"] for kind in _kinds(anatomy)}
        rest = float(table.entries[f"{key}; rest"].milliseconds[0])
        block = float(table.entries[f"{key}; block"].milliseconds[0])
        # blocks that are narrower than the widest take less from the start
        widest = _widest(anatomy)
        narrow = sum(self._saved(g, widest[g.kind]) for g in _groups(anatomy))
        self.dense = rest + anatomy.num_layers * block + narrow

    def saved(self, group: Group) -> NDArray[np.float64]:
        """Milliseconds that leave with units of a group, [units + 1], entry k where k are kept."""
        return np.array([self._saved(group, kept) for kept in range(group.units + 1)])

    def curves(self) -> dict[str, tuple[list[int], list[float]]]:
        """Kind of unit → numbers of units, and the milliseconds of a block in which so many of that kind are kept."""
        return {
            kind: (entry.widths[0].astype(int).tolist(), entry.milliseconds.tolist())
            for kind, entry in self._kinds.items()
        }

    def _saved(self, group: Group, kept: int) -> float:
        entry = self._kinds[group.kind]
        return entry.at([float(group.units)]) - entry.at([float(kept)])

    @property
    def about(self) -> str:
        """What was timed, and where, for people."""
        load = self.workload
        return f"batch {load.batch}, {load.prompt} prompt tokens, {load.new} new tokens, {self.table.about}"


def measure_decoder(
    source: Source,
    anatomy: Anatomy,
    workload: Workload,
    table: LatencyTable,
    progress: Progress = lambda stage, done, total: None,
) -> DecoderLatency:
    """Time whatever ``table`` doesn't hold yet, and keep it there.

    Raises UsageError when that is needed of a table of another machine or the request is too long, and
    UnsupportedModelError where sub-layers have left or heads are shared unequally, since blocks count as equal but for
    their widths.
    """
    if not all(block.has_attention and block.has_mlp for block in typed_blocks(source.model)):
        raise UnsupportedModelError(
            "the latency of a model whose attentions or MLPs were removed can't be told from one block:"
            " take another budget, or remove them afterwards"
        )
    _check_shared(anatomy)
    check_length(source.model, workload.prompt + workload.new, f"workload {workload}")
    key = _found(table, _key(source, anatomy, workload), source)
    kinds = _kinds(anatomy)
    missing = [kind for kind in kinds if f"{key}; {kind}" not in table.entries]
    if missing or f"{key}; rest" not in table.entries:
        table.check_machine(len(kinds) + 2)
        _time(source, anatomy, workload, table, key, progress)
        table.save()
    return DecoderLatency(anatomy, table, key, workload)


def _check_shared(anatomy: Anatomy) -> None:
    """Raises UnsupportedModelError where a unit isn't as much in every block, so that no probe has them all."""
    heads = [g for g in _groups(anatomy) if g.kind in ("kv_head", "head")]
    # query heads per key-value head, and how many of these there are where query heads are the units
    shared = {g.parts if g.kind == "kv_head" else g.units // g.balance for g in heads}
    many = {g.balance for g in heads}
    if len(shared) > 1 and (len(many) > 1 or heads[0].kind == "kv_head"):
        raise UnsupportedModelError(
            f"blocks have from {min(shared)} to {max(shared)} query heads per key-value head, and latencies are those"
            " of blocks that have as many: take another budget"
            + (", or heads=query" if len({g.units for g in heads}) == 1 and heads[0].kind == "kv_head" else "")
        )


def _time(
    source: Source, anatomy: Anatomy, workload: Workload, table: LatencyTable, key: str, progress: Progress
) -> None:
    from scipy.optimize import isotonic_regression

    unit = "query" if any(g.kind == "head" for g in anatomy) else "kv"
    widest = _widest(anatomy)
    probe = _probe(source, _copies(source))
    blocks = len(typed_blocks(probe))
    shallow = max(blocks // 2, 1)
    # (kind, units that are kept, their number)
    points = [(g.kind, kept) for g in _groups(decoder_anatomy(probe, heads=unit))[:2] for kept in _widths(g)]
    total = len(points) + 1
    whole, half = _in_turns(probe, _probe(source, shallow), workload, source)
    # where noise makes the rest negative there is none to speak of
    block = min((whole - half) / (blocks - shallow) if blocks > shallow else whole, whole / blocks)
    table.entries[f"{key}; rest"] = _single(whole - blocks * block)
    table.entries[f"{key}; block"] = _single(block)
    progress("latency", 1, total)
    taken: dict[str, dict[int, float]] = {kind: {units: block} for kind, units in widest.items()}
    for done, (kind, kept) in enumerate(points, start=2):
        whole, narrow = _in_turns(probe, _narrowed(probe, unit, kind, kept), workload, source)
        taken[kind][kept] = block - (whole - narrow) / blocks
        progress("latency", done, total)
    for kind, times in taken.items():
        kept = sorted(times)
        rising = isotonic_regression([times[k] for k in kept]).x
        table.entries[f"{key}; {kind}"] = Entry((np.array(kept, dtype=np.float64),), np.maximum(rising, 0.0))


def _in_turns(
    whole: PreTrainedModel, other: PreTrainedModel, workload: Workload, source: Source
) -> tuple[float, float]:
    """Milliseconds of a request to each of two models."""
    works: dict[str, Callable[[], object]] = {}
    for name, model in (("whole", whole), ("other", other)):
        works |= {f"{name} {part}": work for part, work in request_works(model, workload).items()}
    with torch.inference_mode():
        taken = timing.take_turns(works, REPEATS, dict.fromkeys(works, source.device))
    times = {name: 1000 * median(seconds) for name, seconds in taken.items()}
    first, second = (request_milliseconds(times, name, workload, _steps(workload)) for name in ("whole ", "other "))
    return first, second


def request_milliseconds(times: Mapping[str, float], name: str, workload: Workload, steps: int) -> float:
    """What a request takes, by the milliseconds of its works, whose names begin with ``name``."""
    return times[f"{name}prompt"] + workload.new * times.get(f"{name}new", 0.0) / max(steps, 1)


def request_works(
    model: PreTrainedModel, workload: Workload, *, every: bool = False
) -> Mapping[str, Callable[[], None]]:
    """``prompt``: reading the prompt; ``new``: writing tokens after it, ``STEPS`` of them or ``every`` one."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    prompt_BT = torch.randint(vocabulary, (workload.batch, workload.prompt), generator=generator).to(model.device)
    held: dict[str, Any] = {}

    def read() -> None:
        held["logits"], held["cache"] = cached_forward(model, prompt_BT)

    def write() -> None:
        for _ in range(workload.new if every else _steps(workload)):
            token_B1 = held["logits"].argmax(dim=-1, keepdim=True)
            held["logits"], held["cache"] = cached_forward(model, token_B1, held["cache"])

    return {"prompt": read, "new": write} if workload.new else {"prompt": read}


def _steps(workload: Workload) -> int:
    return max(1, min(workload.new, STEPS))


def _probe(source: Source, blocks: int) -> PreTrainedModel:
    """A model like that of ``source``, with random weights, fewer blocks, and all of them as wide as the widest."""
    model = source.model
    config: Any = copy.deepcopy(model.config)
    sizes = [layer_sizes(block) for block in typed_blocks(model)]
    shorten_config(config, list(range(blocks)))
    config.per_layer_config = None
    family = typed_blocks(model)[0].family
    for name in sizes[0]:
        if family.plain_heads or name == family.ffn_key:
            setattr(config, name, max(entry[name] for entry in sizes))
    with apart():
        probe: Any = type(model)(config)
    probe = probe.to(source.device, model.dtype).eval()
    if not family.plain_heads:
        # its stock class has all heads of the dense model, also where every block has lost some
        for unit in ("kv", "query"):
            _narrow(probe, unit, _widest(decoder_anatomy(model, heads=unit)))
    return probe


def _narrowed(probe: PreTrainedModel, unit: str, kind: str, kept: int) -> PreTrainedModel:
    """A copy with this many units of every group of a kind."""
    narrow = copy.deepcopy(probe)
    _narrow(narrow, unit, {kind: kept})
    return narrow


def _narrow(model: PreTrainedModel, unit: str, most: Mapping[str, int]) -> None:
    """Leave at most so many units in every group, by kind, in place."""
    anatomy = decoder_anatomy(model, heads=unit)
    wide = [g for g in _groups(anatomy) if g.units > most.get(g.kind, g.units)]
    if wide:
        remove_units(model, Removal.of(model, anatomy, {g.name: _last(g, most[g.kind]) for g in wide}))


def _last(group: Group, kept: int) -> torch.Tensor:
    """The units behind the first ``kept``, as many of every part that must stay in balance."""
    units_PU = torch.arange(group.units).reshape(group.balance, -1)
    return units_PU[:, -(-kept // group.balance) :].flatten()


def _widths(group: Group) -> list[int]:
    """Numbers of units at which a block is timed, beside all of them: every number of heads, some of neurons."""
    if group.kind == "neuron":
        shares = (max(STEP, round(share * group.units / STEP) * STEP) for share in LEVELS)
        return sorted({kept for kept in shares if kept < group.units} or {1} - {group.units})
    parts = group.units // group.balance
    # every number of heads where there are few
    some = range(1, parts) if parts <= len(LEVELS) + 1 else sorted({1, *(round(share * parts) for share in LEVELS)})
    return [count * group.balance for count in some]


def _copies(source: Source) -> int:
    """Blocks of a copy."""
    size = sum(p.numel() * p.element_size() for p in source.blocks[0].parameters())
    return min(len(source.blocks), max(2, -(-PROBE_BYTES // size)))


def _groups(anatomy: Anatomy) -> list[Group]:
    """Those that lie in a block: a request is timed block by block."""
    return [g for g in anatomy.groups if g.kind != "layer" and g.layer >= 0 and g.frozen is None]


def _kinds(anatomy: Anatomy) -> list[str]:
    return sorted({g.kind for g in _groups(anatomy)})


def _widest(anatomy: Anatomy) -> dict[str, int]:
    return {kind: max(g.units for g in _groups(anatomy) if g.kind == kind) for kind in _kinds(anatomy)}


def _single(milliseconds: float) -> Entry:
    return Entry((np.array([1.0]),), np.array([milliseconds]))


def _key(source: Source, anatomy: Anatomy, workload: Workload) -> str:
    """Architecture, shapes, dtype and request: everything that the times depend on but the machine and its device."""
    model = source.model
    widest = _widest(anatomy)
    shapes: Sequence[Any] = (
        model.config.get_text_config().vocab_size,
        model.config.get_text_config().hidden_size,
        sorted(widest.items()),
        [sorted(g.cost.__dict__.items()) for g in _groups(anatomy)[:2]],
        model.get_output_embeddings() is not None,
    )
    digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:12]
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{type(model).__name__} {digest}, {anatomy.num_layers} blocks, {dtype}; {workload}"


def _found(table: LatencyTable, key: str, source: Source) -> str:
    """``key`` on the device of the source; in a table of another machine on whatever device was measured there."""
    if table.difference:
        for name in table.entries:
            if name.startswith(f"{key} on "):
                return name.rpartition("; ")[0]
    return f"{key} on {source.device.type}"
