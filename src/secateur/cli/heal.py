"""``secateur heal``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.options import (
    ComputeDevice,
    EstimateFirst,
    Json,
    Overwrite,
    Quiet,
    Resume,
    Seed,
    TrustRemoteCode,
)
from secateur.cli.output import print_json, show, working
from secateur.cli.prune import given, parse_options
from secateur.cli.saving import drawn, how_to_load
from secateur.errors import UsageError
from secateur.files import check_output
from secateur.ranks import Ranks, join

if TYPE_CHECKING:
    from secateur.healing.recovery import RecoveryOptions
    from secateur.runs.healing import Healed


def heal(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="Checkpoint folder; its plan says what must stay removed.")
    ],
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR|URL", help="Folder for the trained checkpoint.")
    ] = None,
    data: Annotated[
        str, typer.Option(metavar="NAME|FILE|DATASET", help="Text to train on, whose last windows are held out.")
    ] = "builtin",
    train: Annotated[
        str, typer.Option(metavar="lora|full|norms", help="Adapters, everything, or norms and biases alone.")
    ] = "lora",
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The dense model, for the losses kl and hidden.")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="TERM+TERM*WEIGHT",
            help="ce: the text itself; kl: the teacher's predictions; hidden: its hidden states; as in kl+hidden*0.1 "
            "(default: kl with a teacher, ce without).",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps of the optimiser (default 300).")] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", help="Windows of a step (default 4).")] = None,
    length: Annotated[int | None, typer.Option(metavar="N", help="Tokens in a window (default 256).")] = None,
    lr: Annotated[
        float | None, typer.Option(metavar="X", help="Peak learning rate (default 1e-3, of full 1e-4).")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="rank, ranks (importance), alpha, dropout and targets of adapters; micro, schedule (wsd), warmup, "
            "cooldown, floor, decay (of weights), clip, temperature, dtype (bfloat16), checkpointing, fsdp (shard over "
            "ranks), held_out, measure, keep_zeros; repeatable.",
        ),
    ] = None,
    seed: Seed = None,
    text_field: Annotated[
        str | None, typer.Option("--text-field", metavar="NAME", help="Field of a jsonl or parquet file with the text.")
    ] = None,
    device: ComputeDevice = None,
    report: Annotated[
        bool | None, typer.Option("--report/--no-report", help="Write report.html beside the checkpoint (default).")
    ] = None,
    resume: Resume = False,
    estimate: EstimateFirst = True,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    if out is None:
        raise UsageError("give a folder for the trained checkpoint with --out")
    check_output(out, overwrite)
    html = drawn(report)
    own = given({"batch": batch, "length": length, "lr": lr})
    more = parse_options(options or [])
    for key in sorted({*own, "train", "steps", "loss", "data", "seed"} & set(more)):
        raise UsageError(f"--set {key} has an option of its own: give --{key}")
    ranks = join()
    with ranks.together(), working(quiet or not ranks.main) as progress:
        from secateur.runs.healing import chosen_options, heal

        how = {"train": train, "data": data, "loss": loss, "steps": steps, "seed": seed or 0}
        how["options"] = {**own, **more}
        if estimate and not resume:
            # a run that goes on has fitted before
            chosen, where = chosen_options(**how), device or "cpu"
            ranks.on_main(lambda: _announce(model, teacher, chosen, out, where, ranks, trust_remote_code, quiet))
        healed = heal(
            model,
            out=out,
            teacher=teacher,
            **how,
            text_field=text_field,
            device=device or "cpu",
            html=html,
            resume=resume,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if ranks.main:
        _show(healed, out, json)


def _announce(
    model: str,
    teacher: str | None,
    options: RecoveryOptions,
    out: str,
    device: str,
    ranks: Ranks,
    trust_remote_code: bool,
    quiet: bool,
) -> None:
    from secateur.cli.estimate import announce, place_of
    from secateur.estimate.build import estimate_training
    from secateur.estimate.outline import outline
    from secateur.estimate.training import training_alone
    from secateur.runs.healing import plans_in

    sizes, files = outline(model, trust_remote_code=trust_remote_code)
    training = training_alone(
        sizes,
        options,
        teacher=outline(teacher, trust_remote_code=trust_remote_code)[0] if teacher else None,
        # masks cost adapters alone
        masked=options.train == "lora" and any(not p.refits(name) for p in plans_in(model) for name in p.masks),
        ranks=ranks.size,
        device=device,
    )
    found = estimate_training(model, training, files=files, place=place_of(out), ranks=ranks)
    announce(found, quiet)


def _show(healed: Healed, out: str, json: bool) -> None:
    section: dict[str, Any] = healed.recovered.section()
    if json:
        print_json({"output": out, "recovery": section})
        return
    from secateur.report.recovery import measured_table, summary
    from secateur.report.tables import rows_table

    show(rows_table(*measured_table(section)), summary(section), how_to_load(out))
