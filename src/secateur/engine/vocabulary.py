"""Tokens: those leave that a method names first, as many as are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from secateur.allocate import part_of
from secateur.engine.keeping import Decision
from secateur.engine.run import Run
from secateur.errors import BudgetError, UnsupportedModelError
from secateur.methods import VocabularyMethod
from secateur.models.vocabulary import lexicon_of, named_tokens
from secateur.structure import Anatomy, Group
from secateur.structure.lexicon import VOCABULARY, Lexicon
from secateur.structure.surgery import complement

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_vocabulary(method: VocabularyMethod, model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Raises UnsupportedModelError."""
    if reason := anatomy[VOCABULARY].frozen:
        raise UnsupportedModelError(f"the vocabulary of {type(model).__name__} must stay: {reason}")


def decide_vocabulary(method: VocabularyMethod, run: Run) -> None:
    """The tokens that stay. Raises UnsupportedModelError, BudgetError."""
    group = run.anatomy[VOCABULARY]
    # refused before anything is read
    lexicon = _lexicon(method, run, group)
    for _ in run.blocks("check"):
        pass
    assert run.tokens is not None  # it uses data
    counts = torch.bincount(run.tokens.ids.flatten(), minlength=group.units)
    gone = _leaving(method, method.order(lexicon, counts.tolist()), group, lexicon)
    if gone:
        kept = complement(torch.tensor(gone), group.units)
        read = int(counts[gone].sum())
        note = (
            f"{len(gone):,} of {group.units:,} tokens leave, and {len(gone) * group.cost.params:,} parameters;"
            f" {read / max(int(counts.sum()), 1):.2%} of the calibration text is read as other tokens then"
        )
        run.keeper.close(iter([Decision({VOCABULARY: group.units}, {VOCABULARY: kept}, notes=[note])]))


def _lexicon(method: VocabularyMethod, run: Run, group: Group) -> Lexicon:
    lexicon = lexicon_of(run.tokenizer, group.units)
    beyond = sorted(i for i in method.protected if i >= group.units)
    if beyond:
        raise BudgetError(f"protect names token {beyond[0]}, the vocabulary ends at {group.units - 1}")
    return replace(lexicon, fixed=lexicon.fixed | method.protected | set(named_tokens(run.source.model)))


def _leaving(method: VocabularyMethod, order: Iterator[tuple[int, int]], group: Group, lexicon: Lexicon) -> list[int]:
    gone: list[int] = []
    count = group.units if method.min_count else part_of(group.units, method.sparsity)
    for token, read in order:
        if len(gone) == count or (method.min_count and read >= method.min_count):
            break
        gone.append(token)
    if len(gone) < count and not method.min_count:
        raise BudgetError(
            f"can't remove {count:,} of {group.units:,} tokens: {len(lexicon.fixed):,} are symbols, special tokens or"
            f" protected, and with what these are merged from {group.units - len(gone):,} must stay"
        )
    kept = group.units - len(gone)
    stay = min(-(-kept // method.round_to) * method.round_to, group.units)
    return gone[: group.units - stay]
