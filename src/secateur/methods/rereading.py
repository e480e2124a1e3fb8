"""Reading a prompt a second time to see what a model needs to repeat it: the texts, and what attention says of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from secateur.methods.prompts import Prompt

# Shapes: S tokens of the prompt, C tokens of a passage, Q tokens that are read behind the prompt, H query heads,
# K key-value heads (H = K * G), n keys (sinks, passage and what is read).

FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"
OVERLAP = 8
"""tokens of the passage before that a request ends with"""


class Reader(Protocol):
    """What is needed of a tokenizer."""

    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True)
class Passage:
    """Tokens ``start`` to ``stop`` of a prompt, and the ids [Q] that are read behind it to score them."""

    start: int
    stop: int
    ids: Tensor


def passages(text: Tensor, tokenizer: Reader, *, first: int, chunk: int) -> list[Passage]:
    """A prompt [S] int64 from token ``first`` on in passages of ``chunk`` tokens, with a request before each."""
    behind, found = answer_begins(tokenizer), []
    for start in range(first, len(text), chunk):
        part = text[start : start + chunk]
        request = tokenizer.encode(LATER if found else FIRST, add_special_tokens=False)
        before = text[max(first, start - OVERLAP) : start] if found else text[:0]
        ids = [torch.tensor(request), before.cpu(), torch.tensor(behind), part.cpu()]
        found.append(Passage(start, start + len(part), torch.cat([x.long() for x in ids]).to(text.device)))
    return found


def answer_begins(tokenizer: Reader) -> list[int]:
    """What stands between a question and its answer by the chat template; a new line without one."""
    suffix = "\n" if tokenizer.chat_template is None else _around(tokenizer)[1]
    return tokenizer.encode(suffix, add_special_tokens=False)


def opening(tokenizer: Reader) -> list[int]:
    """What stands before a text by the chat template; nothing without one."""
    if tokenizer.chat_template is None:
        return []
    return tokenizer.encode(_around(tokenizer)[0], add_special_tokens=False)


def _around(tokenizer: Reader) -> tuple[str, str]:
    """What the chat template puts before and behind what a user says."""
    mark = "#############"
    chat = [{"role": "user", "content": mark}]
    # templates that know of thinking leave it out; others ignore the argument
    arguments = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
    before, _, behind = tokenizer.apply_chat_template(chat, **arguments).partition(mark)  # type: ignore[attr-defined]
    return before, behind


def reconstruction_scores(read: Prompt, passage: slice, plus: str | None = None) -> Tensor:
    """The highest attention that every token of a passage gets from what is read behind the prompt, [1, K, C] float32.

    ``read`` holds the keys [1, K, n, E] of sinks, passage and what is read, with the queries of the latter; ``passage``
    are its rows. ``plus`` names the method that weighs by ||W_o v|| / ||h|| (KVzip+). Raises UnsupportedModelError for
    ``plus`` in a model whose output weights aren't known.
    """
    best: Tensor | None = None
    weights = None if plus is None else value_norms(read, plus)[..., passage]
    start = 0
    for part_BHQn in read.attention_in_parts():
        part = part_BHQn[..., passage]
        if weights is not None:
            assert read.hidden is not None
            asking = read.hidden[:, start : start + part.shape[2]].float().norm(dim=-1)
            part = part * weights[:, :, None] / asking[:, None, :, None]
        highest = part.amax(dim=2)
        best = highest if best is None else torch.maximum(best, highest)
        start += part.shape[2]
    assert best is not None
    return best.unflatten(1, (read.keys.shape[1], -1)).amax(dim=2)


def value_norms(read: Prompt, method: str) -> Tensor:
    """||W_o^h v_j|| of every query head and token, [B, H, n] float32."""
    weights_HED = read.output_weights(method)
    values = read.values.repeat_interleave(len(weights_HED) // read.values.shape[1], dim=1).float()
    return torch.stack([(values[:, h] @ weights_HED[h]).norm(dim=-1) for h in range(len(weights_HED))], dim=1)
