"""The weight files of a checkpoint folder, from their headers alone: nothing is read that could mislead."""

from __future__ import annotations

from pathlib import Path

from secateur.errors import CorruptFileError, ModelLoadError
from secateur.models.pickles import pickled_files
from secateur.reading import check_links, is_plain_name, read_json, shown
from secateur.tensorfiles import Stored, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors checkpoint by name; headers, index and links are checked, no data are read.

    Raises ModelLoadError for a missing, corrupt or misleading file, in one sentence.
    """
    check_links(folder, ModelLoadError)
    weight_map = _weight_map(folder)
    found: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())) or [SINGLE]:
        if not (folder / file).is_file():
            raise ModelLoadError(
                f"{folder / shown(file)[1:-1]} is missing, though the index of the checkpoint lists it"
            )
        try:
            header = read_header(folder / file)
        except CorruptFileError as error:
            raise ModelLoadError(str(error)) from None
        twice = next((name for name in header if name in found), None)
        if twice is not None:
            raise ModelLoadError(f"{folder}: {shown(twice)} is in {found[twice].file.name} and again in {file}")
        found.update(header)
    for name, file in weight_map.items():
        if name not in found or found[name].file.name != file:
            raise ModelLoadError(
                f"{folder / file} lacks {shown(name)}, though the index of the checkpoint lists it there"
            )
    return found


def has_safetensors(folder: Path) -> bool:
    """True when there are weights in safetensors form, which are then the ones that count."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor → file of a sharded checkpoint; empty for one in a single file."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise ModelLoadError(f"{folder} has no weights in safetensors form: {_instead(folder)}")
        return {}
    document = read_json(index, ModelLoadError)
    found = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise ModelLoadError(f"{index} is not a valid index of weight files")
    outside = next((file for file in found.values() if not is_plain_name(file)), None)
    if outside is not None:
        raise ModelLoadError(f"{index} names {shown(outside)}, which is not a file in its folder")
    if (folder / SINGLE).is_file() and SINGLE not in found.values():
        # transformers would read the one, other tools the others
        raise ModelLoadError(f"{folder} holds {SINGLE} and an index of other weight files; remove one of the two")
    return found


def _instead(folder: Path) -> str:
    if pickled_files(folder):
        return (
            "only pickled ones, which can run code and are never opened unasked; "
            "if you trust them pass --allow-pickle (allow_pickle=True), or make 'secateur convert' write safetensors"
        )
    return "no model.safetensors"
