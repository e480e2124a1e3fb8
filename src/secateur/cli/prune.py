"""``secateur prune``."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.options import AllowPickle, Json, Overwrite, Plugins, Quiet, TrustRemoteCode, load_plugins
from secateur.cli.output import print_json, show, show_notes, working
from secateur.errors import MissingExtraError, UsageError
from secateur.files import check_output

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from secateur.recipes import Outcome, Recipe

DEFAULT_PROMPT = "The most important thing about gardening is"
PROMPT_TOKENS = 40


def prune(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file or built-in name (smollm2-135m).")
    ] = None,
    method: Annotated[str | None, typer.Option(metavar="NAME", help="See 'secateur methods'.")] = None,
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", "--ratio", metavar="S", help="Fraction removed, in [0, 1).")
    ] = None,
    pattern: Annotated[str | None, typer.Option(metavar="N:M", help="N zeros in every M weights, as in 2:4.")] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="params|macs|bytes", help="What the sparsity is a fraction of.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for the checkpoint.")] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="YAML recipe; options given here override it.")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Option of the method, see 'secateur describe'; repeatable."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE|DATASET", help="builtin, self, a text/jsonl/parquet file, or a data set."),
    ] = None,
    samples: Annotated[int | None, typer.Option(metavar="N", help="Calibration windows (default 64).")] = None,
    length: Annotated[int | None, typer.Option(metavar="N", help="Tokens in a window (default 512).")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of every random choice (default 0).")] = None,
    text_field: Annotated[
        str | None, typer.Option("--text-field", metavar="NAME", help="Field of a jsonl or parquet file with the text.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Dtype of the calibration forwards (default auto: bfloat16 where faster)."),
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="Device (default cpu).")] = None,
    evaluate: Annotated[
        list[str] | None,
        typer.Option(
            "--evaluate", metavar="TASK", help="What to measure beside size, as 'evaluate --task'; repeatable."
        ),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(metavar="N", help="Windows that perplexity reads (default 40).")
    ] = None,
    format: Annotated[str | None, typer.Option(metavar="dense|packed", help="How zeros are stored.")] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Prompt that both models continue.", show_default=False)
    ] = None,
    report: Annotated[
        bool | None, typer.Option("--report/--no-report", help="Write report.html beside the checkpoint (default).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go; write nothing.")] = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    plugin: Plugins = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    load_plugins(plugin)
    step = {"method": method, "sparsity": sparsity, "pattern": pattern, "budget": budget}
    data = {"source": calibration, "samples": samples, "length": length, "seed": seed, "text_field": text_field}
    top = {
        "model": model,
        "out": str(out) if out else None,
        "dtype": dtype,
        "device": device,
        "evaluate": evaluate or None,
        "windows": windows,
        "format": format,
    }
    job = build_recipe(recipe, _given(top), _given(data), _given(step), parse_options(options or []))
    html = _check(job, dry_run=dry_run, overwrite=overwrite, report=report)
    with working(quiet) as progress:
        dense, tokenizer = _load(job, trust_remote_code, allow_pickle)
        if dry_run:
            from secateur.recipes import plan_steps

            plans = plan_steps(job, dense, tokenizer, progress=progress)
        else:
            outcome = _run(job, dense, tokenizer, progress)
            _add_samples(outcome, dense, tokenizer, prompt or (DEFAULT_PROMPT if html else None))
            _save(job, outcome, tokenizer, html=html, overwrite=overwrite)
    if dry_run:
        _show_dry_run(plans, json)
    else:
        show_notes(outcome.report.notes, quiet)
        _show_outcome(job, outcome, json)


def build_recipe(
    path: Path | None, top: dict[str, Any], calibration: dict[str, Any], step: dict[str, Any], options: dict[str, str]
) -> Recipe:
    """The recipe of the file with the values of the command line put over it. Raises UsageError."""
    from secateur.recipes import make_recipe, read_recipe

    data = read_recipe(path) if path else {}
    if path:
        make_recipe(data, str(path))
    elif "method" not in step:
        raise UsageError("name a method with --method ('secateur methods' lists them), or a recipe with --recipe")
    steps = data.get("steps", [{}])
    if (step or options) and len(steps) > 1:
        raise UsageError(
            f"{path} has {len(steps)} steps; change method, sparsity and options there, not on the command line"
        )
    if step or options:
        steps = [_override(steps[0], step, options)]
    calibration = {**data.get("calibration", {}), **calibration}
    return make_recipe({**data, **top, "calibration": calibration, "steps": steps}, "command line")


def parse_options(pairs: list[str]) -> dict[str, str]:
    """``key=value`` pairs as a mapping. Raises UsageError for anything else, and for a key given twice."""
    options: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"--set takes KEY=VALUE, got '{pair}'")
        if key in options:
            raise UsageError(f"--set {key} is given twice")
        options[key] = value
    return options


def _override(old: dict[str, Any], step: dict[str, Any], options: dict[str, str]) -> dict[str, Any]:
    merged = {**old, **step}
    if step.get("method", old.get("method")) != old.get("method"):
        # another method has other options
        merged["options"] = options
    else:
        merged["options"] = {**old.get("options", {}), **options}
    # sparsity and pattern say the same thing: the command line's word counts
    for given, other in (("sparsity", "pattern"), ("pattern", "sparsity")):
        if given in step and other not in step:
            merged.pop(other, None)
    return merged


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _check(job: Recipe, *, dry_run: bool, overwrite: bool, report: bool | None) -> bool:
    """Refuse what can't work before a model is loaded; returns whether report.html will be written."""
    if job.model is None:
        raise UsageError("name a model: a hub id, a folder, a .gguf file or smollm2-135m")
    if job.out is None and not dry_run:
        raise UsageError("give a folder for the checkpoint with --out, or --dry-run to see what would go")
    if job.out is not None and not dry_run:
        check_output(job.out, overwrite)
    job.check_methods()
    from secateur.evaluation import make_task

    for task in job.evaluate:
        make_task(task)
    drawable = importlib.util.find_spec("plotly") is not None
    if report and not drawable:
        raise MissingExtraError("report.html needs plotly, which is not installed: pip install 'secateur[report]'")
    return drawable if report is None else report


def _load(
    job: Recipe, trust_remote_code: bool, allow_pickle: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    from secateur import api

    assert job.model is not None
    # the checkpoint's own dtype, which is then that of the result
    return api.load(
        job.model, dtype="auto", device=job.device, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )


def _run(job: Recipe, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, progress: Any) -> Outcome:
    from secateur import api
    from secateur.recipes import run_steps

    outcome = run_steps(job, dense, tokenizer, progress=progress)
    started = time.perf_counter()
    table = api.evaluate(
        {"dense": dense, "pruned": outcome.model},
        tokenizer,
        list(dict.fromkeys([*job.evaluate, "size"])),
        length=job.calibration.length,
        windows=job.windows,
        seed=job.calibration.seed,
        text_field=job.calibration.text_field,
        progress=progress,
    )
    outcome.report.metrics = list(table)
    outcome.report.seconds["evaluate"] = time.perf_counter() - started
    return outcome


def _add_samples(
    outcome: Outcome, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, prompt: str | None
) -> None:
    if prompt is None or tokenizer is None:
        return
    from secateur.report import Sample

    models = {"dense": dense, "pruned": outcome.model}
    outputs = {name: continuation(model, tokenizer, prompt) for name, model in models.items()}
    outcome.report.samples = [*outcome.report.samples, Sample(prompt, outputs)]


def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """What a model makes of a prompt: at most 40 tokens, greedily."""
    import torch

    ids_BT = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    generate: Any = model.generate
    with torch.inference_mode():
        output_BT = generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=PROMPT_TOKENS,
            do_sample=False,
            # sampling parameters of the checkpoint's generation config don't go with greedy decoding
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(output_BT[0, ids_BT.shape[1] :], skip_special_tokens=True))


def _save(
    job: Recipe, outcome: Outcome, tokenizer: PreTrainedTokenizerBase | None, *, html: bool, overwrite: bool
) -> None:
    from secateur import api

    assert job.out is not None
    api.save(
        outcome.model,
        tokenizer,
        job.out,
        plan=outcome.plans,
        report=outcome.report,
        html=html,
        format=job.format,
        overwrite=overwrite,
    )


def _show_dry_run(plans: list[Any], json: bool) -> None:
    from secateur.cli.plan import plan_document, show_plans

    if json:
        print_json({"dry_run": True, "plans": [plan_document(plan) for plan in plans]})
    else:
        show_plans(plans)


def _show_outcome(job: Recipe, outcome: Outcome, json: bool) -> None:
    from secateur.cli.saving import how_to_load
    from secateur.report.tables import metrics_table

    if json:
        print_json(outcome.report.to_dict())
        return
    show(metrics_table(outcome.report.metrics))
    for sample in outcome.report.samples:
        show(*(f"{name}: {sample.prompt}{text}\n" for name, text in sample.outputs.items()))
    assert job.out is not None
    show(how_to_load(Path(job.out)))
