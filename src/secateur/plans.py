"""The Plan: the decision of a pruning method, as data.

A plan says, in coordinates of the dense model, which units of which groups stay (``keep``), which entries of which
weights stay (``masks``), what the kept entries become (``values``) and what is added to biases (``biases``). It
is immutable, and it is the only thing that ever cuts a model: see ``secateur.apply``.

Laws: Plan → disk → Plan is the identity; the same plan always gives the same bytes; ``diff(p, p)`` is empty.

On disk a plan is a folder:

    plan.json            format version, provenance, units of every group, shapes of every mask
    plan.safetensors     keep/<group>    int64 [kept]              kept units, ascending
                         scores/<group>  float32 [units]           higher = kept first
                         mask/<tensor>   uint8 [ceil(numel / 8)]   bit i of the row-major weight: 1 = kept, least
                                                                   significant bit first
                         value/<tensor>  [number of ones]          kept entries, row-major, in the model's dtype
                         bias/<tensor>   float32 [outputs]         added to the bias, which is created when absent
                         rotation/<signal> [hidden, width]         orthonormal columns: the basis of the hidden states
                                                                   behind a sub-layer (layers.3.mlp) or the embedding
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from secateur.errors import CorruptFileError, PlanError
from secateur.finite import all_finite
from secateur.provenance import Coverage, ExampleInputs, Fingerprint, Provenance, Recovery
from secateur.reading import read_json
from secateur.tensorfiles import Made, Stored, read_header, write_tensors

FORMAT_VERSION = 1
_VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# of the entries of plan.safetensors
KINDS = ("keep", "scores", "mask", "value", "bias", "rotation")

# masks and values that take more than this on disk are left there; a mask in memory is eight times as large
IN_MEMORY_BYTES = 1 << 24


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format_version: int
    provenance: list[Provenance]
    groups: dict[str, int]
    masks: dict[str, tuple[int, ...]]


class _OnDisk(Mapping[str, Tensor]):
    """Tensors that are read from a file when they are looked at, and then forgotten.

    ``checked`` ones were part of a valid plan when this process, or the run that it goes on with, wrote them.
    """

    def __init__(
        self,
        stored: Mapping[str, Stored],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        *,
        checked: bool = False,
    ) -> None:
        self.stored, self.shapes, self.checked = stored, shapes, checked

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.stored[name].read()
        return tensor if self.shapes is None else unpack_bits(tensor, self.shapes[name])

    def __contains__(self, name: object) -> bool:
        # what a Mapping does otherwise is to read the tensor
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def _frozen(mapping: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return mapping if isinstance(mapping, (_OnDisk, MappingProxyType)) else MappingProxyType(dict(mapping))


@dataclass(frozen=True)
class Plan:
    """What stays of a model, and what is done to what stays.

    ``groups`` holds the dense number of units of every group in ``keep``, where a unit that is listed twice is there
    twice, in plans whose layers are drawn anew; ``masks`` are boolean tensors with the
    stored shape of the weight (True = kept); ``values`` replace the kept entries of a masked weight; ``biases`` are
    float32 [outputs] additions; ``rotations`` are bases of the hidden states. ``provenance`` has one entry per method
    that took part. Raises PlanError when the parts don't fit together.
    """

    provenance: tuple[Provenance, ...]
    groups: Mapping[str, int] = field(default_factory=dict)
    keep: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    rotations: Mapping[str, Tensor] = field(default_factory=dict)
    _kept: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("keep", "masks", "values", "biases", "scores", "rotations"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))
        object.__setattr__(self, "groups", MappingProxyType(dict(self.groups)))
        self._validate()

    def _validate(self) -> None:
        if not self.provenance:
            raise PlanError("a plan needs a provenance")
        models = {p.model.shapes for p in self.provenance}
        if len(models) != 1:
            raise PlanError("a plan must be made of parts for one model")
        if set(self.keep) != set(self.groups):
            raise PlanError("the plan lists groups without kept units, or kept units of no group")
        for name, kept in self.keep.items():
            units = self.groups[name]
            if kept.dtype != torch.int64 or kept.dim() != 1:
                raise PlanError(f"kept units of {name} must be a list of integers")
            apart = units_apart(p.initialised for p in self.provenance)
            if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= units or bool((kept.diff() < apart).any())):
                raise PlanError(f"kept units of {name} must be ascending and lie in [0, {units})")
        if not isinstance(self.masks, _OnDisk):
            for name, mask in self.masks.items():
                if mask.dtype != torch.bool:
                    raise PlanError(f"the mask of {name} must be boolean")
        checked = isinstance(self.values, _OnDisk) and self.values.checked
        for name in () if checked else self.values:
            # one at a time: together they may be larger than memory
            value = self.values[name]
            if name not in self.masks or value.numel() != self.kept_entries(name):
                raise PlanError(f"values of {name} don't match its mask")
            if value.dtype not in _VALUE_DTYPES:
                raise PlanError(f"values of {name} must be floating-point numbers, got {value.dtype}")
            if not all_finite(value):
                raise PlanError(f"values of {name} hold NaN or inf")
        for name, bias in self.biases.items():
            if bias.dim() != 1 or bias.dtype not in _VALUE_DTYPES or not all_finite(bias):
                raise PlanError(f"the bias of {name} must be a vector of finite numbers")

        if self.rotations and (self.keep or self.masks or self.biases):
            raise PlanError("a plan that rotates hidden states can't cut anything else; make it a step of its own")
        for name in () if checked else self.rotations:
            check_basis(name, self.rotations[name])

    @property
    def model(self) -> Fingerprint:
        """The model that the plan was made for."""
        return self.provenance[0].model

    @property
    def inputs(self) -> ExampleInputs | None:
        """What the network was called with when it was traced; None for a plan of a language model."""
        return self.provenance[0].inputs

    @property
    def coverage(self) -> Coverage | None:
        """What of the blocks could be reached; None where that was all of their weights."""
        return next((p.coverage for p in self.provenance if p.coverage is not None), None)

    @property
    def method(self) -> str:
        """Names of the methods that took part, joined by ``+``."""
        return "+".join(p.method for p in self.provenance)

    @property
    def head_unit(self) -> str:
        """``query`` when attention is cut by single query heads, ``kv`` when by whole key-value heads."""
        return "query" if any(p.options.get("heads") == "query" for p in self.provenance) else "kv"

    @property
    def is_identity(self) -> bool:
        """True when applying the plan changes nothing."""
        return (
            all(len(self.keep[g]) == n for g, n in self.groups.items())
            and all(self.kept_entries(name) == math.prod(shape) for name, shape in self.mask_shapes.items())
            and not self.values
            and not any(bool(b.any()) for b in self.biases.values())
            and not self.rotations
        )

    def removed(self, group: str) -> Tensor:
        """Units of ``group`` that leave, ascending int64."""
        gone = torch.ones(self.groups[group], dtype=torch.bool)
        gone[self.keep[group]] = False
        return gone.nonzero().flatten()

    def sparsity(self, tensor: str) -> float:
        """Fraction of the entries of ``tensor`` that are removed by its mask."""
        return 1.0 - self.kept_entries(tensor) / math.prod(self.mask_shapes[tensor])

    @property
    def mask_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the masked weights, as they are stored."""
        if isinstance(self.masks, _OnDisk) and self.masks.shapes is not None:
            return self.masks.shapes
        return {name: tuple(mask.shape) for name, mask in self.masks.items()}

    def kept_entries(self, tensor: str) -> int:
        """How many entries of a masked weight stay."""
        if tensor not in self._kept:
            if isinstance(self.masks, _OnDisk):
                packed = self.masks.stored[tensor].read().numpy()
                self._kept[tensor] = int(_ONES[packed].sum(dtype=np.int64)) if packed.size else 0
            else:
                self._kept[tensor] = int(self.masks[tensor].sum())
        return self._kept[tensor]

    def refits(self, tensor: str) -> bool:
        """Whether a mask, [outputs, inputs] or transposed, stands there for new values of a weight whose units leave.

        It then keeps the same inputs for every output, and zeroes nothing of what is left.
        """
        if not self.keep or tensor not in self.values:
            return False
        mask = self.masks[tensor]
        return bool((mask == mask[:1]).all() or (mask == mask[:, :1]).all())

    def save(self, folder: str | Path, overwrite: bool = False) -> Path | str:
        """Write the plan to a folder or a URL of fsspec, which is returned; the same plan gives the same bytes.

        Raises OutputError when it exists.
        """
        from secateur.files import output_folder
        from secateur.remote import place

        with output_folder(folder, overwrite=overwrite) as path:
            self.write(path)
        return place(folder)

    def write(self, path: Path) -> None:
        """Write the two files into an existing folder."""
        document = _Document(
            format_version=FORMAT_VERSION,
            provenance=list(self.provenance),
            groups=dict(sorted(self.groups.items())),
            masks=dict(sorted(self.mask_shapes.items())),
        )
        text = json.dumps(document.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False)
        (path / "plan.json").write_text(text + "\n", encoding="utf8")
        write_tensors(path / "plan.safetensors", self.tensors())

    def tensors(self) -> dict[str, Stored | Made | Tensor]:
        """What ``plan.safetensors`` holds; masks are packed when they are written."""
        found: dict[str, Stored | Made | Tensor] = {}
        kept = (("keep", self.keep), ("scores", self.scores), ("value", self.values), ("rotation", self.rotations))
        for kind, mapping in kept:
            found |= {f"{kind}/{n}": t for n, t in _as_stored(mapping).items()}
        found |= {f"bias/{n}": t for n, t in _as_stored(self.biases).items()}
        if isinstance(self.masks, _OnDisk):
            return found | {f"mask/{n}": t for n, t in self.masks.stored.items()}
        return found | {f"mask/{n}": packed_bits(t) for n, t in self.masks.items()}

    @classmethod
    def load(cls, folder: str | Path) -> Plan:
        """Open a plan and validate it. Raises PlanError, in one sentence, when it is missing or damaged.

        Masks and values of a large plan stay on disk and are read one at a time whenever they are looked at.
        """
        folder = Path(folder)
        document = read_document(folder)
        parts = _read_tensors(folder)
        for name, shape in document.masks.items():
            if name not in parts["mask"]:
                raise PlanError(f"{folder}: the mask of {name} is missing from plan.safetensors")
            _check_packed(parts["mask"][name], name, shape)
        unlisted = sorted(set(parts["mask"]) - set(document.masks))
        if unlisted:
            raise PlanError(f"{folder}: plan.json doesn't list the mask of {unlisted[0]} that plan.safetensors holds")
        small = {kind: {n: t.read() for n, t in parts[kind].items()} for kind in ("keep", "bias", "scores")}
        masks = _OnDisk({n: parts["mask"][n] for n in document.masks}, document.masks)
        values, rotations = _OnDisk(parts["value"]), _OnDisk(parts["rotation"])
        sizes = (stored.size for part in (masks, values, rotations) for stored in part.stored.values())
        large = sum(sizes) > IN_MEMORY_BYTES
        return cls(
            provenance=tuple(document.provenance),
            groups=document.groups,
            keep=small["keep"],
            masks=masks if large else dict(masks),
            values=values if large else dict(values),
            biases=small["bias"],
            scores=small["scores"],
            rotations=rotations if large else dict(rotations),
        )

    def recovered(self, record: Recovery) -> Plan:
        """The same plan of a model that was trained after the cut; applied, it gives the model before training."""
        last = self.provenance[-1]
        last = last.model_copy(update={"recoveries": (*last.recoveries, record)})
        return self._told((*self.provenance[:-1], last))

    def untrained(self) -> Plan:
        """The plan of the model before any training, which is what applying it gives."""
        return self._told(tuple(p.model_copy(update={"recoveries": ()}) for p in self.provenance))

    def _told(self, provenance: tuple[Provenance, ...]) -> Plan:
        told = replace(self, provenance=provenance)
        told._kept.update(self._kept)
        return told

    def diff(self, other: Plan) -> PlanDiff:
        """What ``other`` keeps that this plan removes, and the other way round."""
        return PlanDiff.between(self, other)

    def merge(self, other: Plan) -> Plan:
        """Both plans at once: they must be for one model and must not decide the same group or weight.

        Raises PlanError when they overlap. Biases add up.
        """
        parts = (
            ("group", self.keep, other.keep),
            ("weight", self.masks, other.masks),
            ("basis", self.rotations, other.rotations),
        )
        for kind, mine, theirs in parts:
            both = sorted(set(mine) & set(theirs))
            if both:
                raise PlanError(f"both plans decide {kind} {both[0]}; merge takes plans for different parts of a model")
        biases = dict(self.biases)
        for name, bias in other.biases.items():
            biases[name] = biases[name] + bias if name in biases else bias
        return replace(
            self,
            provenance=self.provenance + other.provenance,
            groups={**self.groups, **other.groups},
            keep={**self.keep, **other.keep},
            masks={**self.masks, **other.masks},
            values={**self.values, **other.values},
            biases=biases,
            scores={**self.scores, **other.scores},
            rotations={**self.rotations, **other.rotations},
        )


def plan_of_parts(
    provenance: Provenance,
    groups: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Stored],
    kept: Mapping[str, int],
) -> Plan:
    """A plan from the entries of several files, named as in ``plan.safetensors``; masks and values stay there.

    ``kept`` are the ``kept_entries`` of each mask. Each file was written from a valid plan, so masks and values, which
    may be larger than memory, aren't read again.
    """
    parts = _by_kind(tensors, "the run")
    small = {kind: {n: t.read() for n, t in parts[kind].items()} for kind in ("keep", "bias", "scores")}
    plan = Plan(
        provenance=(provenance,),
        groups=groups,
        keep=small["keep"],
        masks=_OnDisk(parts["mask"], shapes),
        values=_OnDisk(parts["value"], checked=True),
        biases=small["bias"],
        scores=small["scores"],
        rotations=_OnDisk(parts["rotation"], checked=True),
    )
    plan._kept.update(kept)
    return plan


@dataclass(frozen=True)
class PlanDiff:
    """Differences of two plans: per group or weight, how many units both keep, only the first, only the second.

    ``rows`` maps a name to (kept by both, only by the first, only by the second); names on which the plans agree
    are left out.
    """

    rows: Mapping[str, tuple[int, int, int]]

    @classmethod
    def between(cls, first: Plan, second: Plan) -> PlanDiff:
        if first.model.shapes != second.model.shapes:
            raise PlanError("the plans were made for models of different shapes and can't be compared")
        _check_comparable(first, second)
        rows = {}
        for name in sorted({*first.keep, *second.keep}):
            kept = [_flags(plan, name) for plan in (first, second)]
            rows[name] = _overlap(*_fill(kept))
        for name in sorted({*first.masks, *second.masks}):
            rows[name] = _overlap(*_fill([plan.masks.get(name) for plan in (first, second)]))
        return cls({name: row for name, row in rows.items() if row[1] or row[2]})

    def __bool__(self) -> bool:
        return bool(self.rows)


def _check_comparable(first: Plan, second: Plan) -> None:
    """Raises PlanError for plans whose units are others."""
    for name in sorted({*first.keep} & {*second.keep}):
        if first.groups[name] != second.groups[name]:
            raise PlanError(
                f"one plan has {first.groups[name]} units in {name} and the other {second.groups[name]}, so they"
                " can't be compared: make both with the same unit of heads (heads)"
            )
    names = {*first.rotations, *second.rotations}
    if any(plan.rotations.keys() != names for plan in (first, second)) or not all(
        torch.equal(first.rotations[name], second.rotations[name]) for name in names
    ):
        raise PlanError("plans that turn hidden states into bases of their own (slicegpt) can't be compared by units")


def _flags(plan: Plan, group: str) -> Tensor | None:
    if group not in plan.keep:
        return None
    flags = torch.zeros(plan.groups[group], dtype=torch.bool)
    flags[plan.keep[group]] = True
    return flags


def _fill(pair: list[Tensor | None]) -> list[Tensor]:
    present = next(t for t in pair if t is not None)
    return [torch.ones_like(present) if t is None else t for t in pair]


def _overlap(first: Tensor, second: Tensor) -> tuple[int, int, int]:
    return int((first & second).sum()), int((first & ~second).sum()), int((~first & second).sum())


def pack_bits(mask: Tensor) -> Tensor:
    """Boolean tensor → uint8 [ceil(numel / 8)], row-major, least significant bit first."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little"))


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of ``pack_bits``. Raises PlanError when the length doesn't fit ``shape``."""
    count = math.prod(shape)
    if min(shape, default=0) < 0:
        raise PlanError(f"a mask can't have the shape {tuple(shape)}")
    if packed.dtype != torch.uint8 or packed.numel() != (count + 7) // 8:
        raise PlanError(f"a bit mask of shape {tuple(shape)} needs {(count + 7) // 8} bytes, got {packed.numel()}")
    bits = np.unpackbits(packed.cpu().numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits.view(bool)).reshape(shape)


def read_document(folder: Path) -> _Document:
    """What plan.json says. Raises PlanError."""
    path = folder / "plan.json"
    if not path.is_file():
        raise PlanError(f"{folder} holds no plan: there is no plan.json in it")
    raw = read_json(path, PlanError)
    try:
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if version != FORMAT_VERSION:
            raise PlanError(f"{path} has plan format {version!r}; this secateur reads format {FORMAT_VERSION}")
        return _Document.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PlanError(f"{path} is not a valid plan: {where}: {first['msg'].lower()}") from None


def _read_tensors(folder: Path) -> dict[str, dict[str, Stored]]:
    path = folder / "plan.safetensors"
    if not path.exists():
        raise PlanError(f"{folder} holds no plan: there is no plan.safetensors in it")
    try:
        tensors = read_header(path)
    except CorruptFileError as error:
        raise PlanError(str(error)) from None
    return _by_kind(tensors, path)


def _by_kind(tensors: Mapping[str, Stored], where: object) -> dict[str, dict[str, Stored]]:
    parts: dict[str, dict[str, Stored]] = {k: {} for k in KINDS}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind not in parts:
            raise PlanError(f"{where} holds an unknown entry {name!r}")
        parts[kind][rest] = tensor
    return parts


def units_apart(initialised: Iterable[str]) -> int:
    """How far kept units lie from each other at least, by how the layers of every part of a plan begin.

    A unit that is there twice is one more of its kind, and only a new draw tells them apart.
    """
    return 0 if all(how == "fresh" for how in initialised) else 1


def check_basis(name: str, basis: Tensor) -> None:
    """Raises PlanError when the columns of a basis aren't orthonormal."""
    if basis.dim() != 2 or basis.dtype not in _VALUE_DTYPES or basis.shape[1] > basis.shape[0]:
        raise PlanError(f"the basis of {name} must be a matrix of floating-point numbers with at least as many rows")
    wide = basis.double()
    off = (wide.T @ wide - torch.eye(wide.shape[1], dtype=wide.dtype)).abs().amax() if wide.numel() else torch.zeros(())
    if not float(off) < 1e-3:
        raise PlanError(f"the basis of {name} has columns that are not orthonormal")


def _as_stored(mapping: Mapping[str, Tensor]) -> Mapping[str, Stored | Tensor]:
    return mapping.stored if isinstance(mapping, _OnDisk) else mapping


def packed_bits(mask: Tensor) -> Made:
    """A mask as the packed bits that a file holds."""
    return Made(torch.uint8, ((mask.numel() + 7) // 8,), lambda: pack_bits(mask))


def _check_packed(packed: Stored, name: str, shape: tuple[int, ...]) -> None:
    if min(shape, default=0) < 0:
        raise PlanError(f"a mask can't have the shape {shape}")
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.numel != (count + 7) // 8:
        raise PlanError(
            f"a bit mask of shape {shape} needs {(count + 7) // 8} bytes, that of {name} has {packed.numel}"
        )
    if count % 8 and int(packed.read_flat(packed.numel - 1, 1)) >> (count % 8):
        raise PlanError(f"the mask of {name} has bits beyond its last entry")


# number of ones in every byte
_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


def find_plans(folder: str | Path) -> list[Path]:
    """The plan folders in ``folder``, in the order of their steps: itself, ``plan`` or ``plan/step-1``, ``-2``, ...

    Raises PlanError when there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PlanError(f"{folder} is not a folder; give a plan, or a checkpoint that holds one")
    for place in (folder, folder / "plan"):
        if (place / "plan.json").is_file():
            return [place]
        steps = [step for step in place.glob("step-*") if step.name[5:].isdecimal()]
        if steps:
            return sorted(steps, key=lambda step: int(step.name[5:]))
    raise PlanError(f"{folder} holds no plan: there is no plan.json in it, nor in a folder 'plan'")
