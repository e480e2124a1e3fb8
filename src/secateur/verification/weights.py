"""Checks of the files and of the weights."""

from __future__ import annotations

from pathlib import Path

import torch

from secateur.errors import SecateurError
from secateur.manifest import listed, read_manifest, sha256
from secateur.models.loading import open_folder
from secateur.models.skeleton import Checkpoint
from secateur.models.weightfiles import stored_tensors
from secateur.tensorfiles import Stored
from secateur.verification.findings import Finding

_CHUNK_ENTRIES = 1 << 22


def check_manifest(folder: Path) -> Finding:
    """Every file has the size and the hash that manifest.json says; none is missing, none was added."""
    finding = Finding("manifest")
    with finding.noting():
        manifest = read_manifest(folder)
        if manifest is None:
            finding.skipped = "there is no manifest.json"
            return finding
        there = set(listed(folder))
        for name in sorted(set(manifest) - there):
            finding.add(f"{name} is in the manifest and not in the folder")
        for name in sorted(there - set(manifest)):
            finding.add(f"{name} is in the folder and not in the manifest")
        for name in sorted(there & set(manifest)):
            _check_file(folder, name, *manifest[name], finding)
        finding.detail = f"{len(manifest)} files have the size and SHA-256 noted"
    return finding


def _check_file(folder: Path, name: str, size: int, digest: str, finding: Finding) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        finding.add(f"{name} is a link that leads out of the folder")
        return
    try:
        if path.stat().st_size != size:
            finding.add(f"{name} has {path.stat().st_size:,} bytes, the manifest says {size:,}")
        elif sha256(path) != digest:
            finding.add(f"{name} has changed: its SHA-256 is not that of the manifest")
    except OSError as error:
        finding.add(f"can't read {name}: {error.strerror or error}")


def check_headers(folder: Path) -> tuple[Finding, dict[str, Stored]]:
    """The weight files are whole, consistent and inside the folder; with what they hold."""
    finding, stored = Finding("headers"), {}
    with finding.noting():
        stored = stored_tensors(folder)
        files = len({tensor.file for tensor in stored.values()})
        finding.detail = f"{len(stored)} tensors in {files} file{'s' if files > 1 else ''}"
    return finding, stored


def check_shapes(folder: Path, trust_remote_code: bool) -> tuple[Finding, Checkpoint | None]:
    """Names, shapes and dtypes are those that config.json asks for; with the checkpoint when they are."""
    finding = Finding("shapes")
    try:
        checkpoint = open_folder(folder, trust_remote_code)
    except SecateurError as error:
        finding.add(str(error))
        return finding, None
    kind = "packed" if checkpoint.packed else "dense"
    finding.detail = f"{len(checkpoint.stored)} tensors ({kind}) fit config.json"
    return finding, checkpoint


def check_finite(stored: dict[str, Stored]) -> Finding:
    """No weight is NaN or infinite; read in pieces of four million entries."""
    finding = Finding("finite values")
    entries = 0
    for name, tensor in sorted(stored.items()):
        if not tensor.dtype.is_floating_point:
            continue
        bad = 0
        with finding.noting():
            for first in range(0, tensor.numel, _CHUNK_ENTRIES):
                part = tensor.read_flat(first, min(_CHUNK_ENTRIES, tensor.numel - first))
                # eight-bit floats know no isfinite
                bad += int((~torch.isfinite(part if part.element_size() > 1 else part.float())).sum())
        entries += tensor.numel
        if bad:
            finding.add(f"{name}: {bad} of {tensor.numel} weights are NaN or inf")
    finding.detail = f"{entries:,} stored weights are finite"
    return finding
