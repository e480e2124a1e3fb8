"""Pickled weights: read only when the user asks for it, and then by torch's unpickler that knows tensors alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import ModelLoadError
from secateur.reading import check_links, is_plain_name, read_json, shown

INDEX = "pytorch_model.bin.index.json"
_NAMES = ("pytorch_model.bin", "model.bin", "pytorch_model.pt", "model.pt", "model.pth")


def pickled_files(folder: Path) -> list[Path]:
    """The pickled weight files of a folder, unread; shards come from their index. Raises ModelLoadError."""
    index = folder / INDEX
    if index.is_file():
        document = read_json(index, ModelLoadError)
        found = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
            raise ModelLoadError(f"{index} is not a valid index of weight files")
        files = sorted(set(found.values()))
        outside = next((file for file in files if not is_plain_name(file)), None)
        if outside is not None:
            raise ModelLoadError(f"{index} names {shown(outside)}, which is not a file in its folder")
        return [folder / file for file in files]
    single = [folder / name for name in _NAMES if (folder / name).is_file()][:1]
    return single or sorted(folder.glob("pytorch_model*.bin"))


def read_pickles(folder: Path) -> dict[str, Tensor]:
    """The state dict in the pickled files of ``folder``, memory-mapped; nothing but tensors is unpickled.

    Raises ModelLoadError.
    """
    check_links(folder, ModelLoadError)
    found: dict[str, Tensor] = {}
    for file in pickled_files(folder):
        if not file.is_file():
            raise ModelLoadError(f"{file} is missing, though the index of the checkpoint lists it")
        for name, tensor in _state_dict(file).items():
            if name in found:
                raise ModelLoadError(f"{folder}: {name} is in two of its weight files")
            found[name] = tensor
    return found


def _state_dict(file: Path) -> dict[str, Tensor]:
    try:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            # files older than torch 1.6 can't be mapped
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelLoadError(f"{file} can't be read as plain weights: {_reason(error)}") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not _is_state_dict(loaded):
        raise ModelLoadError(f"{file} holds no state dict: it is no mapping of names to tensors")
    return dict(loaded)


def _is_state_dict(loaded: Any) -> bool:
    return isinstance(loaded, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        for name, tensor in loaded.items()
    )


def _reason(error: Exception) -> str:
    text = str(error)
    # torch explains at length how to load the file all the same
    if "Unsupported global" in text or "Unsupported operand" in text or "Unsupported class" in text:
        return "it holds more than tensors, which may be code"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
