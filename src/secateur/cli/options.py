"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

import typer

from secateur.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no notes.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]
Device = Annotated[str, typer.Option("--device", help="Device that torch computes on.", metavar="NAME")]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="NAME", help="Branch, tag or commit of a model on the hub."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the modelling code that comes with the checkpoint, and code that a recipe names.",
    ),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option("--max-shard-size", metavar="SIZE", help="Weight files are at most this large (default 5GB)."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped or killed.")]
EstimateFirst = Annotated[
    bool,
    typer.Option("--estimate/--no-estimate", help="Say first what it takes, and refuse what can't fit (default)."),
]
ExpectedFirst = Annotated[
    bool,
    typer.Option(
        "--estimate/--no-estimate",
        help="Say first what points take that run one after the other, and refuse what can't fit (default).",
    ),
]
DEFAULT_WORKERS = 2
Address = Annotated[
    str | None, typer.Option("--address", metavar="ADDR", help="Ray cluster to use (default: a Ray on this machine).")
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        metavar="N",
        help="Processes that work at the same time, each with its own copy of the model (default "
        f"{DEFAULT_WORKERS}, or one per GPU); 1 without --address works in sequence and without Ray.",
    ),
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pickled weights (.bin, .pt): tensors, and nothing else in them.")
]
# what to prune, by what and on what: the same words for every command that asks
MethodName = Annotated[str | None, typer.Option(metavar="NAME", help="See 'secateur methods'.")]
Sparsity = Annotated[
    float | None, typer.Option("--sparsity", "--ratio", metavar="S", help="Fraction removed, in [0, 1).")
]
Pattern = Annotated[str | None, typer.Option(metavar="N:M", help="N zeros in every M weights, as in 2:4.")]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[=FRACTION]",
        help="What the sparsity is a fraction of: params, macs, bytes, kv_bytes, channels, latency. Or NAME=FRACTION, "
        "the fraction of the dense model that may stay; repeatable for language models, all of them are met.",
    ),
]
Uniform = Annotated[
    bool,
    typer.Option("--uniform", help="Heads and neurons: the best widths that are equal in every layer."),
]
Effort = Annotated[
    str | None,
    typer.Option(
        "--effort",
        metavar="seconds|minutes|hour",
        help="With --method best: the time that planning may take on a small model (default minutes).",
        show_default=False,
    ),
]
LatencyTableFile = Annotated[
    Path | None,
    typer.Option(
        "--latency-table",
        metavar="FILE",
        help="JSON or CSV file in which the times of a latency budget are kept, and found again; it may come from "
        "another machine.",
    ),
]
Allocate = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:KEY=VALUE,...]",
        help="Where the sparsity goes, see 'secateur allocators': owl:m=5,lam=0.08 (default: every matrix the same).",
    ),
]
Partial = Annotated[
    bool,
    typer.Option(
        "--partial",
        help="Prune a model of which the method reaches less than half, such as a mixture of experts; the rest stays.",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE|DATASET", help="builtin, self, a text/jsonl/parquet file, or a data set."),
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Seed of every random choice (default 0).")]
ComputeDevice = Annotated[str | None, typer.Option(metavar="NAME", help="Device (default cpu).")]
Windows = Annotated[int | None, typer.Option(metavar="N", help="Windows that perplexity reads (default 40).")]
Heal = Annotated[
    str | None,
    typer.Option(
        metavar="refit|bias|none|lora|full|norms[:KEY=VALUE,...]",
        help="refit: solve for what stays by least squares; bias: put the mean of removed units into a bias; "
        "lora, full, norms: train what is left, as 'heal' does (lora:steps=300, refit+lora).",
    ),
]
Aim = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="current|stream|dense",
        help="What least squares aim at: outputs on the inputs as they are now, those and a quarter of what the hidden "
        "states have lost so far, or outputs of the dense model.",
    ),
]
Stages = Annotated[
    int | None,
    typer.Option(
        "--stages",
        metavar="N",
        min=1,
        help="Remove in N parts, and train after each on its share of the steps of --heal (Adapt-Accel).",
    ),
]
Growth = Annotated[
    str | None,
    typer.Option(
        "--growth",
        metavar="linear|constant|cosine",
        help="How the training grows from stage to stage (default linear).",
        show_default=False,
    ),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="YAML recipe; options given here override it.")
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Option of the method, see 'secateur describe'; repeatable."),
]
Samples = Annotated[int | None, typer.Option(metavar="N", help="Calibration windows (default 64).")]
Length = Annotated[int | None, typer.Option(metavar="N", help="Tokens in a window (default 512).")]
ComputeDtype = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Dtype of the calibration forwards (default auto: bfloat16 where faster)."),
]
ActivationMemory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Hidden states larger than this go to a file (default: never)."),
]
StoredFormat = Annotated[str | None, typer.Option(metavar="dense|packed", help="How zeros are stored.")]
# networks that are traced: .onnx files and modules that a function of the user's makes
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="[NAME=]SIZE[:DTYPE]",
        help="What a traced network is called with: 1x3x224x224, ids=1x16:int64; in n2x3x8x8 n may differ. Repeatable.",
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", metavar="PATTERN", help="Parameters of a traced network that stay (head.*); repeatable."),
]
Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", metavar="FILE|MODULE", help="Python code that registers methods; repeatable."),
]


def joined(budget: Sequence[str] | None) -> str | None:
    """Budgets that were given one by one, as one text."""
    return ",".join(budget) if budget else None


def only_for(what: str, context: typer.Context, names: Collection[str], meant: str) -> None:
    """Refuse options of the command line that mean nothing here. Raises UsageError.

    ``names`` are the parameters that count for ``what``; a message says for ``meant`` what the others are.
    """
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name))
        if given is not None and given.name == "COMMANDLINE" and parameter.name not in names:
            raise UsageError(f"{parameter.opts[-1]} is for {meant}, not for {what}")


def check_resume(resume: bool, overwrite: bool) -> None:
    """Raises UsageError when both are given."""
    if resume and overwrite:
        raise UsageError("--resume goes on with what --overwrite would remove: give one of them")


def load_plugins(plugins: Sequence[str] | None) -> None:
    """Import the plugins; the registry loads only when there are some."""
    if plugins:
        from secateur.methods.plugins import load_plugin

        for plugin in plugins:
            load_plugin(plugin)


def absolute(plugins: Sequence[str]) -> tuple[str, ...]:
    """Plugins as workers find them, who may stand in another folder than we do."""
    return tuple(str(Path(plugin).absolute()) if Path(plugin).is_file() else plugin for plugin in plugins)
