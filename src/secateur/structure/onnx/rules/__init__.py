"""What every ONNX operator couples, by kind of operator. Importing this registers all rules."""

from secateur.structure.onnx.rules import attention, computing, moving, plain, recurrent, reducing  # noqa: F401
