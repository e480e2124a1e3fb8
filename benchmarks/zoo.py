"""The models of ``breadth.py``: every one random, double precision and of small input, with nothing left constant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 1000
SIZES = (64, 96, 128, 192, 224, 256, 299, 384)
"""Image sizes, of which a model gets the first that it runs on; its own is tried last."""


@dataclass(frozen=True)
class Case:
    """A module that is ready to run, and its inputs. ``classes`` is how many it tells apart, 0 where it doesn't."""

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    classes: int = CLASSES
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """A model by name; ``build`` makes it."""

    source: str
    name: str
    build: Callable[[], Case]


def entries(patterns: list[str] | None = None) -> Iterator[Entry]:
    """All models, or those whose ``source/name`` matches one of the patterns."""
    for entry in [*_torchvision(), *_timm(), *_transformers()]:
        if not patterns or any(fnmatch(f"{entry.source}/{entry.name}", p) for p in patterns):
            yield entry


def prepare(entry: Entry, seed: int = 0) -> Case:
    """Build a model, the same at every call.

    What starts as a constant (biases, scales, tokens) gets noise, since a network whose scales are zero hides most of
    itself; and every parameter gets a relative 1e-6 of it, so that each entry is told from all others by its value.
    """
    torch.manual_seed(seed)
    case = entry.build()
    module = case.module.double().eval()
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() <= 1 or (parameter == parameter.flatten()[0]).all():
                parameter.add_(0.3 * noise(parameter))
            parameter.mul_(1 + 1e-6 * noise(parameter))
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point() and "running_" in name:
                buffer.add_(0.3 * noise(buffer).abs())
    return case


def tensors_of(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among the outputs of a model."""
    from torch.utils._pytree import tree_leaves

    leaves = [o for o in tree_leaves(outputs) if isinstance(o, Tensor)]
    return [o for o in leaves if o.is_floating_point() and o.numel()]


def _images(size: int, channels: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size, dtype=torch.float64)


def _runs(module: nn.Module, x: Tensor) -> bool:
    try:
        with torch.no_grad():
            module.double().eval()(x)
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError):
        return False
    return True


# -- torchvision -------------------------------------------------------------------------------------------------------


def _torchvision() -> Iterator[Entry]:
    import torchvision.models as models

    for name in models.list_models(module=models):
        yield Entry("torchvision", name, lambda name=name: _classifier(name))
    for name in models.list_models(module=models.detection):
        yield Entry("torchvision", name, lambda name=name: _detector(name))
    for name in models.list_models(module=models.segmentation):
        yield Entry("torchvision", name, lambda name=name: _segmenter(name))


def _classifier(name: str) -> Case:
    from torchvision.models import get_model

    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit_"):
        patch = 14 if name.endswith("14") else int(name[-2:])
        return Case(get_model(name, image_size=6 * patch), (_images(6 * patch),))
    module = get_model(name, **options)
    return Case(module, (next(x for x in map(_images, SIZES) if _runs(module, x)),))


class Dense(nn.Module):
    """What a detector computes from an image of one size: everything but the choice of boxes."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Any:
        features = self.backbone(x)
        return self.head(list(features.values()))  # type: ignore[operator]


def _detector(name: str) -> Case:
    from torchvision.models import get_model

    detector = get_model(name, weights=None, weights_backbone=None, num_classes=91)
    note = "backbone, feature pyramid and dense head: choosing boxes has sizes that depend on data"
    return Case(Dense(detector), (_images(320 if name.startswith("ssd") else 128, batch=1),), classes=0, note=note)


def _segmenter(name: str) -> Case:
    from torchvision.models import get_model

    return Case(get_model(name, weights=None, weights_backbone=None), (_images(96),), classes=21)


# -- timm --------------------------------------------------------------------------------------------------------------


def timm_names() -> list[str]:
    """Small models of every module file of timm; ``timm_models.txt`` holds what ``choose_timm`` gives for 1.0.31."""
    return (Path(__file__).parent / "timm_models.txt").read_text(encoding="utf8").split()


def choose_timm() -> list[str]:
    """The model with fewest parameters of every module file, and the next one where it has less than 100 million."""
    import timm

    def size(name: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name).parameters())

    chosen = []
    for module in timm.list_modules():
        first, *others = sorted((size(n), n) for n in timm.list_models(module=module))
        chosen += [first[1], *(name for params, name in others[:1] if params < 100e6)]
    return chosen


def _timm() -> Iterator[Entry]:
    for name in timm_names():
        yield Entry("timm", name, lambda name=name: _timm_case(name))


def _timm_case(name: str) -> Case:
    import timm

    default = timm.get_pretrained_cfg(name, allow_unregistered=True)
    channels, _, own = default.input_size if default is not None else (3, 224, 224)
    for size in [s for s in SIZES if s < own]:
        for options in ({"img_size": size}, {}):
            try:
                module = timm.create_model(name, **options)
            except (RuntimeError, ValueError, AssertionError, TypeError, IndexError):
                continue
            x = _images(size, channels)
            if _runs(module, x):
                return Case(module, (x,), classes=getattr(module, "num_classes", CLASSES))
    module = timm.create_model(name)
    return Case(module, (_images(own, channels),), classes=getattr(module, "num_classes", CLASSES))


# -- transformers ------------------------------------------------------------------------------------------------------


class Only(nn.Module):
    """A model of transformers of whose outputs one is asked for."""

    def __init__(self, model: nn.Module, key: str) -> None:
        super().__init__()
        self.model, self.key = model, key

    def forward(self, **inputs: Any) -> Tensor:
        return self.model(**inputs)[self.key]


COMMON = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
ENCODER = {**COMMON, "intermediate_size": 40, "max_position_embeddings": 64, "pad_token_id": 0}
GQA = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64, "pad_token_id": 0}
SLIDING = {**GQA, "sliding_window": 8, "head_dim": 8, "query_pre_attn_scalar": 8}
IMAGE = {"image_size": 32, "patch_size": 8, "num_labels": 10}
VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
SPEECH = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
SPEECH |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 96, "num_mel_bins": 16}
SPEECH |= {"max_source_positions": 20, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1}
SPEECH |= {"eos_token_id": 2, "decoder_start_token_id": 1}

TEXT_MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    # name: (class of the model, class of its configuration, sizes, key of the output)
    "bert": ("BertForSequenceClassification", "BertConfig", ENCODER, "logits"),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", ENCODER, "logits"),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", ENCODER, "logits"),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig",
                   {"vocab_size": 96, "dim": 32, "hidden_dim": 40, "n_layers": 3, "n_heads": 4}, "logits"),
    "deberta-v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config",
                   {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                    "position_buckets": 8}, "logits"),
    "clip-text": ("CLIPTextModelWithProjection", "CLIPTextConfig",
                  {**ENCODER, "projection_dim": 16, "eos_token_id": 2, "bos_token_id": 1}, "text_embeds"),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GQA, "logits"),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GQA, "sliding_window": 8}, "logits"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GQA, "logits"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GQA, "head_dim": 8}, "logits"),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SLIDING, "logits"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", SLIDING, "logits"),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GQA, "logits"),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GQA, "logits"),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", GQA, "logits"),
    "granite": ("GraniteForCausalLM", "GraniteConfig", GQA, "logits"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config",
             {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}, "logits"),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", ENCODER, "logits"),
    "opt": ("OPTForCausalLM", "OPTConfig",
            {**COMMON, "ffn_dim": 40, "word_embed_proj_dim": 32, "max_position_embeddings": 64}, "logits"),
    "falcon": ("FalconForCausalLM", "FalconConfig",
               {**COMMON, "new_decoder_architecture": True, "num_kv_heads": 2}, "logits"),
    "falcon-mqa": ("FalconForCausalLM", "FalconConfig",
                   {**COMMON, "multi_query": True, "new_decoder_architecture": False}, "logits"),
}  # fmt: skip

IMAGE_MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", {**VISION, **IMAGE}, "logits"),
    "clip-vision": ("CLIPVisionModelWithProjection", "CLIPVisionConfig",
                    {**VISION, "image_size": 32, "patch_size": 8, "projection_dim": 16}, "image_embeds"),
    "swin": ("SwinForImageClassification", "SwinConfig",
             {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
              "window_size": 4, "num_labels": 10}, "logits"),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig",
                  {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4],
                   "sr_ratios": [4, 2, 2, 1], "decoder_hidden_size": 32, "num_labels": 10}, "logits"),
}  # fmt: skip


def _transformers() -> Iterator[Entry]:
    for name in TEXT_MODELS:
        yield Entry("transformers", name, lambda name=name: _text(name))
    for name in IMAGE_MODELS:
        yield Entry("transformers", name, lambda name=name: _vision(name))
    yield Entry("transformers", "whisper", _whisper)
    yield Entry("transformers", "t5", _t5)


def _made(model: str, config: str, sizes: Mapping[str, Any], key: str) -> nn.Module:
    import transformers

    made = getattr(transformers, config)(**sizes)
    made.use_cache = False
    return Only(getattr(transformers, model)(made), key)


def _ids(length: int = 12) -> Tensor:
    ids = torch.randint(3, 96, (2, length))
    ids[:, -1] = 2  # where CLIP looks for the end of the text
    return ids


def _text(name: str) -> Case:
    module = _made(*TEXT_MODELS[name])
    outputs = {"ForSequenceClassification": 2, "WithProjection": 16}
    classes = next((n for end, n in outputs.items() if TEXT_MODELS[name][0].endswith(end)), 96)
    return Case(module, kwargs={"input_ids": _ids(), "attention_mask": torch.ones(2, 12).long()}, classes=classes)


def _vision(name: str) -> Case:
    images = _images(64 if name == "segformer" else 32)
    return Case(_made(*IMAGE_MODELS[name]), kwargs={"pixel_values": images}, classes=16 if name[:4] == "clip" else 10)


def _whisper() -> Case:
    module = _made("WhisperForConditionalGeneration", "WhisperConfig", SPEECH, "logits")
    speech = torch.randn(2, 16, 40, dtype=torch.float64)
    return Case(module, kwargs={"input_features": speech, "decoder_input_ids": _ids()}, classes=96)


def _t5() -> Case:
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    module = _made("T5ForConditionalGeneration", "T5Config", {**sizes, "decoder_start_token_id": 0}, "logits")
    return Case(module, kwargs={"input_ids": _ids(), "decoder_input_ids": _ids(8)}, classes=96)
