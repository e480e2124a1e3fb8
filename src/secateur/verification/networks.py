"""Checks of folders without a config.json: traced networks, whose class is the user's, and graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from secateur.errors import MissingExtraError, SecateurError
from secateur.kinds import GRAPH_FILE
from secateur.manifest import read_manifest
from secateur.structure.onnx import load_onnx
from secateur.tensorfiles import Stored
from secateur.verification.findings import Finding
from secateur.verification.plans import StoredPlan
from secateur.verification.weights import check_finite, check_headers


def is_network(folder: Path) -> bool:
    """Whether a folder was written without a config.json; only its manifest can tell that from one that got lost."""
    try:
        manifest = read_manifest(folder)
    except SecateurError:
        return False
    return manifest is not None and "config.json" not in manifest and not (folder / "config.json").exists()


def check_network(folder: Path, plans: Sequence[StoredPlan]) -> list[Finding]:
    """The weights by themselves, and the zeros of a plan's masks."""
    if (folder / GRAPH_FILE).exists():
        return [*_check_graph(folder), Finding("zeros", skipped="the plan cuts a graph")]
    headers, stored = check_headers(folder)
    shapes = Finding("shapes", skipped="the class of the network is code, which the folder doesn't hold")
    return [headers, shapes, check_finite(stored), _check_zeros(stored, plans)]


def _check_graph(folder: Path) -> list[Finding]:
    headers, finite = Finding("headers"), Finding("finite values")
    try:
        tensors = load_onnx(folder / GRAPH_FILE).graph.initializer
    except MissingExtraError as error:
        headers.skipped = finite.skipped = str(error)
        return [headers, finite]
    except SecateurError as error:
        headers.add(str(error))
        finite.skipped = "it needs a sound graph"
        return [headers, finite]
    from onnx import numpy_helper

    headers.detail, entries = f"a graph with {len(tensors)} tensors", 0
    for tensor in tensors:
        array = np.asarray(numpy_helper.to_array(tensor), dtype=np.float64)
        entries += array.size
        bad = int((~np.isfinite(array)).sum())
        if bad:
            finite.add(f"{tensor.name}: {bad} of {array.size} weights are NaN or inf")
    finite.detail = f"{entries:,} stored weights are finite"
    return [headers, finite]


def _check_zeros(stored: Mapping[str, Stored], plans: Sequence[StoredPlan]) -> Finding:
    finding, checked = Finding("zeros"), 0
    for plan, (name, shape) in ((one, mask) for one in plans for mask in one.document.masks.items()):
        if name not in stored or stored[name].shape != tuple(shape):
            continue  # cut afterwards
        wrong = int(torch.count_nonzero(stored[name].read()[~plan.mask(name)]))
        checked += 1
        if wrong:
            finding.add(f"{name}: {wrong} entries that the plan removes are not zero")
    finding.detail = f"{checked} weights are zero where the plan says"
    if not checked:
        finding.skipped = "the plan has no masks of weights that are there"
    return finding
