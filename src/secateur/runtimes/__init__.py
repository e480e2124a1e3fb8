"""Models for runtimes other than transformers: GGUF for llama.cpp, DeciLM for vLLM and SGLang, ONNX for onnxruntime.

One file per form of output. ``targets`` lists them, ``graphs`` says what llama.cpp can compute, ``sizes`` reads off a
decoder what a runtime wants to know, and ``vocabulary`` turns a tokenizer into the entries of a GGUF file.
"""

from secateur.runtimes.targets import TARGETS, convert_for

__all__ = ["TARGETS", "convert_for"]
