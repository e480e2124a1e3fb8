"""``prune``, ``plan apply`` and ``inspect`` for traced networks: .onnx files, and modules that users' code makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.cli.output import print_json, show, show_notes, working
from secateur.errors import UsageError
from secateur.networks.kinds import is_onnx

if TYPE_CHECKING:
    from secateur.api import Result
    from secateur.plans import Plan

NETWORK = "a traced network"


@dataclass(frozen=True)
class NetworkJob:
    """What ``prune`` was asked to do with a traced network."""

    model: str
    method: str | None
    sparsity: float | None = None
    budget: str | None = None
    out: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    inputs: Sequence[str] = ()
    ignore: Sequence[str] = ()
    data: str | None = None
    loss: str | None = None
    evaluate: Sequence[str] = ()
    latency_table: Path | None = None


def prune_network(job: NetworkJob, *, html: bool, dry_run: bool, overwrite: bool, json: bool, quiet: bool) -> None:
    """``secateur prune`` of a traced network."""
    if job.method is None:
        raise UsageError("name a method with --method; 'secateur methods --object channels' lists them")
    if job.out is None and not dry_run:
        raise UsageError("give a folder or a .onnx or .pt2 file with --out, or --dry-run to see what would go")
    from secateur import api
    from secateur.networks.naming import load_batches, open_named
    from secateur.networks.saving import check_place, save_network
    from secateur.usercode import load_function

    if job.out is not None and not dry_run:
        check_place(job.out, onnx_model=is_onnx(job.model), overwrite=overwrite)
    from secateur.evaluation import make_network_tasks

    make_network_tasks(job.evaluate)
    with working(quiet) as progress:
        named = open_named(job.model, job.inputs)
        asked = {
            "method": job.method,
            "sparsity": job.sparsity,
            "budget": job.budget,
            "options": job.options,
            "seed": job.seed,
            "ignore": tuple(job.ignore),
            "data": load_batches(job.data) if job.data else None,
            "loss": load_function(job.loss, "module and batch") if job.loss else None,
            "latency_table": job.latency_table,
            "progress": progress,
            **named.arguments(),
        }
        if dry_run:
            made = api.plan(named.network, **asked)
        else:
            result = api.prune(named.network, **asked)
            assert job.out is not None
            if job.evaluate:
                models = {"dense": named.network, "pruned": result.model}
                measured = api.evaluate(models, None, job.evaluate, seed=job.seed, progress=progress, **named.called())
                counted = {metric.name for metric in result.report.metrics}
                result.report.metrics += [metric for metric in measured.metrics if metric.name not in counted]
            save_network(
                result.model,
                job.out,
                plan=result.plan,
                report=result.report,
                html=html,
                overwrite=overwrite,
                factory="" if is_onnx(job.model) else job.model,
            )
    if dry_run:
        _show_plan(made, json)
    else:
        show_notes(result.report.notes, quiet)
        _show_result(result, job.out or "", json)


def apply_to_network(plans: Sequence[Plan], model: str, out: str, *, overwrite: bool, json: bool, quiet: bool) -> None:
    """``secateur plan apply`` of a traced network."""
    from secateur import api
    from secateur.networks.naming import named_network
    from secateur.networks.saving import check_place, save_network

    if len(plans) > 1:
        raise UsageError(f"there are the plans of {len(plans)} steps; name one of them")
    if plans[0].inputs is None:
        if plans[0].model.num_layers:
            raise UsageError(f"the plan was made for a language model, not for {model}")
        raise UsageError(
            f"the plan masks single weights of a {plans[0].model.name}, and cuts nothing: lay it on trained weights in"
            " Python, with secateur.apply"
        )
    check_place(out, onnx_model=is_onnx(model), overwrite=overwrite)
    with working(quiet):
        cut = api.apply(plans[0], named_network(model))
        save_network(cut, out, plan=plans[0], overwrite=overwrite, factory="" if is_onnx(model) else model)
    show_notes((note for p in plans[0].provenance for note in p.notes), quiet)
    if json:
        from secateur.cli.plan import plan_document

        print_json({"output": out, "plans": [plan_document(plans[0])]})
        return
    show(_saved(out))


def inspect_network(
    model: str, *, inputs: Sequence[str], heads: str, ignore: Sequence[str], why: str | None, json: bool, quiet: bool
) -> None:
    """``secateur inspect`` of a traced network."""
    from secateur import api
    from secateur.cli.inspect import anatomy_document
    from secateur.networks.naming import open_named

    with working(quiet):
        named = open_named(model, inputs)
        anatomy = api.anatomy(named.network, heads=heads, ignore=ignore, **named.arguments())
    if why is not None:
        from secateur.report.coupled import reasons

        told = reasons(anatomy, why)
        if json:
            print_json({"model": model, "why": {place: text for place, text in told}})
        else:
            show(*(f"{place}: {text}" for place, text in told))
        return
    if json:
        print_json({"model": model, **anatomy_document(anatomy)})
        return
    from secateur.report.tables import anatomy_text

    show(anatomy_text(anatomy))


def evaluate_networks(
    models: Mapping[str, str], tasks: Sequence[str], *, inputs: Sequence[str], seed: int, json: bool, quiet: bool
) -> None:
    """``secateur evaluate`` of traced networks; ``models`` maps names in the table to what users wrote."""
    from secateur import api
    from secateur.evaluation import make_network_tasks
    from secateur.networks.naming import open_named
    from secateur.report.tables import metrics_table

    make_network_tasks(tasks)
    with working(quiet) as progress:
        opened = {name: open_named(model, inputs) for name, model in models.items()}
        table = api.evaluate(
            {name: named.network for name, named in opened.items()},
            None,
            tasks,
            seed=seed,
            progress=progress,
            **next(iter(opened.values())).called(),
        )
    if json:
        print_json(table.to_dict())
    else:
        show(metrics_table(table.metrics))


def _show_plan(plan: Plan, json: bool) -> None:
    from secateur.cli.plan import plan_document, show_plans

    if json:
        print_json({"dry_run": True, "plans": [plan_document(plan)]})
    else:
        show_plans([plan])


def _show_result(result: Result, out: str, json: bool) -> None:
    from secateur.report.tables import metrics_table

    if json:
        print_json({**result.report.to_dict(), "output": out})
        return
    show(metrics_table(result.report.metrics))
    show(_saved(out))


def _saved(out: str) -> str:
    return f"saved to {out}" + ("" if out.endswith((".onnx", ".pt2")) else f"; {out}/README.md says how to load it")
