"""Existing plans on a checkpoint, block by block, resumable; see ``apply_plans``."""

from __future__ import annotations

import warnings
from pathlib import Path

from secateur.models.fingerprint import config_document, fingerprint
from secateur.models.opening import open_source
from secateur.models.saving import document_folder
from secateur.models.shards import parse_size
from secateur.models.vocabulary import fitted
from secateur.plans import Plan
from secateur.runs.finished import check_run_output
from secateur.runs.folder import RunFolder, StepFolder
from secateur.runs.kept import hint, kept
from secateur.runs.pipeline import Output, Progress, apply_step


def apply_plans(
    plans: list[Plan],
    model: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    format: str = "dense",
    max_shard_size: str = "5GB",
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Cut the checkpoint of ``model`` by existing plans, one after the other, block by block; returns warnings.

    Raises PlanMismatchError when the first plan was made for other shapes, and OutputError.
    """
    finished = check_run_output(out, resume=resume, overwrite=overwrite)
    source, tokenizer = open_source(
        model,
        revision=revision,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        progress=progress,
    )
    document = {
        "plans": [[p.model_dump(mode="json") for p in plan.provenance] for plan in plans],
        "model": fingerprint(source).model_dump(),
        "config": config_document(source.model),
        "format": format,
        "max_shard_size": max_shard_size,
    }
    folder = RunFolder(out, document, resume=resume, overwrite=overwrite)
    if finished:
        folder.remove()
        source.close()
        return []
    with kept(folder, resume) as stop, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        for number, plan in enumerate(plans, start=1):
            last = number == len(plans)
            result = apply_step(
                StepFolder(folder.step(number), stop, hint(out)),
                plan,
                source,
                output=Output(format if last else "dense", parse_size(max_shard_size)),
                progress=progress or (lambda stage, done, total: None),
            )
            source.close()
            if not last:
                source, _ = open_source(result.folder, device=device)
        document_folder(
            result.folder,
            out,
            tokenizer=fitted(tokenizer, plans),
            plans=[plan.untrained() for plan in plans],
            report=None,
            html=False,
            format=format,
            plain=result.plain,
            tallies=result.tallies,
        )
        folder.finish(result.folder)
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
