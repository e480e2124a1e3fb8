"""The kinds of networks: how they are told apart, and what is measured of each, without loading a library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DECODER_TASKS = ("perplexity:builtin", "speed", "size")
NETWORK_TASKS = ("size", "macs", "latency")
"""What is measured of language models and of other networks when no task is named."""

GRAPH_FILE = "model.onnx"
"""A cut ONNX model in a folder."""


def is_task_file(text: str) -> bool:
    """Whether a task, as ``lm_eval:FILE.yaml?limit=9``, is a file of lm-eval, which may name Python functions."""
    kind, _, argument = text.partition(":")
    return kind == "lm_eval" and argument.partition("?")[0].endswith((".yaml", ".yml"))


def is_onnx(model: Any) -> bool:
    """Whether this is an ONNX model or the name of a file with one."""
    return (isinstance(model, str | Path) and str(model).endswith(".onnx")) or type(model).__name__ == "ModelProto"
