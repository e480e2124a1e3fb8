"""Perplexity on consecutive windows of a text.

    perplexity = exp( mean over windows of mean over predictions of -log p(token | tokens before it in the window) )

A window of L tokens gives L - 1 predictions. The codes of SparseGPT, Wanda and FLAP scale every window's mean loss
by L and divide by the total number of tokens, which is the same number for windows of equal length. The loss is
float32 whatever the dtype of the model. A model with a vocabulary of its own reads the text of the same windows in its
own tokens, and its losses are divided by the predictions of the dense one: the numbers are about the same text.

Source: E. Frantar and D. Alistarh, "SparseGPT", ICML 2023, arXiv:2301.00774, whose evaluation the others follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.errors import NonFiniteError, UsageError
from secateur.evaluation.base import Settings
from secateur.observe.calibration import Tokens, check_length, evaluating, load_tokens, source_name, start_token
from secateur.pieces import by_rows
from secateur.report import Metric

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens of one forward: enough to keep matrix multiplication busy, few enough to keep activations small.
BATCH_TOKENS = 2048
# Logits of one forward; only vocabularies beyond 64 k entries (in float32) make this the smaller limit.
BATCH_LOGIT_BYTES = 2**29


@dataclass(frozen=True)
class Perplexity:
    """``perplexity:SOURCE``, where SOURCE is whatever calibration takes; its evaluation split is read."""

    source: str = "builtin"

    @classmethod
    def parse(cls, argument: str) -> Perplexity:
        """From the text after ``perplexity:``; nothing means ``builtin``."""
        return cls(argument or "builtin")

    @property
    def name(self) -> str:
        """``perplexity:`` and the source; a file goes by its name."""
        return f"perplexity:{source_name(self.source)}"

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, settings: Settings) -> None:
        check_length(model, settings.length)
        if self.source != "self":
            self._tokens(model, tokenizer, settings)

    def measure(
        self, models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase | None, settings: Settings
    ) -> list[Metric]:
        """One metric, its parts the mean losses of the windows.

        Raises DataError for unusable text and NonFiniteError when a loss is NaN or inf.
        """
        for model in models.values():
            check_length(model, settings.length)
        first, model = next(iter(models.items()))
        # the windows are in the tokens of the dense model, which a model with others doesn't embed
        other = first in settings.tokenizers
        if other and self.source == "self":
            raise UsageError("text that a model writes by itself is that of the dense model: give it as the first")
        tokens = self._tokens(None if other else model, tokenizer, settings)
        losses = {name: self._losses(name, model, tokens, tokenizer, settings) for name, model in models.items()}
        values = {name: _exp(float(losses_N.mean()), name) for name, losses_N in losses.items()}
        parts = {name: losses_N.tolist() for name, losses_N in losses.items()}
        return [Metric(self.name, "", values, False, _protocol(tokens, settings), parts, exponential=True)]

    def _tokens(
        self, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None, settings: Settings
    ) -> Tokens:
        return load_tokens(
            self.source,
            tokenizer,
            samples=settings.windows,
            length=settings.length,
            seed=settings.seed,
            split="evaluation",
            text_field=settings.text_field,
            model=model,
            allow_fewer=True,
        )

    def _losses(
        self,
        name: str,
        model: PreTrainedModel,
        tokens: Tokens,
        tokenizer: PreTrainedTokenizerBase | None,
        settings: Settings,
    ) -> Tensor:
        def step(done: int) -> None:
            settings.progress(f"{self.name} {name}", done, len(tokens.ids))

        own = settings.tokenizers.get(name)
        if own is None or tokenizer is None:
            losses = window_losses(model, tokens.ids, step)
        else:
            losses = reread_losses(model, reread(tokens, tokenizer, own), tokens.info.length, step)
        broken = (~torch.isfinite(losses)).nonzero().flatten()
        if broken.numel():
            raise NonFiniteError(
                f"the loss of model {name} is NaN or inf in window {int(broken[0]) + 1} of {tokens.info.source}; "
                "try float32, or remove less"
            )
        return losses


# not inference_mode: FSDP gathers weights into buffers that a training goes on with
@torch.no_grad()
def window_losses(
    model: PreTrainedModel, ids_NT: Tensor, progress: Callable[[int], None] = lambda done: None
) -> Tensor:
    """Mean negative log-likelihood in nats of every window, [windows] float64 on the CPU.

    ``ids_NT`` is [windows, tokens] int64. The model runs in evaluation mode, whatever its mode is.
    """
    losses = []
    with evaluating(model):
        row_bytes = model.config.get_text_config().vocab_size * model.dtype.itemsize
        for batch_BT in ids_NT.split(windows_per_batch(row_bytes, ids_NT.shape[1])):
            batch_BT = batch_BT.to(model.device)
            logits_BTV = model(input_ids=batch_BT, use_cache=False).logits[:, :-1]
            losses += [_loss(logits_TV, ids_T[1:]) for logits_TV, ids_T in zip(logits_BTV, batch_BT, strict=True)]
            progress(len(losses))
    return torch.tensor(losses, dtype=torch.float64)


def reread(tokens: Tokens, tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> list[Tensor]:
    """The windows in the tokens of another tokenizer, [tokens] int64 each.

    Windows whose tokens it has all are taken token by token, so that what was split at their ends stays as it was.
    """
    ids = own.get_vocab()
    before, after = (start_token(one) if tokens.bos else [] for one in (tokenizer, own))
    windows = []
    for window in tokens.ids.tolist():
        body = window[len(before) :]
        same = [ids.get(token) for token in tokenizer.convert_ids_to_tokens(body)]
        if None in same:
            text = tokenizer.decode(body, clean_up_tokenization_spaces=False)
            same = own(text, add_special_tokens=False, verbose=False)["input_ids"]
        windows.append(torch.tensor([*after, *same], dtype=torch.int64))
    return windows


def reread_losses(
    model: PreTrainedModel, windows: Sequence[Tensor], length: int, progress: Callable[[int], None] = lambda done: None
) -> Tensor:
    """``window_losses`` of windows of any length, per prediction of a window of ``length`` tokens."""
    losses = []
    for ids_T in windows:
        check_length(model, len(ids_T))
        losses.append(window_losses(model, ids_T[None]) * (len(ids_T) - 1) / (length - 1))
        progress(len(losses))
    return torch.cat(losses)


def windows_per_batch(row_bytes: int, length: int) -> int:
    """Windows of ``length`` tokens that go through a model together; the logits of a token take ``row_bytes``."""
    tokens = min(BATCH_TOKENS, BATCH_LOGIT_BYTES // row_bytes)
    return max(1, tokens // length)


def _loss(logits_TV: Tensor, target_T: Tensor) -> float:
    rows = by_rows(logits_TV, target_T)
    losses = [torch.nn.functional.cross_entropy(rows_TV.float(), aim_T, reduction="none") for rows_TV, aim_T in rows]
    # off the device, which may have no float64
    return float(torch.cat(losses).cpu().double().sum()) / len(target_T)


def _exp(loss: float, name: str) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        raise NonFiniteError(
            f"the perplexity of model {name} is beyond 1e308 (mean loss {loss:.0f} nats); the model is broken"
        ) from None


def _protocol(tokens: Tokens, settings: Settings) -> str:
    info = tokens.info
    asked = f" of {settings.windows} asked" if info.samples < settings.windows else ""
    parts = [
        info.source,
        tokens.join,
        f"{info.samples}{asked} consecutive windows of {info.length} tokens (stride {info.length}"
        + (", bos at every start)" if tokens.bos else ")"),
        f"{info.tokens} tokens",
        f"{info.length - 1} predictions a window",
        *(f"{name} reads the text in tokens of its own, loss per token of the others" for name in settings.tokenizers),
    ]
    return "; ".join(parts)
