"""What a model makes of a text whose beginning it has in a cache: losses, likelihood of an answer, greedy generation.

The cache may be a compressed one; it is changed by what is read behind it, as caches are.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.evaluation.retrieval import Case
from secateur.observe.calibration import cached_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MORE_TOKENS = 8
"""what may be written beyond the tokens of an answer, for other ways of writing it"""


@dataclass(frozen=True)
class Retrieved:
    """``log_likelihood`` of the answer in nats per token; whether it is ``found`` in the ``written`` text."""

    log_likelihood: float
    found: bool
    written: str


def continuation_losses(model: PreTrainedModel, cache: Any, ids_T: Tensor) -> Tensor:
    """-log p of every token but the first, in nats, [tokens - 1] float32, read behind what ``cache`` holds.

    The first token is predicted by what was read before, which a compressed cache read dense.
    """
    logits_TV = _logits(model, cache, ids_T[:-1], len(ids_T) - 1)
    return F.cross_entropy(logits_TV, ids_T[1:].to(logits_TV.device), reduction="none")


def retrieved(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: Any, case: Case, *, question_aware: bool
) -> Retrieved:
    """Ask for the answer behind ``cache``, which holds what ``case.parts(question_aware)`` gives first.

    The likelihood is that of the answer's own tokens, and the text is written greedily, token by token.
    """
    rest = case.parts(question_aware)[1]
    written = _written(model, copy.deepcopy(cache), rest, len(case.answer) + MORE_TOKENS)
    logits_AV = _logits(model, cache, torch.cat([rest, case.answer[:-1]]), len(case.answer))
    losses = F.cross_entropy(logits_AV, case.answer.to(logits_AV.device), reduction="none")
    text = str(tokenizer.decode(written))
    return Retrieved(-float(losses.mean()), case.text in text, text)


@torch.no_grad()
def _logits(model: PreTrainedModel, cache: Any, ids_T: Tensor, last: int) -> Tensor:
    """Logits of the ``last`` positions, [last, vocabulary] float32."""
    accepted = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {"cache" if "cache" in accepted else "past_key_values": cache}
    given |= {"logits_to_keep": last} if "logits_to_keep" in accepted else {}
    return model(input_ids=ids_T[None].to(model.device), use_cache=True, **given).logits[0, -last:].float()


@torch.no_grad()
def _written(model: PreTrainedModel, cache: Any, ids_T: Tensor, count: int) -> list[int]:
    """``count`` tokens, each the most likely one."""
    found: list[int] = []
    while len(found) < count:
        logits, cache = cached_forward(model, ids_T[None].to(model.device), cache)
        ids_T = logits[0].argmax(dim=-1, keepdim=True)
        found.append(int(ids_T))
    return found
