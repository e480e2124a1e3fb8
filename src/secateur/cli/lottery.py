"""``secateur lottery``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import (
    DEFAULT_WORKERS,
    Address,
    ComputeDevice,
    Json,
    Overwrite,
    Plugins,
    Quiet,
    Resume,
    TrustRemoteCode,
    Workers,
    absolute,
    check_resume,
    load_plugins,
)
from secateur.cli.output import print_json, show, show_notes, working
from secateur.cli.prune import given
from secateur.errors import UsageError


def lottery(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe of a training with the key 'lottery'.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for levels and results (default: the recipe's).")
    ] = None,
    device: ComputeDevice = None,
    address: Address = None,
    workers: Workers = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    plugin: Plugins = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    check_resume(resume, overwrite)
    load_plugins(plugin)
    from secateur.sweep.pools import open_pool
    from secateur.trainer.lottery import (
        LotteryWorker,
        check_complete,
        check_folder,
        load_lottery_recipe,
        make_job,
        open_folder,
        run_lottery,
        trials_of,
    )
    from secateur.trainer.lotteryresults import columns, document, write_results

    asked = load_lottery_recipe(recipe, trust_remote_code=trust_remote_code, **given({"device": device}))
    folder = out or (Path(asked.out) if asked.out else None)
    if folder is None:
        raise UsageError("give a folder for levels and results with --out (out)")
    job = make_job(asked, folder, plugins=absolute(plugin or []), trust_remote_code=trust_remote_code)
    worker = LotteryWorker(job)
    with working(quiet) as progress:
        check_folder(folder, resume=resume, overwrite=overwrite)
        worker.check()
        open_folder(asked, folder, resume=resume, overwrite=overwrite)
        default = min(DEFAULT_WORKERS, len(trials_of(asked.lottery)))
        # the checks have opened a worker already
        pool, notes = open_pool(
            job, workers, address, default, what="trainings", worker=LotteryWorker, own=lambda job: worker
        )
        try:
            found = run_lottery(asked, pool, worker, progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; trainings that are done are in {folder}: --resume goes on with the rest"
            ) from None
        finally:
            pool.close()
    found.notes[:0] = notes
    show_notes([*found.notes, *write_results(found, folder)], quiet)
    if json:
        print_json({"output": str(folder), **document(found)})
    elif found.entries:
        from secateur.report.tables import rows_table

        show(rows_table(*columns(found)), f"masks, results and lottery.html are in {folder}")
    check_complete(found)
