"""Levels on disk, one folder each, so that a killed lottery goes on where it stopped.

rounds.json                     what is pruned, how and from which seed
start.safetensors               the network to which weights go back
level-03/masks.safetensors      its masks, one bit per weight
level-03/trained.safetensors    its trained network
level-03/ticket.json            its numbers; the level is done when this is there
level-03/reinit.json            those of a control
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.errors import CorruptFileError, OutputError, PlanError, UsageError
from secateur.files import check_output, disk_error, output_file, write_text
from secateur.plans import Plan, pack_bits, unpack_bits
from secateur.reading import read_json
from secateur.train.updating import Masks

FORMAT = 1
ABOUT, START, MASKS, TRAINED = "rounds.json", "start.safetensors", "masks.safetensors", "trained.safetensors"
TICKET = "ticket"


@dataclass(frozen=True)
class Entry:
    """What came of one training: ``sparsity`` and ``weights`` (live ones) of what was trained, and its numbers.

    ``branch`` is ``ticket`` or a control; ``metrics`` are what training and evaluation gave; ``pq_index`` that of all
    live weights behind the training, with p = 0.5 and q = 1; ``layers`` the live weights of every layer; ``steps``
    those of the optimizer.
    """

    seed: int
    level: int
    branch: str
    sparsity: float
    weights: int
    metrics: dict[str, float]
    steps: int
    pq_index: float
    layers: dict[str, int] = field(default_factory=dict)

    @property
    def remaining(self) -> float:
        """Fraction of the weights that is left."""
        return 1.0 - self.sparsity


class Levels:
    """The folder of one lottery with one seed."""

    def __init__(self, folder: Path, about: Mapping[str, Any], resume: bool) -> None:
        self.folder = folder
        if resume and (folder / ABOUT).is_file():
            _check_same(read_json(folder / ABOUT, CorruptFileError), json.loads(json.dumps(about)), folder)
        else:
            check_output(folder)
        # the number of levels may have grown
        write_text(folder / ABOUT, json.dumps(about, indent=1) + "\n")

    def entry(self, level: int, branch: str = TICKET) -> Entry | None:
        """The numbers of a training, or None before it is done. Raises CorruptFileError."""
        path = self._level(level) / f"{branch}.json"
        if not path.is_file():
            return None
        try:
            return Entry(**read_json(path, CorruptFileError))
        except TypeError as error:
            raise CorruptFileError(f"{path} isn't what a lottery writes: {error}") from None

    def finish(self, entry: Entry) -> None:
        """Put down that a training is done."""
        write_text(
            self._level(entry.level) / f"{entry.branch}.json", json.dumps(dataclasses.asdict(entry), indent=1) + "\n"
        )

    def masks(self, level: int, shapes: Mapping[str, tuple[int, ...]]) -> Masks | None:
        """The masks of a level, if they are there."""
        path = self._level(level) / MASKS
        packed = self._read(path)
        return None if packed is None else _unpacked(path, packed, shapes)

    def put_masks(self, level: int, masks: Masks) -> None:
        """Keep the masks of a level."""
        self._write(self._level(level) / MASKS, {name: pack_bits(mask) for name, mask in masks.items()})

    def start(self) -> dict[str, Tensor] | None:
        """The network to which weights go back, if it is there."""
        return self._read(self.folder / START)

    def put_start(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep it."""
        self._write(self.folder / START, tensors)

    def trained(self, level: int) -> dict[str, Tensor] | None:
        """The trained network of a level, if it was kept."""
        return self._read(self._level(level) / TRAINED)

    def put_trained(self, level: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep it."""
        self._write(self._level(level) / TRAINED, tensors)

    def forget_trained(self, level: int) -> None:
        """Let it go."""
        (self._level(level) / TRAINED).unlink(missing_ok=True)

    def _level(self, level: int) -> Path:
        return self.folder / f"level-{level:02d}"

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        return _loaded(path) if path.is_file() else None

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        try:
            with output_file(path) as temporary:
                save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"can't write {path}: {disk_error(error)}") from None


def load_masks(folder: str | Path, module: nn.Module) -> dict[str, Tensor]:
    """Masks of a network by the name of the weight, of a level of a lottery or of a plan. Raises PlanError and
    CorruptFileError.
    """
    path = Path(folder) / MASKS
    if not path.is_file():
        return dict(Plan.load(folder).masks)
    packed = _loaded(path)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    return _unpacked(path, packed, {name: shapes.get(name, ()) for name in packed})


def _loaded(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{path} is damaged: {error}") from None


def _unpacked(path: Path, packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Masks:
    try:
        return {name: unpack_bits(packed[name], shape) for name, shape in shapes.items()}
    except (KeyError, PlanError) as error:
        raise CorruptFileError(f"{path} doesn't hold the masks of this network: {error}") from None


def _check_same(there: Any, asked: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with another lottery. Raises UsageError."""
    if not isinstance(there, dict) or there.get("format") != FORMAT:
        raise UsageError(f"{folder} holds no lottery, or one of another version of secateur")
    for key in ("method", "seed", "weights"):
        if there.get(key) != asked[key]:
            raise UsageError(
                f"{folder} holds a lottery of another {key}: choose another folder, or go on with that one"
            )
    for name, value in asked["options"].items():
        # more levels are what one goes on for
        if name != "levels" and there["options"].get(name) != value:
            raise UsageError(
                f"{folder} was begun with {name}={there['options'].get(name)!r}, and {name}={value!r} is asked for: a"
                " lottery goes on with the options that it began with"
            )
