"""What a training gave, as a report."""

from __future__ import annotations

from typing import Any

from secateur.report import Metric, Report
from secateur.trainer.examples import Examples
from secateur.trainer.networks import Network
from secateur.trainer.recipe import TrainRecipe
from secateur.trainer.training import Trained
from secateur.versions import library_versions, machine

# what larger values of a measured number mean
_HIGHER_IS_BETTER = {"accuracy": True, "perplexity": False, "loss": False}
_UNITS = {"accuracy": "fraction"}


def report_of(recipe: TrainRecipe, network: Network, examples: Examples, trained: Trained) -> Report:
    """The report, with the training as one of its sections."""
    spec = recipe.sparsifier
    steps = recipe.length(examples.count)
    report = Report(
        model=network.name,
        method=spec.method if spec is not None else "",
        options=spec.made(steps, recipe.seed).options() if spec is not None else {},
        requested="the schedule of the method" if spec is None else f"a sparsity of {_asked(recipe, steps):.1%}",
        achieved=trained.sparsity,
        metrics=[*_measured(examples, trained), *_counted(network, trained)],
        trainings=[section(recipe, examples, trained)],
        versions=library_versions(),
        machine=machine(),
        seconds={"train": trained.curve.seconds},
    )
    return report


def section(recipe: TrainRecipe, examples: Examples, trained: Trained) -> dict[str, Any]:
    """The training as JSON-ready values: the curves, and how it was trained."""
    curve = trained.curve
    return {
        "what": examples.what,
        "quality": examples.quality,
        "count": examples.count,
        "batch": recipe.batch,
        "rates": [recipe.rate(recipe.length(examples.count))(step) for step in range(curve.steps)],
        "losses": curve.losses,
        "sparsities": curve.sparsities,
        "measured": curve.measured,
        "layers": dict(trained.layers or {}),
        "protocol": examples.protocol,
        "recipe": recipe.model_dump(exclude={"out"}, exclude_none=True),
    }


def _asked(recipe: TrainRecipe, steps: int) -> float:
    assert recipe.sparsifier is not None
    method = recipe.sparsifier.made(steps, recipe.seed)
    return method.schedule()(method.updates().end or steps)


def _measured(examples: Examples, trained: Trained) -> list[Metric]:
    (_, before), (_, after) = trained.curve.measured[0], trained.curve.measured[-1]
    return [
        Metric(
            name,
            _UNITS.get(name, ""),
            {"start": before[name], "trained": after[name]},
            higher_is_better=_HIGHER_IS_BETTER[name],
            protocol=examples.protocol,
        )
        for name in after
    ]


def _counted(network: Network, trained: Trained) -> list[Metric]:
    found = []
    total = sum(p.numel() for p in network.module.parameters())
    if trained.layers:
        zeros = sum(int((p == 0).sum()) for p in network.module.parameters())
        found.append(Metric("parameters that aren't zero", "parameters", {"start": total, "trained": total - zeros}))
    if trained.flops is not None:
        flops = trained.flops
        protocol = "two for a multiply-accumulate of one example; what a machine that makes use of zeros would save"
        for name, dense, sparse in (
            ("operations of inference", flops.dense, flops.inference),
            ("operations of a training step", flops.dense_training, flops.training),
        ):
            values = {"start": dense, "trained": sparse}
            found.append(Metric(name, "", values, higher_is_better=False, protocol=protocol))
    return found
