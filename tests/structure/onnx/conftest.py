"""These tests need the ``onnx`` extra and onnxruntime."""

from importlib.util import find_spec

collect_ignore_glob = ["test_*.py"] if any(find_spec(name) is None for name in ("onnx", "onnxruntime")) else []
