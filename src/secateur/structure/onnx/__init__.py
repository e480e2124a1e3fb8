"""Cutting ONNX graphs, so networks of every framework that exports them: .onnx in, smaller .onnx out."""

from __future__ import annotations

from secateur.structure.onnx.anatomy import onnx_anatomy, weights
from secateur.structure.onnx.cut import cut_onnx, mask_onnx
from secateur.structure.onnx.files import load_onnx, save_onnx

__all__ = ["cut_onnx", "load_onnx", "mask_onnx", "onnx_anatomy", "save_onnx", "weights"]
