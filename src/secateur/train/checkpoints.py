"""What a sparse training leaves behind: its masks as a plan, and a state from which it goes on to the bit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.errors import CorruptFileError, OutputError, PlanError, UnsupportedModelError, UsageError
from secateur.files import disk_error, output_file
from secateur.methods import RoundsMethod, TrainingMethod
from secateur.networks.applying import module_fingerprint
from secateur.plans import Plan, unpack_bits
from secateur.provenance import ExampleInputs, Fingerprint, Provenance
from secateur.train.parts import plain_name
from secateur.versions import library_versions

FORMAT = 1
FILE = "sparsifier.safetensors"
"""What the state is called in the checkpoint of a trainer."""
_ABOUT = "about"


@dataclass(frozen=True)
class State:
    """A state that was read and fits."""

    masks: dict[str, Tensor]
    momentum: dict[str, Tensor]
    counters: dict[str, float]
    kept_steps: dict[str, int]
    log: list[dict[str, Any]]


def plan_of(
    model: nn.Module, method: TrainingMethod | RoundsMethod, masks: Mapping[str, Tensor], notes: tuple[str, ...]
) -> Plan:
    """The masks of weights as a plan of the model as it is now."""
    provenance = _provenance(model, method, notes, None)
    return Plan(provenance=(provenance,), masks={name: mask.cpu() for name, mask in masks.items()})


def cutting_plan_of(
    model: nn.Module,
    method: TrainingMethod,
    masks: Mapping[str, Tensor],
    notes: tuple[str, ...],
    inputs: ExampleInputs,
) -> Plan:
    """The masks of groups, [units] each, as a plan that cuts the model, which is called with ``inputs``."""
    return Plan(
        provenance=(_provenance(model, method, notes, inputs),),
        groups={name: len(mask) for name, mask in masks.items()},
        keep={name: mask.cpu().nonzero()[:, 0] for name, mask in masks.items()},
    )


def _provenance(
    model: nn.Module, method: TrainingMethod | RoundsMethod, notes: tuple[str, ...], inputs: ExampleInputs | None
) -> Provenance:
    return Provenance(
        method=method.name,
        options=method.options(),
        # a plan that cuts by a trace is one of a module
        model=_fingerprint(model) if inputs is None else module_fingerprint(model),
        seed=method.seed,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        versions=library_versions(),
        notes=notes,
        inputs=inputs,
    )


def _fingerprint(model: nn.Module) -> Fingerprint:
    """As a decoder where it is one, or else as a module; weights that are sharded over ranks are gathered."""
    from secateur.models.decoders import decoder_blocks
    from secateur.models.fingerprint import memory_fingerprint

    found = None
    if hasattr(model, "config"):
        try:
            decoder_blocks(model)  # type: ignore[arg-type]
            found = memory_fingerprint(model)  # type: ignore[arg-type]
        except UnsupportedModelError:
            pass
    found = module_fingerprint(model) if found is None else found
    plain, sharded = plain_name(model), type(model).__name__
    # only of a module without a name of its own it is the class
    return found.model_copy(update={"architecture": plain, "name": plain if found.name == sharded else found.name})


def state_of(
    method: TrainingMethod,
    shapes: Mapping[str, Sequence[int]],
    masks: Mapping[str, Tensor],
    momentum: Mapping[str, Tensor],
    counters: Mapping[str, float],
    kept_steps: Mapping[str, int],
    log: Sequence[Mapping[str, Any]],
    pace: Sequence[float],
) -> dict[str, Any]:
    """See ``Sparsifier.state_dict``; ``masks`` are packed."""
    return {
        "format": FORMAT,
        "method": method.name,
        "options": method.options(),
        "pace": list(pace),
        "counters": dict(counters),
        "kept_steps": dict(kept_steps),
        "log": [dict(entry) for entry in log],
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "masks": dict(masks),
        "momentum": {name: tensor.detach().clone() for name, tensor in momentum.items()},
    }


def read_state(
    state: Mapping[str, Any], method: TrainingMethod, shapes: Mapping[str, Sequence[int]], pace: Sequence[float]
) -> State:
    """Check that a state belongs to this training. Raises UsageError."""
    missing = {"format", "method", "options", "masks", "shapes", "counters"} - set(state)
    if missing or state["format"] != FORMAT:
        raise UsageError("this is no state of a Sparsifier, or one of another version of secateur")
    if state["method"] != method.name:
        raise UsageError(f"the state is one of {state['method']}, and this training prunes by {method.name}")
    options = method.options()
    for name, value in state["options"].items():
        if options.get(name) != value:
            raise UsageError(
                f"the state was saved with {name}={value!r}, and this training has {name}={options.get(name)!r}:"
                " a training goes on with the options that it began with"
            )
    if list(state["pace"]) != list(pace):
        raise UsageError(
            "the state was saved with another schedule: a training goes on with the one that it began with"
        )
    shapes = {name: list(shape) for name, shape in shapes.items()}
    if state["shapes"] != shapes:
        other = sorted(n for n in {*shapes, *state["shapes"]} if shapes.get(n) != state["shapes"].get(n))
        raise UsageError(f"the state was saved for other weights: {other[0]} isn't the same in both")
    try:
        found = {name: unpack_bits(state["masks"][name], tuple(shape)) for name, shape in shapes.items()}
    except (PlanError, KeyError) as error:
        raise UsageError(f"the state is damaged: {error}") from None
    return State(found, dict(state["momentum"]), dict(state["counters"]), dict(state["kept_steps"]), list(state["log"]))


def write_state(path: str | Path, state: Mapping[str, Any]) -> Path:
    """One safetensors file, all or nothing; an existing one is replaced. Raises OutputError."""
    tensors, about = _parted(state)
    try:
        with output_file(path) as temporary:
            save_file(tensors, temporary, {"secateur": about})
    except (OSError, SafetensorError) as error:
        raise OutputError(f"can't write {path}: {disk_error(error)}") from None
    return Path(path)


def as_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state as tensors alone, for files of tensors that hold other things as well; ``of_tensors`` is the inverse."""
    tensors, about = _parted(state)
    return {**tensors, _ABOUT: torch.tensor(list(about.encode()), dtype=torch.uint8)}


def of_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state of which ``as_tensors`` made these."""
    found: dict[str, Any] = {"masks": {}, "momentum": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if kind in found:
            found[kind][name] = tensor
    return {**json.loads(bytes(tensors[_ABOUT].tolist())), **found}


def _parted(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Tensors by kind and name, and the rest as JSON."""
    tensors = {f"{kind}/{name}": t.contiguous() for kind in ("masks", "momentum") for name, t in state[kind].items()}
    return tensors, json.dumps({key: value for key, value in state.items() if key not in ("masks", "momentum")})


def read_state_file(path: str | Path) -> dict[str, Any]:
    """What ``write_state`` wrote. Raises UsageError or CorruptFileError."""
    if not Path(path).is_file():
        raise UsageError(f"there is no state of a Sparsifier at {path}")
    found: dict[str, Any] = {"masks": {}, "momentum": {}}
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["secateur"])
            for key in file.keys():  # noqa: SIM118 - no mapping
                kind, _, name = key.partition("/")
                found[kind][name] = file.get_tensor(key)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CorruptFileError(f"{path} is no state of a Sparsifier, or damaged: {error}") from None
    return {**about, **found}
