"""Telling the kinds of networks apart without loading a library."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def is_onnx(model: Any) -> bool:
    """Whether this is an ONNX model or the name of a file with one."""
    return (isinstance(model, str | Path) and str(model).endswith(".onnx")) or type(model).__name__ == "ModelProto"
