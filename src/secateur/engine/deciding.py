"""Which part of the engine decides what a method removes."""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.allocators import Allocator, check_follows
from secateur.engine.coupled import decide_coupled
from secateur.engine.hidden import check_hidden, decide_hidden
from secateur.engine.iterative import decide_iteratively
from secateur.engine.keeping import Keeper
from secateur.engine.layers import check_layers, decide_layers
from secateur.engine.policies import decide_by_policy
from secateur.engine.refits import refit
from secateur.engine.rotations import check_rotation, decide_rotations
from secateur.engine.run import Progress, Run
from secateur.engine.search import decide_searched
from secateur.engine.sublayers import check_sublayers, decide_sublayers
from secateur.engine.supernet import decide_supernet
from secateur.engine.training import decide_trained
from secateur.engine.units import check_units, decide_units
from secateur.engine.vocabulary import check_vocabulary, decide_vocabulary
from secateur.engine.weights import check_weights, decide_weights
from secateur.errors import UsageError
from secateur.methods import (
    CoupledMethod,
    HiddenMethod,
    IterativeMethod,
    LayerMethod,
    Method,
    PolicyMethod,
    Refittable,
    RotationMethod,
    SearchMethod,
    StructuredMethod,
    SublayerMethod,
    SupernetMethod,
    TrainedMethod,
    UnitMethod,
    VocabularyMethod,
    WeightMethod,
)
from secateur.models.loading import check_sums
from secateur.models.sources import Source
from secateur.observe.activations import Activations
from secateur.observe.calibration import Tokens
from secateur.ranks import ALONE, Ranks
from secateur.structure import Anatomy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def decide(
    method: Method,
    source: Source,
    tokens: Tokens | None,
    *,
    dtype: torch.dtype,
    batch_tokens: int,
    progress: Progress,
    keeper: Keeper | None = None,
    hidden: Activations | None = None,
    statistics: Path | None = None,
    ranks: Ranks = ALONE,
    allocator: Allocator | None = None,
    allocator_statistics: Path | None = None,
    latency_table: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Keeper:
    """What ``method`` removes from the model of ``source``; ``tokens`` are its calibration windows.

    Blocks that ``keeper`` has finished are left out. ``hidden`` are the activations at that point, or empty ones.
    ``statistics`` is a folder in which those of the dense model are kept, and found again, one file per block.
    Each of the ``ranks`` walks its part of the windows, and all of them decide the same. The ``allocator`` gives
    every matrix its sparsity first; its statistics are kept in ``allocator_statistics``. ``latency_table`` is the file
    of a budget of latency, by default one in the user's cache. The ``tokenizer`` tells methods for the vocabulary what
    its tokens are.
    """
    if allocator is not None:
        check_follows(allocator, method)
    check_sums(source.device)
    run = Run(method, source, tokens, dtype, batch_tokens, progress, keeper or Keeper(), hidden, statistics, ranks)
    run.tokenizer = tokenizer
    run.allocator, run.allocator_statistics, run.latency_table = allocator, allocator_statistics, latency_table
    check_model(method, source.model, run.anatomy)
    if not run.keeper.closed:
        _decide(method, run)
    if isinstance(method, Refittable) and method.refits_later and run.keeper.closed:
        refit(run, method)
    return run.keeper


@singledispatch
def check_model(method: Any, model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Refuse what a method can't do to this model, as far as its anatomy tells. Raises SecateurError."""


check_model.register(WeightMethod, check_weights)
check_model.register(SearchMethod, check_weights)
check_model.register(StructuredMethod, check_units)
check_model.register(LayerMethod, check_layers)
check_model.register(SublayerMethod, check_sublayers)
check_model.register(RotationMethod, check_rotation)
check_model.register(HiddenMethod, check_hidden)
check_model.register(VocabularyMethod, check_vocabulary)


@singledispatch
def _decide(method: Any, run: Run) -> None:
    raise UsageError(f"{method.name} is not a post-training method of this engine")


_decide.register(WeightMethod, decide_weights)
_decide.register(SearchMethod, decide_searched)
_decide.register(UnitMethod, decide_units)
_decide.register(CoupledMethod, decide_coupled)
_decide.register(IterativeMethod, decide_iteratively)
_decide.register(PolicyMethod, decide_by_policy)
_decide.register(SupernetMethod, decide_supernet)
_decide.register(TrainedMethod, decide_trained)
_decide.register(LayerMethod, decide_layers)
_decide.register(SublayerMethod, decide_sublayers)
_decide.register(RotationMethod, decide_rotations)
_decide.register(HiddenMethod, decide_hidden)
_decide.register(VocabularyMethod, decide_vocabulary)
