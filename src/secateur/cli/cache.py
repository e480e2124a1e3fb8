"""``secateur cache compare | recommend``; ``fit`` has a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.examples import help_text
from secateur.cli.options import (
    Device,
    Json,
    Overwrite,
    Plugins,
    Quiet,
    Resume,
    TrustRemoteCode,
    check_resume,
    load_plugins,
)
from secateur.cli.output import print_json, show, show_notes, working
from secateur.errors import UsageError

if TYPE_CHECKING:
    from secateur.cachestudy import Recommendation

app = typer.Typer(help="Compress the KV cache: what it costs, and what fits.", rich_markup_mode=None)

Question = Annotated[
    str,
    typer.Option(
        metavar="later|end",
        help="Whether the question is read behind the compressed cache (later), or is the end of what is compressed.",
    ),
]
Prefix = Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of a window that are compressed.")]
After = Annotated[int, typer.Option(min=2, metavar="N", help="Tokens behind them whose perplexity is measured.")]
TextField = Annotated[
    str | None, typer.Option("--text-field", metavar="NAME", help="Field of a jsonl or parquet file with the text.")
]
Dtype = Annotated[str, typer.Option(metavar="NAME", help="Dtype that the model is loaded in.")]


@app.command("compare", help=help_text("cache compare"))
def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for 'prune'.")],
    presses: Annotated[
        str | None,
        typer.Option(
            metavar="PRESS,...",
            help="What is compared, without the fraction: snapkv,adakv(snapkv),snapkv+mustafar:0.5; with it "
            "(snapkv:0.5) it is run as it is.",
        ),
    ] = None,
    ratios: Annotated[
        str | None, typer.Option(metavar="R,...", help="Fractions removed by every press (default 0.25,0.5,0.75).")
    ] = None,
    held: Annotated[
        str | None,
        typer.Option(
            metavar="H,...", help="Instead of --ratios: the fractions of the dense bytes that every press may hold."
        ),
    ] = None,
    text: Annotated[
        str, typer.Option(metavar="NAME|FILE|DATASET", help="What perplexity and haystacks of text read.")
    ] = "builtin",
    prefix: Prefix = 1024,
    after: After = 256,
    windows: Annotated[int, typer.Option(min=0, metavar="N", help="Windows of text; 0 for none.")] = 8,
    needle: Annotated[
        list[str] | None,
        typer.Option(
            "--needle",
            metavar="TASK",
            help="Facts that are hidden and asked for: niah:length=1024/4096,depths=5,keys=1,haystack=noise|text, or "
            "kv:length=1024,depths=5; repeatable.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="TASK",
            help="A task of lm-eval whose answers are written: lm_eval:longbench_qasper?limit=20; repeatable.",
        ),
    ] = None,
    question: Question = "later",
    speed: Annotated[
        str | None,
        typer.Option(
            metavar="N,...", help="Tokens of prompts at which tokens per second are measured, reading and writing."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Repeats of --speed; the median counts.")] = 3,
    new: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens that --speed writes behind a prompt.")] = 32,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for page, JSON and journal.")] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of what is hidden where.")] = 0,
    text_field: TextField = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    resume: Resume = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    plugin: Plugins = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    if presses is None:
        raise UsageError("name what is compared with --presses snapkv,mustafar ('secateur methods --object kv_cache')")
    if out is None:
        raise UsageError("give a folder for the comparison with --out")
    if ratios is not None and held is not None:
        raise UsageError("--ratios and --held both say how much is removed: give one of them")
    check_resume(resume, overwrite)
    load_plugins(plugin)
    lengths = whole_numbers("--speed", speed) if speed is not None else []
    by_bytes = held is not None
    said = held if by_bytes else ratios
    fractions = numbers("--held" if by_bytes else "--ratios", "0.25,0.5,0.75" if said is None else said)
    from secateur import api
    from secateur.cachestudy import compare_caches
    from secateur.cachestudy.compare import notes_of
    from secateur.methods.cachespec import split_presses

    names = split_presses(presses)
    with working(quiet) as progress:
        loaded, tokenizer = api.load(
            model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, progress=progress
        )
        if tokenizer is None:
            raise UsageError(f"{model} has no tokenizer to read a text with")
        made = compare_caches(
            loaded,
            tokenizer,
            presses=names,
            **({"held": fractions} if by_bytes else {"ratios": fractions}),
            text=text,
            prefix=prefix,
            after=after,
            windows=windows,
            needles=needle or (),
            tasks=task or (),
            question=question,
            seed=seed,
            text_field=text_field,
            speed=lengths,
            repeats=repeats,
            new=new,
            out=out,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    show_notes(notes_of(made), quiet)
    if json:
        print_json({"output": str(out), **made.to_dict()})
    else:
        from secateur.cachestudy.results import columns, equal_columns, speed_columns
        from secateur.report.tables import rows_table

        more = [rows_table(*one, words=1) for one in (equal_columns(made), speed_columns(made)) if one[1]]
        show(rows_table(*columns(made), words=1), *more, *made.verdicts, f"cache.html and cache.json are in {out}")
    if made.failed:
        raise typer.Exit(1)


def numbers(option: str, text: str) -> list[float]:
    """``0.25,0.5`` → two numbers. Raises UsageError."""
    try:
        return [float(one) for one in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} takes numbers with commas between them, got '{text}'") from None


def whole_numbers(option: str, text: str) -> list[int]:
    """``1024,4096`` → two numbers, at least 1. Raises UsageError."""
    pieces = [one.strip() for one in text.split(",")]
    if not all(one.isdecimal() and int(one) for one in pieces):
        raise UsageError(f"{option} takes whole numbers with commas between them, got '{text}'")
    return [int(one) for one in pieces]


@app.command("recommend", help=help_text("cache recommend"))
def recommend(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for 'prune'.")],
    context: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of the prompt.")] = 32768,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="What the cache may take.")] = "2GiB",
    new: Annotated[int, typer.Option(min=0, metavar="N", help="Tokens that are written behind it.")] = 0,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences at a time.")] = 1,
    question: Question = "later",
    presses: Annotated[
        str | None,
        typer.Option(
            metavar="PRESS,...", help="What to choose from, without the fraction: snapkv,snapkv+mustafar:0.5."
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE|DATASET", help="Text by whose perplexity the best is chosen of what fits."),
    ] = None,
    prefix: Prefix = 1024,
    after: After = 256,
    windows: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of the text.")] = 4,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Dtype of weights and cache (auto: the checkpoint's own).")
    ] = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    plugin: Plugins = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    load_plugins(plugin)
    from secateur.cachestudy import recommend_cache
    from secateur.methods.cachespec import split_presses

    with working(quiet) as progress:
        loaded, tokenizer = _opened(model, text is not None, dtype, device, trust_remote_code, progress)
        found = recommend_cache(
            loaded,
            tokenizer,
            context=context,
            memory=memory,
            new=new,
            batch=batch,
            question=question,
            presses=split_presses(presses) if presses is not None else None,
            text=text,
            prefix=prefix,
            after=after,
            windows=windows,
            progress=progress,
        )
    if json:
        print_json(found.to_dict())
        return
    _show_recommendation(found)


def _opened(name: str, whole: bool, dtype: str, device: str, trust_remote_code: bool, progress: Any) -> tuple[Any, Any]:
    """The model, without its weights where shapes are enough, and its tokenizer."""
    if whole:
        from secateur import api

        return api.load(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code, progress=progress)
    from secateur.models.loading import DTYPES
    from secateur.models.opening import open_source

    if dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got '{dtype}'")
    source, tokenizer = open_source(name, trust_remote_code=trust_remote_code, progress=progress)
    source.close()
    model: Any = source.model
    if dtype != "auto":
        model.to(DTYPES[dtype])
    return model, tokenizer


def _show_recommendation(found: Recommendation) -> None:
    from secateur.report.numbers import format_bytes, format_value, percent
    from secateur.report.tables import rows_table

    parts = []
    if found.candidates:
        rows = [
            [
                one.spec,
                format_bytes(one.bytes_held),
                percent(one.bytes_held / found.bytes_dense),
                format_bytes(one.bytes_peak),
                *([] if one.perplexity is None else [format_value(one.perplexity)]),
                "take this" if one.spec == found.spec else "",
            ]
            for one in found.candidates
        ]
        measured = ["perplexity"] if found.dense_perplexity is not None else []
        parts.append(rows_table(["cache", "held", "of dense", "at most", *measured, ""], rows, words=1))
    if found.dense_perplexity is not None:
        parts.append(f"perplexity of the dense cache: {format_value(found.dense_perplexity)} ({found.protocol})")
    left = f"{', '.join(found.missing)} can't get that small" if found.missing else ""
    show(*parts, found.sentence, *([left] if left else []))
