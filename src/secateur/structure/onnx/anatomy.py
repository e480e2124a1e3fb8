"""What can be cut in an ONNX model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from secateur.errors import UsageError, require_extra
from secateur.structure.groups import TracedAnatomy, traced_anatomy
from secateur.structure.onnx.files import load_onnx
from secateur.structure.onnx.network import Array, copied, network
from secateur.structure.onnx.trace import OnnxTrace, trace_onnx

if TYPE_CHECKING:
    import onnx


def onnx_anatomy(
    model: onnx.ModelProto | str | Path,
    *,
    inputs: Mapping[str, Sequence[int]] | None = None,
    heads: str = "outer",
    ignore: Iterable[str] = (),
) -> TracedAnatomy:
    """Everything that can be cut in an ONNX model or file; groups are named by the initialiser or node that makes them.

    ``inputs`` are example sizes by name of the input, for dimensions that the model leaves open: multiply-accumulates
    are counted for them, and networks that only take some sizes of images need theirs. ``heads`` and ``ignore`` are
    those of ``traced_anatomy``. Raises ModelLoadError, UnsupportedModelError, UsageError and MissingExtraError.
    """
    require_extra("onnx", "onnx", "cutting ONNX models")
    title = "the ONNX model"
    if isinstance(model, str | Path):
        title, model = Path(model).name, load_onnx(model)
    else:
        model = copied(model)
    return traced_anatomy(trace_onnx(network(model, title), inputs), heads=heads, ignore=ignore)


def onnx_trace(anatomy: TracedAnatomy) -> OnnxTrace:
    """The trace of an anatomy that came from ONNX. Raises UsageError for another one."""
    if not isinstance(anatomy.trace, OnnxTrace):
        raise UsageError(f"the anatomy of {anatomy.model_type} didn't come from an ONNX model: see onnx_anatomy")
    return anatomy.trace


def weights(anatomy: TracedAnatomy) -> dict[str, torch.Tensor]:
    """The initialisers of floating point that groups have slices of, by name: what criteria score."""
    trace = onnx_trace(anatomy)
    names = {part.tensor for group in anatomy.groups for part in group.slices}
    return {n: _tensor(trace.network.array(n)) for n in trace.parameters if n in names and n in trace.element_sizes()}


def _tensor(array: Array) -> torch.Tensor:
    """bfloat16, which NumPy doesn't have, becomes float32."""
    return torch.from_numpy(array.copy() if array.dtype.kind == "f" else array.astype("float32"))
