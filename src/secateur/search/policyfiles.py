"""Policies on disk: a folder with ``policy.safetensors``, the tensors, and ``policy.json``, where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.errors import CorruptFileError, UsageError
from secateur.files import output_folder, write_text
from secateur.reading import read_json
from secateur.search.policy import Policy
from secateur.tensorfiles import read_header, write_tensors

_TENSORS, _ABOUT = "policy.safetensors", "policy.json"


def write_policy(folder: Path, policy: Policy, about: Mapping[str, Any]) -> None:
    """Write a policy, as a whole or not at all. Raises OutputError."""
    with output_folder(folder) as place:
        write_tensors(place / _TENSORS, policy.tensors(), durable=True)
        write_text(place / _ABOUT, json.dumps(dict(about), indent=1, sort_keys=True) + "\n")


def read_policy(folder: Path, rows: int, inputs: int) -> tuple[Policy, dict[str, Any]]:
    """The policy of a folder for weights of this shape, and what is known of it.

    Raises UsageError for one of another shape, CorruptFileError for a folder that holds none.
    """
    if not (folder / _TENSORS).is_file() or not (folder / _ABOUT).is_file():
        raise CorruptFileError(f"{folder} holds no policy: there must be {_TENSORS} and {_ABOUT}; take another folder")
    about = read_json(folder / _ABOUT, CorruptFileError)
    stored = read_header(folder / _TENSORS)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if set(shapes) != {"weight", "bias", "vector"} or not isinstance(about, dict) or len(shapes["weight"]) != 2:
        raise CorruptFileError(f"{folder} holds no policy: its tensors are {', '.join(sorted(shapes)) or 'none'}")
    if shapes["weight"] != (rows, inputs):
        others = f"{shapes['weight'][0]:,} neurons with {shapes['weight'][1]:,} inputs"
        raise UsageError(
            f"the policy in {folder} is for blocks of {others}, and this model has {rows:,} with {inputs:,}: leave it"
            " out, or name a new folder, and one is learnt"
        )
    found = {name: tensor.read() for name, tensor in stored.items()}
    if found["bias"].shape != (rows,) or found["vector"].shape != (rows, 1):
        raise CorruptFileError(f"{folder} holds a policy whose tensors don't belong together")
    return Policy.of(found), about
