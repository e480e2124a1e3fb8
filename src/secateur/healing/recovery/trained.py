"""What is trained, and how masks hold meanwhile: adapters, everything, or norms and biases.

An adapter changes a weight W by s B A, s = alpha / rank. Where W has a mask M it changes it by s M * (B A), in the
forward as when it is merged, so that the merged model is the trained one and zeros stay zero (MaskLoRA of PERP, M.
Zimmer et al., arXiv:2312.15230). Where everything is trained, masked entries have no gradient and stay zero.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.drawing import seeded
from secateur.errors import NonFiniteError, UsageError, nearest, require_extra
from secateur.finite import all_finite
from secateur.healing.recovery.options import RecoveryOptions
from secateur.loop import Callback
from secateur.rowmasks import clear_masked, pack_rows, shard_like, unpack_rows

_ADAPTER = "recovery"


class Trained(Callback):
    """The parameters of ``model`` that are trained; the others have no gradient until ``finish``.

    ``masks`` are boolean in the shapes of the weights, True = kept.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self._model = self._stepped = model
        self._wanted = {name: p.requires_grad for name, p in model.named_parameters()}
        self._masks = {name: pack_rows(mask) for name, mask in masks.items()}

    def follow(self, stepped: nn.Module) -> None:
        """Steps are taken by ``stepped``: the model, or a sharded copy of which it has the weights in the end."""
        self._stepped = stepped
        self._masks = {name: shard_like(packed, stepped.get_parameter(name)) for name, packed in self._masks.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By name, in the order of the model."""
        return {name: p for name, p in self._stepped.named_parameters() if p.requires_grad}

    def on_gradients(self, step: int) -> None:
        """Zero the gradients of masked entries, so that neither the norm nor momentum knows of them."""
        for name, packed in self._masks.items():
            gradient = self._stepped.get_parameter(name).grad
            if gradient is not None:
                clear_masked(gradient, packed)

    def finish(self, *, learnt: bool = True) -> None:
        """Leave the model as an ordinary one, with what was ``learnt`` in its weights."""
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(self._wanted[name])
            parameter.grad = None

    def _only(self, chosen: Collection[str], what: str) -> None:
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(name in chosen)
        if not chosen:
            raise UsageError(f"the model has no {what} to train: choose another --train")


class Full(Trained):
    """Every parameter."""

    def __init__(self, model: nn.Module, options: RecoveryOptions, masks: Mapping[str, Tensor], **_: Any) -> None:
        super().__init__(model, masks)
        self._only({name for name, _ in model.named_parameters()}, "parameters")


class Norms(Trained):
    """Weights of norms, and biases: whatever has one dimension."""

    def __init__(self, model: nn.Module, options: RecoveryOptions, masks: Mapping[str, Tensor], **_: Any) -> None:
        # no weight that a mask lies on is among them
        super().__init__(model, {})
        self._only({name for name, p in model.named_parameters() if p.dim() == 1}, "norms and biases")


class Lora(Trained):
    """Low-rank adapters at ``modules``, of peft; ``ranks`` are those of single modules where they differ.

    Raises UsageError for targets that there aren't, MissingExtraError without peft, and at the end NonFiniteError.
    """

    def __init__(
        self,
        model: nn.Module,
        options: RecoveryOptions,
        masks: Mapping[str, Tensor],
        *,
        modules: Collection[str] = (),
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(model, {})
        peft = require_extra("peft", "train", "training adapters")
        from peft.tuners.lora import LoraModel

        names = self._names = targets(options.targets, modules)
        weights = [model.get_submodule(name) for name in names]
        config = peft.LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=names,
            # alpha / rank stays what it is where a module has a rank of its own
            rank_pattern=dict(ranks or {}),
            alpha_pattern={name: options.alpha / options.rank * rank for name, rank in (ranks or {}).items()},
            # GPT-2 stores [inputs, outputs]
            fan_in_fan_out=not isinstance(weights[0], nn.Linear),
        )
        with seeded(options.seed):
            self._tuner: Any = LoraModel(model, config, _ADAPTER)
        for name in names:
            if f"{name}.weight" in masks:
                _lay(masks[f"{name}.weight"], model.get_submodule(name))

    def finish(self, *, learnt: bool = True) -> None:
        with torch.no_grad():
            if learnt:
                # in place: copies of the weights leave holes as large as these
                self._tuner.merge_and_unload(progressbar=False)
            else:
                self._tuner.unload()
        with suppress(AttributeError):
            del self._model.peft_config
        super().finish()
        for name in self._names if learnt else ():
            if not all_finite(self._model.get_parameter(f"{name}.weight")):
                raise NonFiniteError(f"{name}: the trained weights hold NaN or inf: try a lower learning rate")


def targets(asked: str, modules: Collection[str]) -> list[str]:
    """The full names among ``modules`` that ``asked`` means, by their last parts; all of them when it is empty.

    Raises UsageError for a name that no module has.
    """
    words = [word for word in asked.replace(",", "+").split("+") if word.strip()]
    for word in words:
        if not any(_means(word.strip(), name) for name in modules):
            known = sorted({name.rpartition(".")[2] for name in modules})
            raise UsageError(
                f"no module of the blocks is called '{word.strip()}'{nearest(word, known)}"
                f" (targets can be {', '.join(known)})"
            )
    return [name for name in modules if not words or any(_means(word.strip(), name) for word in words)]


def _means(word: str, name: str) -> bool:
    return f".{name}".endswith(f".{word}")


def _lay(mask: Tensor, layer: Any) -> None:
    # not part of the state: it comes from the plan again
    layer.register_buffer("kept_bits", pack_rows(mask).to(layer.weight.device), persistent=False)
    layer.lora_variant[_ADAPTER] = MaskedAdapter


def check_installed(train: str) -> None:
    """Raises MissingExtraError where what is trained (lora, full, norms) needs a library that isn't there."""
    require_extra("accelerate", "train", "training")
    if train == "lora":
        require_extra("peft", "train", "training adapters")


class MaskedAdapter:
    """What peft asks where an adapter isn't an ordinary one: here its product is masked before it is used."""

    @staticmethod
    def change(layer: Any, adapter: str) -> Tensor:
        """s M * (B A), as the weight is stored."""
        change: Tensor = layer.get_delta_weight(adapter)
        return change * unpack_rows(layer.kept_bits, tuple(change.shape))

    @staticmethod
    def forward(layer: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        change = MaskedAdapter.change(layer, active_adapter)
        return result + F.linear(layer.lora_dropout[active_adapter](x), change.T if layer.fan_in_fan_out else change)

    @staticmethod
    def merge_unsafe(layer: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += MaskedAdapter.change(layer, active_adapter)


STRATEGIES: dict[str, type[Any]] = {"lora": Lora, "full": Full, "norms": Norms}
