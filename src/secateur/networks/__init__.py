"""Pruning any traced network: a torch module or an ONNX model. The engine of methods that remove coupled channels."""
