"""Recovery of a decoder: AdamW, a warm-up and a fall, on windows of a text; see ``loop`` for the steps themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import DataError, NonFiniteError, UsageError
from secateur.healing.recovery.curve import Curve
from secateur.healing.recovery.forwards import cast_once
from secateur.healing.recovery.losses import Objective
from secateur.healing.recovery.options import RecoveryOptions
from secateur.healing.recovery.precision import settled
from secateur.healing.recovery.states import FinalStates
from secateur.healing.recovery.trained import STRATEGIES, Trained
from secateur.loop import Callback, Keeper, Loop, Pace, Progress, Rate
from secateur.ranks import ALONE, Ranks
from secateur.ranks.shards import Pieces, sharded


@dataclass(frozen=True)
class Windows:
    """Token ids, ``trained_on`` [windows, length] and ``held_out`` [windows, length], int64 on the CPU."""

    trained_on: Tensor
    held_out: Tensor


def learning_rate(options: RecoveryOptions) -> Rate:
    """By the number of a step, from 0, among those of all stages."""
    return Rate(
        options.peak_rate,
        options.whole,
        options.schedule,
        warmup=options.warmup,
        cooldown=options.cooldown,
        floor=options.floor,
    )


def recover(
    model: Any,
    windows: Windows,
    options: RecoveryOptions,
    *,
    teacher: nn.Module | None = None,
    states: FinalStates | None = None,
    layers: Sequence[int] = (),
    modules: Sequence[str] = (),
    masks: Mapping[str, Tensor] | None = None,
    lora_ranks: Mapping[str, int] | None = None,
    callback: Callback | None = None,
    keeper: Keeper | None = None,
    measure: Callable[[Any], float] | None = None,
    ranks: Ranks = ALONE,
    pieces: Pieces = lambda model: (),
    progress: Progress = lambda stage, done, total: None,
) -> Curve:
    """Train ``model`` in place, on its device; returns the curve. Afterwards it is an ordinary model in eval mode.

    ``modules`` are the names of those that can have adapters, ``masks`` (boolean, True = kept) what must stay zero,
    ``layers`` the blocks of ``teacher`` that the blocks of the model came from, ``states`` what is known of it already,
    ``lora_ranks`` ranks by module where they differ; ``callback`` takes part in every step. ``measure`` gives the
    held-out perplexity of a model. All ``ranks`` call this together and share the windows of every step; with ``fsdp``
    they share the weights, too, and gather one of the ``pieces`` of a model, its blocks, at a time. After an error
    adapters are gone; with ``full`` and ``norms`` the model stays where it was, and one that was sharded has no
    weights, nor has its teacher. Raises UsageError, DataError, NonFiniteError when a loss is NaN, MissingExtraError,
    and what ``callback`` and ``keeper`` raise.
    """
    if len(windows.trained_on) == 0:
        raise DataError("there is nothing to train on: the text has no window beside those that are held out")
    if options.fsdp and callback is not None:
        raise UsageError("heads and neurons that leave while adapters are trained need whole weights: leave fsdp out")
    terms = options.terms(teacher is not None)
    trained = STRATEGIES[options.train](model, options, masks or {}, modules=modules, ranks=lora_ranks)
    taking_part = callback or Callback()
    models = [one for one in (model, teacher) if one is not None]
    spread = options.fsdp and ranks.size > 1
    try:
        with sharded(models, pieces, ranks) if spread else nullcontext(models) as (stepped, *dense):
            trained.follow(stepped)
            # of a teacher that is spread over ranks all of them must compute the same pieces
            known = None if spread else states
            objective = Objective(
                terms, options.temperature, *(dense or [None]), layers=layers, blocks=pieces, states=known
            )
            loop = _loop(stepped, trained, objective, windows.trained_on, options, ranks, taking_part)
            taking_part.begin(stepped)
            curve = Curve(options.batch * windows.trained_on.shape[1])
            # all ranks take part in the forwards of a model that is spread over them
            note = _noting(stepped, measure, ALONE if spread else ranks, learning_rate(options).peak)
            # who computes activations again is short of memory; a model that is spread holds a part of its weights
            kept = () if spread or options.checkpointing else (*stepped.modules(), *map(_head, dense))
            with _checkpointing(stepped, options), cast_once(kept):
                curve = loop.run(curve, keeper, note, progress, "heal")
    except BaseException:
        taking_part.end()
        trained.finish(learnt=False)
        raise
    finally:
        model.eval()
    taking_part.end()
    trained.finish()
    return curve


def _loop(
    model: Any,
    trained: Trained,
    objective: Objective,
    ids_NT: Tensor,
    options: RecoveryOptions,
    ranks: Ranks,
    callback: Callback,
) -> Loop:
    pace = Pace(
        options.steps,
        options.batch,
        learning_rate(options),
        micro=options.micro,
        clip=options.clip,
        seed=options.seed,
        dtype=settled(options, model.device).dtype,
        done=options.done,
        measured_every=options.measured_every,
    )
    parameters = trained.parameters
    return Loop(
        model,
        parameters,
        torch.optim.AdamW(parameters.values(), lr=0.0, weight_decay=options.decay),
        lambda one, windows, step: objective(one, ids_NT[windows].to(model.device)),
        len(ids_NT),
        pace,
        device=model.device,
        callbacks=(trained, callback),
        ranks=ranks,
        what="windows",
    )


def _head(model: Any) -> nn.Module:
    return model.get_output_embeddings()


def _noting(
    model: Any, measure: Callable[[Any], float] | None, ranks: Ranks, rate: float
) -> Callable[[Curve], None] | None:
    if measure is None:
        return None

    def note(curve: Curve) -> None:
        try:
            found = ranks.on_main(lambda: measure(model))
        except NonFiniteError as error:
            lower = f"try a lower learning rate (lr) than {rate:g}"
            why = f" after step {curve.steps}: {lower}" if curve.steps else ": the model is broken"
            raise NonFiniteError(f"{error}{why}; nothing was written") from None
        curve.measured.append((curve.steps, found))

    return note


@contextmanager
def _checkpointing(model: Any, options: RecoveryOptions) -> Iterator[None]:
    if not options.checkpointing:
        yield
        return
    # newer transformers have another name for it
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{kind}_checkpointing_disable")()
