"""A tokenizer as the entries of a GGUF file.

llama.cpp has its own tokenizers: byte-level BPE ("gpt2"), whose way to split text into words is known by a name, and
SentencePiece ("llama"), which merges by scores. Which name fits is found by what the tokenizer does with a probe: the
words of each known way are compared with the tokenizer's own. SentencePiece scores are taken from the ranks of the
merges, since only their order counts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|\p{{N}}{{1,3}}|{_REST}"

# name in llama.cpp → (expressions that split one after the other, whether whole words are looked up before merging)
WAYS: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((_GPT2,), False),
    "smollm": ((r"\p{N}", _GPT2), False),
    "qwen2": ((rf"{_CONTRACTIONS}|\p{{N}}|{_REST}",), False),
    "dbrx": ((_LLAMA3,), False),
    "llama-bpe": ((_LLAMA3,), True),
}

# what SentencePiece writes for a space
_SPACE = "▁"

PROBE = (
    "Hello world, it's 2024: WE'LL pay $1,234.56!  Three   spaces\n\nnew lines\t\ttabs \n mixed\r\nends  \n"
    "don't CAN'T foo_bar(x)->y; a1b22c333 12345 x²+½ éàü naïve 你好，世界 Ελληνικά русский 日本語123 🚀🚀 end   "
)


@dataclass(frozen=True)
class Vocabulary:
    """``tokens`` in the order of their ids, with ``types`` of llama.cpp; merges or scores by ``model``."""

    model: str
    way: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    """ids of ``bos``, ``eos``, ``unk`` and ``pad``, where there are such"""
    add_bos: bool
    add_eos: bool
    space_prefix: bool
    chat_template: str | None

    def write(self, writer: Any) -> None:
        """Add the entries to a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.way)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_token_scores(self.scores)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.space_prefix)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """The vocabulary of a model whose embedding has ``rows`` rows; ids without a token become unused ones.

    Raises UnsupportedModelError for a tokenizer that llama.cpp has no equal of.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    model = state["model"]
    if model["type"] != "BPE":
        raise UnsupportedModelError(f"the tokenizer is of type {model['type']}; secateur writes BPE to GGUF")
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    sentencepiece = bool(model.get("byte_fallback"))
    if sentencepiece and not all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)):
        raise UnsupportedModelError("the tokenizer falls back to bytes, but has no tokens for them: <0x00> to <0xFF>")
    way = "default" if sentencepiece else _way(backend, bool(model.get("ignore_merges")))
    tokens, types = _tokens(state, rows, sentencepiece)
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    encoded = list(tokenizer("a")["input_ids"])
    template = getattr(tokenizer, "chat_template", None)
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        way=way,
        tokens=tokens,
        types=types,
        merges=[] if sentencepiece else [" ".join(pair) for pair in merges],
        scores=_scores(tokens, merges) if sentencepiece else [],
        special={name: int(token) for name, token in ids.items() if isinstance(token, int)},
        add_bos=encoded[0] == ids["bos"],
        add_eos=encoded[-1] == ids["eos"],
        space_prefix=sentencepiece and _has_space_prefix(backend),
        chat_template=template if isinstance(template, str) else None,
    )


def _way(backend: Any, ignore_merges: bool) -> str:
    """The name of the way in which text is split into words."""
    from tokenizers import Regex, pre_tokenizers

    normal, words = _words(backend, PROBE)
    plain = normal == PROBE and not _has_space_prefix(backend)
    for name, (expressions, whole_words) in WAYS.items():
        steps: list[Any] = [pre_tokenizers.Split(Regex(e), "isolated") for e in expressions]
        known = [span for _, span in pre_tokenizers.Sequence(steps).pre_tokenize_str(PROBE)]
        if plain and known == [span for _, span in words] and whole_words == ignore_merges:
            return name
    raise UnsupportedModelError(
        f"the tokenizer splits text in a way that secateur knows no name of llama.cpp for (known: {', '.join(WAYS)})"
    )


def _tokens(state: dict[str, Any], rows: int, sentencepiece: bool) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    found: dict[int, tuple[str, int]] = {}
    for token, i in state["model"]["vocab"].items():
        is_byte = sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        kind = TokenType.UNKNOWN if token == state["model"].get("unk_token") else TokenType.NORMAL
        found[i] = token, int(TokenType.BYTE if is_byte else kind)
    for added in state["added_tokens"]:
        text, known = added["content"], found.get(added["id"], ("", 0))[1]
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if known == TokenType.UNKNOWN or (sentencepiece and _SPACE in text and not added["special"]):
            # runs of spaces come from merges too, and only in normal tokens does llama.cpp print them as spaces
            kind = known or TokenType.NORMAL
        found[added["id"]] = text, int(kind)
    if max(found) >= rows:
        raise UnsupportedModelError(f"the tokenizer has ids up to {max(found)}, the model embeds {rows} tokens")
    unused = int(TokenType.UNUSED)
    entries = [found.get(i, (f"[PAD{i}]", unused)) for i in range(rows)]
    return [token for token, _ in entries], [kind for _, kind in entries]


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """Higher = merged earlier; what no merge makes comes last."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _has_space_prefix(backend: Any) -> bool:
    """Whether a space is put before the text."""
    return _words(backend, "a")[1][0][0] != "a"


def _words(backend: Any, text: str) -> tuple[str, list[Any]]:
    """The normalised text, and the words that it is split into, each with its span."""
    text = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
    steps = backend.pre_tokenizer
    return text, [(text, (0, len(text)))] if steps is None else steps.pre_tokenize_str(text)
