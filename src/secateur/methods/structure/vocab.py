"""Vocab: remove the tokens that a text doesn't need, and the rest of the tokenizer follows.

A small model spends a fifth to two thirds of its parameters on the embedding and the head of a vocabulary for every
language. Tokens leave one by one, and their rows with them:

    leaf         a token that no token which stays is merged from                     (BPE; others: any)
    next         the leaf that the text reads least often, the newest of equals       it leaves
    count[part] += count[leaf]    for the parts that it was merged from               they are read in its place

``rule=last`` takes the newest leaf instead, whatever is read. The published rules that take tokens which others are
merged from are left out: what is merged from such a token can't be reached any more.

Single symbols and bytes, special and added tokens, and those that the config names always stay, so that any text still
has tokens. A merge stays if both of its parts and its result do: text whose tokens all stay is tokenised as before,
and gets the same logits for the tokens that are left. The more of the text is read, the better the counts: one window
of 512 tokens tells little, give ``--samples``. Compare perplexities of different vocabularies per byte of text, not per
token; ``secateur evaluate`` counts losses per token of the dense tokenizer.

Source: the leaf-based rule of "Vocabulary pruning", arXiv:2512.03989, official code taidopurason/tokenizer-extension.
Differs: a token of SentencePiece-like BPE, which several merges can make, needs only the parts of the merge that does
make it, so that more may leave; tokens that no text gives are seen to be unused; words that ``ignore_merges`` looks up
are counted as they are read.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from secateur.errors import OptionError
from secateur.methods import Descriptor, VocabularyMethod, option, register
from secateur.structure.lexicon import Lexicon


@register("vocab")
@dataclass(frozen=True, kw_only=True)
class Vocab(VocabularyMethod):
    """Options of vocab; the rule is the published one."""

    rule: str = option(
        "leaf",
        "which token leaves next: the leaf that is read least, or the newest leaf",
        choices=("leaf", "last"),
    )

    descriptor: ClassVar = Descriptor(
        object="vocabulary",
        granularity="structured_group",
        score="frequency",
        allocation="global",
        data="unlabelled_calibration",
        speedup="real",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_count and self.rule == "last":
            raise OptionError("min_count is about what is read, and rule=last isn't: give a sparsity")

    def order(self, lexicon: Lexicon, counts: Sequence[int]) -> Iterator[tuple[int, int]]:
        left = list(counts)
        needed = [0] * lexicon.rows
        for parts in lexicon.needs.values():
            for part in parts:
                needed[part] += 1

        def turn(token: int) -> tuple[bool, int, int]:
            # rows without a token first, then by what is read, then the newest
            return token not in lexicon.unused, 0 if self.rule == "last" else left[token], -token

        heap = [turn(t) for t in range(lexicon.rows) if not needed[t] and t not in lexicon.fixed]
        heapq.heapify(heap)
        while heap:
            token = -heapq.heappop(heap)[2]
            yield token, left[token]
            for part in lexicon.needs.get(token, ()):
                left[part] += left[token]
                needed[part] -= 1
                if not needed[part] and part not in lexicon.fixed:
                    heapq.heappush(heap, turn(part))
