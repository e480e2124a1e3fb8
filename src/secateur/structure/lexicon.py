"""What the tokens of a vocabulary are made of, and a tokenizer without some of them.

Everything here is about the document that the library ``tokenizers`` writes (``tokenizer.json``).

Law: text whose tokens all stay is tokenised as before. Byte-level and SentencePiece-like BPE apply the merges of a
kept token exactly as they do to that token alone, so that it takes the pieces of this one derivation and no others
(``Lexicon.needs``); a merge stays if its two parts and its result do. The best path of a Unigram model stays the best
one among fewer, and WordPiece still finds its longest match.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from secateur.errors import UnsupportedModelError

VOCABULARY = "vocabulary"
"""The name of the group whose units are tokens."""

Document = Mapping[str, Any]

_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class Lexicon:
    """The ``rows`` of a vocabulary.

    ``needs`` are the tokens of which each is put together, which must stay as long as it does. ``fixed`` ones must
    always stay: single symbols and bytes, without which some text has no tokens, and what was added to the model's own
    vocabulary, such as special tokens. ``unused`` rows have no token.
    """

    rows: int
    needs: Mapping[int, tuple[int, ...]]
    fixed: frozenset[int]
    unused: frozenset[int] = frozenset()


def read_lexicon(document: Document, rows: int) -> Lexicon:
    """The lexicon of a tokenizer for an embedding with so many rows. Raises UnsupportedModelError for its type."""
    model = document["model"]
    kind = model.get("type")
    if kind not in _KINDS:
        raise UnsupportedModelError(
            f"the tokenizer is of type {kind}; a vocabulary can be cut for {', '.join(_KINDS)} tokenizers"
        )
    ids = dict(_tokens(model))
    needs, fixed = _KINDS[kind](model, ids)
    added = {token["id"] for token in document.get("added_tokens") or ()}
    fixed |= added | set(_named(document)) | {ids[t] for t in (model.get("unk_token"),) if t in ids}
    used = set(ids.values()) | added
    return Lexicon(
        rows,
        {token: tuple(p for p in parts if p < rows) for token, parts in needs.items() if token < rows},
        frozenset(i for i in fixed if i < rows),
        frozenset(range(rows)) - used,
    )


def cut_document(document: Document, new: Mapping[int, int]) -> dict[str, Any]:
    """The tokenizer with the tokens of ``new`` alone, which maps their ids to those that they get."""
    model = dict(document["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {token: new[i] for token, i in model["vocab"].items() if i in new}
    if model["type"] == "BPE":
        left, prefix = model["vocab"], model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            merge
            for merge in model["merges"]
            if all(part in left for part in _pair(merge)) and _merged(_pair(merge), prefix) in left
        ]
    added = [{**t, "id": new[t["id"]]} for t in document.get("added_tokens") or () if t["id"] in new]
    cut = {**document, "model": model, "added_tokens": added}
    cut["post_processor"] = _renumbered(document.get("post_processor"), new)
    if document.get("padding"):
        cut["padding"] = {**document["padding"], "pad_id": new.get(document["padding"]["pad_id"], 0)}
    return cut


def _tokens(model: Document) -> Iterator[tuple[str, int]]:
    vocab = model["vocab"]
    return iter(vocab.items()) if isinstance(vocab, Mapping) else ((entry[0], i) for i, entry in enumerate(vocab))


def _of_bpe(model: Document, ids: Mapping[str, int]) -> tuple[dict[int, tuple[int, ...]], set[int]]:
    prefix = model.get("continuing_subword_prefix") or ""
    ranks: dict[tuple[str, str], int] = {}
    made: dict[str, list[tuple[str, str]]] = {}
    for rank, merge in enumerate(model["merges"]):
        pair = _pair(merge)
        ranks[pair] = rank
        made.setdefault(_merged(pair, prefix), []).append(pair)
    # with marks at word ends a token doesn't say what it was before: then it takes whatever could have made it
    marked = bool(prefix or model.get("end_of_word_suffix"))
    needs: dict[int, tuple[int, ...]] = {}
    for token, pairs in made.items():
        if token not in ids:
            continue
        if len(pairs) > 1 and not marked:
            last = _last_merge(token, ranks)
            pairs = [last] if last is not None else []
        needs[ids[token]] = tuple(dict.fromkeys(ids[part] for pair in pairs for part in pair if part in ids))
    return needs, _symbols(model, ids, "", model.get("end_of_word_suffix") or "", prefix)


def _last_merge(token: str, ranks: Mapping[tuple[str, str], int]) -> tuple[str, str] | None:
    """The merge that completes a token when nothing else is in the text; None when that gives other tokens."""
    parts, none, pair = list(token), len(ranks), None
    turns = [ranks.get(both, none) for both in pairwise(parts)]
    while turns:
        at = turns.index(min(turns))
        if turns[at] == none:
            return None
        pair = parts[at], parts[at + 1]
        parts[at : at + 2] = [pair[0] + pair[1]]
        del turns[at]
        for place in (at - 1, at):
            if 0 <= place < len(turns):
                turns[place] = ranks.get((parts[place], parts[place + 1]), none)
    return pair


def _of_unigram(model: Document, ids: Mapping[str, int]) -> tuple[dict[int, tuple[int, ...]], set[int]]:
    fixed = _symbols(model, ids, "▁")
    # what an unknown character costs hangs on the lowest score
    lowest = min(range(len(model["vocab"])), key=lambda i: model["vocab"][i][1])
    return {}, fixed | {lowest} | {i for i in (model.get("unk_id"),) if i is not None}


def _of_wordpiece(model: Document, ids: Mapping[str, int]) -> tuple[dict[int, tuple[int, ...]], set[int]]:
    return {}, _symbols(model, ids, model.get("continuing_subword_prefix") or "")


_KINDS = {"BPE": _of_bpe, "Unigram": _of_unigram, "WordPiece": _of_wordpiece}


def _symbols(model: Document, ids: Mapping[str, int], *marks: str) -> set[int]:
    """Tokens of a single symbol, with or without a mark; where all bytes are there to fall back to, these instead."""
    if model.get("byte_fallback") and all(byte in ids for byte in _BYTES):
        return {ids[byte] for byte in _BYTES}
    marks = tuple(filter(None, marks))

    def bare(token: str) -> int:
        return min(len(token.removeprefix(m).removesuffix(m)) for m in ("", *marks)) if len(token) > 1 else 1

    return {i for token, i in ids.items() if bare(token) <= 1}


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _merged(pair: tuple[str, str], prefix: str) -> str:
    return pair[0] + pair[1].removeprefix(prefix)


def _named(document: Document) -> Iterator[int]:
    """Ids that the tokenizer itself puts around a text, or fills up with."""
    if document.get("padding"):
        yield document["padding"]["pad_id"]
    yield from _processed(document.get("post_processor"))


def _processed(processor: Any) -> Iterator[int]:
    if not processor:
        return
    for part in processor.get("processors") or ():
        yield from _processed(part)
    for token in (processor.get("special_tokens") or {}).values():
        yield from token["ids"]
    for name in ("sep", "cls"):
        if name in processor:
            yield processor[name][1]


def _renumbered(processor: Any, new: Mapping[int, int]) -> Any:
    if not processor:
        return processor
    changed = dict(processor)
    if changed.get("processors"):
        changed["processors"] = [_renumbered(part, new) for part in changed["processors"]]
    if changed.get("special_tokens"):
        changed["special_tokens"] = {
            name: {**token, "ids": [new[i] for i in token["ids"]]} for name, token in changed["special_tokens"].items()
        }
    for name in ("sep", "cls"):
        if name in changed:
            changed[name] = [changed[name][0], new[changed[name][1]]]
    return changed


def independent(rows: int, fixed: Sequence[int] = ()) -> Lexicon:
    """A vocabulary of which nothing is known but its size: any row may leave."""
    return Lexicon(rows, {}, frozenset(fixed))
