"""ONNX models in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.errors import UsageError, first_line, require_extra

if TYPE_CHECKING:
    import onnx
    import onnxruntime


def open_session(
    model: onnx.ModelProto | str | Path, *, extra: str = "onnx", why: str = "running ONNX models"
) -> onnxruntime.InferenceSession:
    """A session on the processor, on as many threads as torch has.

    Raises MissingExtraError, which names ``extra``, and UsageError for a model that onnxruntime can't run.
    """
    runtime: Any = require_extra("onnxruntime", extra, why)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        source = str(model) if isinstance(model, str | Path) else model.SerializeToString()
        return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # kinds of onnxruntime's and of protobuf's own
        raise UsageError(f"onnxruntime can't run this ONNX model: {first_line(error)}") from None
