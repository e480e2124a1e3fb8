"""``secateur evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.network import NETWORK, evaluate_networks
from secateur.cli.options import AllowPickle, Device, Inputs, Json, Quiet, Revision, TrustRemoteCode, only_for
from secateur.cli.output import print_json, show, working
from secateur.errors import UsageError
from secateur.kinds import DECODER_TASKS, NETWORK_TASKS
from secateur.networks.kinds import is_named_network


def evaluate(
    context: typer.Context,
    model: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Models; the first is the baseline. Language models, or .onnx files and package.module:function.",
        ),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="TASK",
            help="perplexity:builtin|FILE|DATASET, speed, request:KEY=N,..., size, lm_eval:NAME; repeatable "
            f"(default: {', '.join(DECODER_TASKS)}). Of other networks accuracy:IMAGES, latency, macs, size "
            f"(default: {', '.join(NETWORK_TASKS)}).",
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text that perplexity reads.")] = 40,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random choice.")] = 0,
    text_field: Annotated[
        str | None, typer.Option("--text-field", metavar="NAME", help="Field of a jsonl or parquet file with the text.")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="Dtype that the models are loaded in.")] = "float32",
    device: Device = "cpu",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    input: Inputs = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    names = model_names(model)
    traced = [name for name in model if is_named_network(name)]
    if traced and len(traced) < len(model):
        other = next(name for name in model if name not in traced)
        raise UsageError(f"{traced[0]} and {other} can't be measured side by side: one is a language model")
    if traced:
        only_for(NETWORK, context, {"model", "task", "seed", "input", "json", "quiet"}, "language models")
        chosen = list(dict.fromkeys(task or NETWORK_TASKS))
        evaluate_networks(
            dict(zip(names, model, strict=True)), chosen, inputs=input or [], seed=seed, json=json, quiet=quiet
        )
        return
    only_for("a language model", context, {str(p.name) for p in context.command.params} - {"input"}, "traced networks")
    tasks = list(dict.fromkeys(task or DECODER_TASKS))
    revisions = model_revisions(model, revision)
    from secateur import api
    from secateur.evaluation import make_task

    for name in tasks:
        make_task(name)
    with working(quiet) as progress:
        options = {
            "dtype": dtype,
            "device": device,
            "trust_remote_code": trust_remote_code,
            "allow_pickle": allow_pickle,
            "progress": progress,
        }
        loaded = [api.load(m, revision=of, **options) for m, of in zip(model, revisions, strict=True)]
        models = {name: pair[0] for name, pair in zip(names, loaded, strict=True)}
        tokenizer = loaded[0][1]
        folders = {name: path for name, path in zip(names, model, strict=True) if Path(path).is_dir()}
        table = api.evaluate(
            models,
            tokenizer,
            tasks,
            length=length,
            windows=windows,
            seed=seed,
            text_field=text_field,
            folders=folders,
            tokenizers={name: pair[1] for name, pair in zip(names, loaded, strict=True)},
            progress=progress,
        )
    if json:
        commits = {name: getattr(m, "secateur_revision", "") for name, m in models.items()}
        found = {name: commit for name, commit in commits.items() if commit}
        print_json({**table.to_dict(), **({"revisions": found} if found else {})})
        return
    from secateur.report.speeds import decode_sentence
    from secateur.report.tables import metrics_table

    show(metrics_table(table.metrics))
    # it is about two models
    if len(table.models) == 2 and (why := decode_sentence(table.metrics)):
        show(why)


def model_names(models: list[str]) -> list[str]:
    """Short names for the columns: the last part of a path where that tells the models apart.

    Raises UsageError for a model given twice.
    """
    twice = next((m for m in models if models.count(m) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is given twice; every model needs a name of its own")
    short = [Path(model).name or model for model in models]
    return short if len(set(short)) == len(short) else models


def model_revisions(models: list[str], revision: str | None) -> list[str | None]:
    """The revision of every model: ``revision`` for the one of the hub, None for the others.

    Raises UsageError when it would be that of no model or of several.
    """
    if revision is None:
        return [None] * len(models)
    from secateur.models.loading import named_on_hub

    hub = [model for model in models if named_on_hub(model)]
    if len(hub) > 1:
        raise UsageError(
            f"--revision would be that of {' and '.join(hub)}: write it into each, as in hf://owner/name@{revision}"
        )
    if not hub:
        raise UsageError(f"--revision is for models of the hub, and none of {', '.join(models)} is one")
    return [revision if model in hub else None for model in models]
