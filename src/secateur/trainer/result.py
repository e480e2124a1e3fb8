"""What a training gave, as a report."""

from __future__ import annotations

from typing import Any

from secateur.report import Metric, Report
from secateur.train.flops import count
from secateur.trainer.examples import Examples
from secateur.trainer.networks import Network
from secateur.trainer.recipe import TrainRecipe
from secateur.trainer.training import Trained
from secateur.versions import library_versions, machine

# what larger values of a measured number mean
_HIGHER_IS_BETTER = {"accuracy": True, "perplexity": False, "loss": False}
_UNITS = {"accuracy": "fraction"}


def report_of(recipe: TrainRecipe, dense: Network, network: Network, examples: Examples, trained: Trained) -> Report:
    """The report, with the training as one of its sections.

    ``dense`` is the network as it was trained, with its zeros, and ``network`` the one that is written.
    """
    spec = recipe.sparsifier
    steps = recipe.length(examples.count)
    report = Report(
        model=network.name,
        method=spec.method if spec is not None else "",
        options=spec.made(steps, recipe.seed).options() if spec is not None else {},
        requested=_requested(recipe, steps),
        achieved=trained.sparsity,
        metrics=[*_measured(examples, trained), *_counted(dense, network, examples, trained)],
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


def _requested(recipe: TrainRecipe, steps: int) -> str:
    if recipe.sparsifier is None:
        return "the schedule of the method"
    of = " of the channels" if recipe.sparsifier.units == "channels" else ""
    return f"a sparsity of {_asked(recipe, steps):.1%}{of}"


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


def _counted(dense: Network, network: Network, examples: Examples, trained: Trained) -> list[Metric]:
    found = []
    modules = {"start": dense.module, "trained": network.module}
    sizes = {name: float(sum(p.numel() for p in module.parameters())) for name, module in modules.items()}
    if network is not dense:
        args, kwargs = examples.example()
        operations = {name: float(count(module, {}, args, kwargs)[0]) for name, module in modules.items()}
        found.append(Metric("parameters", "parameters", sizes))
        protocol = "two for a multiply-accumulate of one example"
        found.append(Metric("operations of inference", "", operations, higher_is_better=False, protocol=protocol))
    elif trained.layers:
        sizes["trained"] -= sum(int((p == 0).sum()) for p in network.module.parameters())
        found.append(Metric("parameters that aren't zero", "parameters", sizes))
    if trained.flops is not None:
        flops = trained.flops
        protocol = "two for a multiply-accumulate of one example; what a machine that makes use of zeros would save"
        for name, before, after in (
            ("operations of inference", flops.dense, flops.inference),
            ("operations of a training step", flops.dense_training, flops.training),
        ):
            values = {"start": before, "trained": after}
            found.append(Metric(name, "", values, higher_is_better=False, protocol=protocol))
    return found
