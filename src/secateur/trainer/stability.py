"""How stable a training is, from a recipe: two copies part at a step and see their examples in different orders.

A recipe of a training, with a key that may say more:

    stability: {at: [0, 20, "3%"], masks: found/seed-0/level-12}

The first weights, and those at the step where copies part, are the ones of a lottery with the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from torch import nn

from secateur.drawing import seeded
from secateur.loop import examples_of
from secateur.methods.rounds import checked_step
from secateur.recipes import Section, read_recipe
from secateur.rounds import Run, Stability, instability
from secateur.rounds.stability import STABLE
from secateur.rounds.stabilitypage import Limit
from secateur.trainer.examples import Examples, load_examples
from secateur.trainer.networks import Progress, first_network, open_network
from secateur.trainer.recipe import TrainRecipe, checked_recipe, trusted
from secateur.trainer.training import train


class StabilitySpec(Section):
    """The value of ``stability``; ``at`` are steps or parts of the training, ``batches`` those on which statistics of
    batch norms are taken again.
    """

    at: list[int | str] = Field(default_factory=lambda: [0], min_length=1)
    masks: str | None = None
    points: int = Field(default=30, ge=2)
    statistics: Literal["recompute", "interpolate"] = "recompute"
    batches: int = Field(default=16, ge=1)
    metric: Literal["accuracy", "loss", "perplexity"] | None = None
    within: float | None = Field(default=None, gt=0)

    @field_validator("at", mode="before")
    @classmethod
    def _one_step(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]


class StabilityRecipe(TrainRecipe):
    """A training, and where its copies part."""

    stability: StabilitySpec = Field(default_factory=StabilitySpec)

    @model_validator(mode="after")
    def _decided(self) -> StabilityRecipe:
        self.check_repeated("copies hold the masks of a plan or of a level of a lottery (stability.masks)")
        metrics = ("perplexity", "loss") if self.data.text is not None else ("accuracy", "loss")
        metric = self.stability.metric or metrics[0]
        if metric not in metrics:
            raise ValueError(f"stability.metric is one of {', '.join(metrics)}, which are measured, got '{metric}'")
        if metric != "accuracy" and self.stability.within is None:
            raise ValueError(
                f"say with stability.within how much higher the {metric} between copies may be: the published 2 % are"
                " of accuracy"
            )
        return self

    def check(self) -> None:
        super().check()
        self.parting(self.steps or 1_000_000_000)

    def parting(self, length: int) -> list[int]:
        """The steps at which copies part, of a training of that length. Raises OptionError."""
        return [checked_step("stability.at", str(step), length) for step in self.stability.at]

    @property
    def limit(self) -> Limit:
        """What decides."""
        spec = self.stability
        if spec.metric == "accuracy" or (spec.metric is None and self.data.text is None):
            return Limit("accuracy", STABLE / 100 if spec.within is None else spec.within, "fraction")
        assert spec.within is not None
        return Limit(spec.metric or "perplexity", spec.within)


def load_stability_recipe(
    path: str | Path, changed: Mapping[str, Any], *, trust_remote_code: bool = False, **given: Any
) -> StabilityRecipe:
    """Read and validate a recipe; ``changed`` replaces keys of ``stability``, ``given`` others of the recipe.

    Code that the file names is refused unless ``trust_remote_code`` is set. Raises UsageError with the file and the
    place.
    """
    data = {**read_recipe(path), **given}
    spec = data.get("stability", {})
    if changed and isinstance(spec, dict):
        data["stability"] = {**spec, **changed}
    return trusted(make_stability_recipe(data, str(path)), path, trust_remote_code)


def make_stability_recipe(data: Mapping[str, Any], where: str) -> StabilityRecipe:
    """A validated recipe from plain values; ``where`` names their origin in errors. Raises UsageError."""
    return checked_recipe(StabilityRecipe, data, where, {"stability": StabilitySpec})


def run_stability(
    recipe: StabilityRecipe,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Stability:
    """Train the copies of a recipe, and look at the lines between them; steps that are done are kept in ``folder``.

    Raises UsageError, DataError, ModelError, PlanError, OutputError and NonFiniteError.
    """
    opened = open_network(recipe, trust_remote_code=trust_remote_code, progress=progress)
    examples = load_examples(recipe, opened.module, opened.tokenizer)
    length = recipe.length(examples.count)
    spec = recipe.stability
    # between copies only what they end with counts
    quick = recipe.model_copy(update={"measure": length})

    def trained(network: nn.Module, run: Run) -> None:
        train(network, examples, quick, first=run.first_step, last=run.last_step, seed=run.seed)

    return instability(
        first_network(recipe, opened.module, trust_remote_code=trust_remote_code),
        trained,
        examples.measure,
        at=recipe.parting(length),
        length=length,
        masks=spec.masks,
        points=spec.points,
        statistics=spec.statistics,
        data=_batches(recipe, examples),
        seed=recipe.seed,
        # where copies part is what one goes on for, and what decides is said afterwards
        about={
            "recipe": recipe.model_dump(
                mode="json",
                exclude={"out": True, "seed": True, "measure": True, "stability": {"at", "metric", "within"}},
            ),
            "examples": examples.fingerprint,
        },
        folder=folder,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )


def _batches(recipe: StabilityRecipe, examples: Examples) -> list[Any]:
    """What statistics are taken again on: the first batches of the training, the same at every point of every line."""
    with seeded(recipe.seed):
        return [
            examples.inputs(examples_of(step, recipe.batch, examples.count, recipe.seed))
            for step in range(recipe.stability.batches)
        ]
