"""ONNX for onnxruntime: token ids in, logits out, any batch and any length; checked before it is kept."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.errors import OutputError, first_line, require_extra
from secateur.manifest import write_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from secateur.models.sources import Source

# the largest difference of logits between onnxruntime and torch, as a fraction of the largest logit
TOLERANCE = 1e-3
# protobuf holds no file beyond 2 GB; then weights go into a file beside the graph
_EXTERNAL_BYTES = 1_500_000_000
# (batch, length) for which both are compared; neither was seen by the exporter
_CHECKED = ((1, 1), (3, 17))


class _Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def write_onnx(source: Source, tokenizer: PreTrainedTokenizerBase | None, path: Path, dtype: str) -> None:
    """Fill a folder with ``model.onnx`` and the tokenizer.

    The graph maps ``input_ids`` [batch, sequence] int64 to ``logits`` [batch, sequence, vocabulary] float32; there is
    no KV cache in it. It is run in onnxruntime and compared with torch before anything is kept.
    Raises OutputError when torch can't export the model or onnxruntime disagrees, or MissingExtraError.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require_extra(package, "onnx", "writing ONNX")
    model = source.whole(torch.float32).cpu()
    file = path / "model.onnx"
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    _exported(_Logits(model).eval()).save(str(file), external_data=size > _EXTERNAL_BYTES)
    _check(file, model)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(path))
    write_manifest(path)


def _exported(module: nn.Module) -> Any:
    # it logs which extensions are not there
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    ids = torch.zeros(2, 8, dtype=torch.long)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                module,
                (ids,),
                dynamo=True,
                verbose=False,
                input_names=["input_ids"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")},),
            )
    except Exception as error:  # the exporter's own kinds
        raise OutputError(f"torch can't export the model to ONNX: {first_line(error)}") from error
    finally:
        log.setLevel(level)


def _check(file: Path, model: Any) -> None:
    """Hold onnxruntime against torch. Raises OutputError."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    for shape in _CHECKED:
        ids = torch.randint(vocabulary, shape, generator=generator)
        with torch.no_grad():
            wanted = model(input_ids=ids, use_cache=False).logits
        made = torch.from_numpy(session.run(["logits"], {"input_ids": ids.numpy()})[0])
        off = float((made - wanted).abs().max() / wanted.abs().max())
        if not off < TOLERANCE:
            raise OutputError(f"onnxruntime gives other logits than torch for {list(shape)} tokens: {off:.1g} off")
