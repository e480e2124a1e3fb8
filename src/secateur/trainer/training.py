"""One training in memory: a network, its examples, an optimizer, perhaps masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from secateur.errors import UsageError
from secateur.loop import Keeper, Loop, Pace, Progress, examples_of
from secateur.loop.loop import Forgetful
from secateur.plans import Plan
from secateur.ranks import ALONE, Ranks
from secateur.train.flops import Flops
from secateur.trainer.curve import TrainingCurve
from secateur.trainer.examples import Examples
from secateur.trainer.recipe import TrainRecipe
from secateur.trainer.sparse import Sparse

Watch = Callable[[TrainingCurve], None]


@dataclass(frozen=True)
class Trained:
    """What a training gave; ``plan`` and what follows only where something was pruned."""

    curve: TrainingCurve
    plan: Plan | None = None
    sparsity: float = 0.0
    layers: Mapping[str, float] | None = None
    """sparsity by the name of the weight, or of the group of channels"""
    flops: Flops | None = None


def train(
    model: Any,
    examples: Examples,
    recipe: TrainRecipe,
    *,
    first: int = 0,
    last: int | None = None,
    seed: int | None = None,
    keeper: Keeper | None = None,
    watch: Watch = lambda curve: None,
    ranks: Ranks = ALONE,
    progress: Progress = lambda stage, done, total: None,
) -> Trained:
    """Train ``model`` in place, on its device, as the recipe says; afterwards it is in eval mode.

    ``first`` and ``last`` are steps of the whole training, whose learning rates hold; the optimizer is a new one.
    ``seed`` is that of the order of examples, where it isn't the recipe's. ``watch`` sees the curve after every step.
    Raises UsageError, DataError, NonFiniteError, and what ``keeper`` raises.
    """
    whole = recipe.length(examples.count)
    last = whole if last is None else last
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise UsageError(f"{type(model).__name__} has no parameters to train")
    optimizer = recipe.optimizer.made(parameters.values())
    seed = recipe.seed if seed is None else seed
    sparse = _sparse(model, optimizer, recipe, examples, whole, seed)
    pace = Pace(
        last - first,
        recipe.batch,
        recipe.rate(whole),
        micro=recipe.micro,
        clip=recipe.clip,
        seed=seed,
        dtype=recipe.dtype,
        done=first,
        measured_every=recipe.measured_every(whole),
    )
    loop = Loop(
        model,
        parameters,
        optimizer,
        examples.loss,
        examples.count,
        pace,
        device=next(iter(parameters.values())).device,
        callbacks=() if sparse is None else (sparse,),
        ranks=ranks,
        what=examples.what,
    )

    def measure(curve: TrainingCurve) -> None:
        curve.measured.append((curve.steps, ranks.on_main(lambda: examples.measure(model))))

    try:
        curve = loop.run(
            TrainingCurve(), _Noting(sparse, keeper or Forgetful(), watch), measure, progress, stage="train"
        )
        return _trained(curve, sparse, examples)
    finally:
        if sparse is not None:
            sparse.end()
        model.eval()


def _sparse(
    model: Any, optimizer: Any, recipe: TrainRecipe, examples: Examples, steps: int, seed: int
) -> Sparse | None:
    spec = recipe.sparsifier
    if spec is None:
        return None
    method = spec.made(steps, recipe.seed)
    arguments = {
        "method": spec.method,
        "units": spec.units,
        "include": spec.include,
        "exclude": spec.exclude,
        **spec.all_options(steps, recipe.seed),
    }
    if spec.units == "channels":
        arguments["example_inputs"], arguments["example_kwargs"] = examples.example()
    # the examples of the first step, whether or not it is this sitting that takes it
    return Sparse(
        model,
        optimizer,
        arguments,
        lambda: examples.first_look(examples_of(0, recipe.batch, examples.count, seed)) if method.needed() else {},
    )


def _trained(curve: TrainingCurve, sparse: Sparse | None, examples: Examples) -> Trained:
    if sparse is None:
        return Trained(curve)
    made = sparse.sparsifier
    args, kwargs = examples.example()
    plan = made.plan()
    # those of a network with fewer channels are counted when it is cut
    flops = None if plan.keep else made.flops(*args, **kwargs)
    return Trained(curve, plan, made.sparsity, made.sparsities, flops)


class _Noting(Keeper):
    """Notes the sparsity behind every step, before it is kept."""

    def __init__(self, sparse: Sparse | None, keeper: Keeper, watch: Watch) -> None:
        self._sparse, self._keeper, self._watch = sparse, keeper, watch

    def restored(self) -> tuple[Any, Mapping[str, Tensor]] | None:
        return self._keeper.restored()

    def finished(self, curve: TrainingCurve, state: Callable[[], Mapping[str, Tensor]], *, last: bool) -> None:
        if self._sparse is not None:
            curve.sparsities.append(self._sparse.sparsifier.sparsity)
        self._watch(curve)
        self._keeper.finished(curve, state, last=last)
