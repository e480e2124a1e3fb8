"""Reading and writing .onnx files, whole or with their weights in a file beside them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.errors import ModelLoadError, first_line, require_extra
from secateur.files import check_output_file, output_file

if TYPE_CHECKING:
    import onnx

LARGEST = 2_000_000_000
"""Bytes of weights beyond which they go into a file of their own: protobuf ends at 2 GiB."""


def load_onnx(path: str | Path) -> onnx.ModelProto:
    """A model with all its weights in memory. Raises ModelLoadError and MissingExtraError."""
    onnx = require_extra("onnx", "onnx", "reading ONNX models")
    path = Path(path)
    if not path.is_file():
        raise ModelLoadError(f"{path} is not there" if not path.exists() else f"{path} is not an .onnx file")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own kinds
        raise ModelLoadError(f"{path} is not an ONNX model: {first_line(error)}") from None
    if not model.graph.node and not model.graph.output:
        raise ModelLoadError(f"{path} is not an ONNX model: it holds no graph")
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # a missing file, one cut short, a path that leads out of the folder
        raise ModelLoadError(f"{path} keeps weights in another file: {first_line(error)}") from None
    return model


def save_onnx(model: onnx.ModelProto, path: str | Path, *, overwrite: bool = False, largest: int = LARGEST) -> None:
    """Write a model under a temporary name and rename it; weights of more than ``largest`` bytes go to ``path``.data.

    Raises OutputError when there is a file already, or when it can't be written.
    """
    onnx = require_extra("onnx", "onnx", "writing ONNX models")
    path = Path(path)
    beside = path.with_name(path.name + ".data")
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    for file in (path, beside) if size > largest else (path,):
        check_output_file(file, overwrite)
    with output_file(path) as whole:
        if size > largest:
            onnx.save(model, whole, save_as_external_data=True, location=beside.name, size_threshold=1024)
            # saving took the weights out of the model, which is the caller's
            _take_back(model, str(whole.parent))
            os.replace(whole.with_name(beside.name), beside)
        else:
            onnx.save(model, whole)


def _take_back(model: onnx.ModelProto, folder: str) -> None:
    import onnx

    onnx.load_external_data_for_model(model, folder)
