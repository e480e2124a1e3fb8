"""Statistics on disk: those of one block are one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from secateur.observe.calibration import Tokens
from secateur.observe.statistics import Statistic
from secateur.provenance import Fingerprint
from secateur.tensorfiles import read_header, write_tensors

SeenByModule = Mapping[str, Mapping[str, Statistic]]


def statistics_folder(
    root: str | Path | None,
    model: Fingerprint,
    config: str,
    tokens: Tokens | None,
    method: object | None,
    dtype: torch.dtype,
    batch_tokens: int,
) -> Path | None:
    """Where below ``root`` the statistics of this model lie that ``method`` takes from these tokens.

    ``config`` is the hash of the model's. ``method`` may be an allocator at work; None where nothing is taken.
    """
    if root is None or tokens is None or method is None:
        return None
    names = sorted(method.observed_statistics())  # type: ignore[attr-defined]
    kind = kind_of(method)
    what = [model.shapes, model.weights, config, tokens.info.sha256, names, kind, str(dtype), batch_tokens]
    return Path(root) / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def kind_of(method: object) -> str:
    """What decides where a method's statistics are taken: its base class in the contract, and the units that leave."""
    own = getattr(method, "kind", None)
    if isinstance(own, str):
        return own
    # contracts stand in modules of the room itself, methods in rooms of their own
    base = next(
        base.__name__ for base in type(method).__mro__ if re.fullmatch(r"secateur\.methods\.\w+", base.__module__)
    )
    # with some options a method lets a kind of units stay, and looks at nothing that reads them
    return " ".join([base, *getattr(method, "kinds", ())])


def write_seen(path: Path, seen: SeenByModule) -> None:
    """Store the statistics of a block's modules, durable when this returns; shared ones are written once."""
    tensors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}
    for module, statistics in seen.items():
        owner = owners.setdefault(id(statistics), module)
        if owner != module:
            tensors[f"{module}//{owner}"] = torch.empty(0)
            continue
        for name, statistic in statistics.items():
            # never no entry at all, so that a statistic that saw nothing is found again
            tensors[f"{module}/{name}/"] = torch.empty(0)
            tensors |= {f"{module}/{name}/{key}": value.cpu() for key, value in statistic.state().items()}
    temporary = path.with_suffix(f".{os.getpid()}.part")
    write_tensors(temporary, tensors, durable=True)
    os.replace(temporary, path)


def read_seen(
    path: Path, types: Mapping[str, type[Statistic]], device: torch.device
) -> dict[str, dict[str, Statistic]]:
    """What ``write_seen`` stored. Raises CorruptFileError."""
    seen: dict[str, dict[str, Statistic]] = {}
    shared: dict[str, str] = {}
    states: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, stored in read_header(path).items():
        module, name, rest = key.split("/", 2)
        if not name:
            shared[module] = rest
            continue
        state = states.setdefault((module, name), {})
        if rest:
            tensor = stored.read()
            # numbers are read where they are
            state[rest] = tensor.to(device) if tensor.dim() else tensor
    for (module, name), state in states.items():
        statistic = types[name]()
        statistic.load_state(state)
        seen.setdefault(module, {})[name] = statistic
    return seen | {module: seen[owner] for module, owner in shared.items()}
