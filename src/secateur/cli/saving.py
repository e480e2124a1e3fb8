"""Writing a checkpoint with its plan and reports, as one folder that is there whole or not at all."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.cli.output import json_text
from secateur.files import output_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from secateur.plans import Plan
    from secateur.report import Report


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path,
    *,
    plans: Sequence[Plan],
    report: Report | None = None,
    html: bool = False,
    format: str = "dense",
    overwrite: bool = False,
) -> None:
    """Save model, plans and report; the folder takes its name when all of it is written. Raises OutputError."""
    from secateur import api

    with output_folder(out, overwrite) as folder:
        # the model card names the folder, so it is written under its own name and moved up
        stage = folder / ".stage" / out.resolve().name
        started = time.perf_counter()
        single = plans[0] if len(plans) == 1 else None
        api.save(model, tokenizer, stage, plan=single, report=report, format=format)
        if single is None:
            _write_steps(plans, stage / "plan")
        if report is not None:
            report.output = str(out)
            report.plain = is_plain(stage)
            report.seconds["save"] = time.perf_counter() - started
            _write_report(report, stage, html)
        for entry in sorted(stage.iterdir()):
            entry.rename(folder / entry.name)
        shutil.rmtree(stage.parent)


def is_plain(folder: Path) -> bool:
    """Whether stock transformers loads the checkpoint without code that comes with it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    return "auto_map" not in config


def how_to_load(folder: Path) -> str:
    """The lines of Python that load the checkpoint."""
    remote = "" if is_plain(folder) else ", trust_remote_code=True"
    return (
        f"saved to {folder}; load it with\n"
        "  from transformers import AutoModelForCausalLM\n"
        f'  model = AutoModelForCausalLM.from_pretrained("{folder}"{remote})'
    )


def _write_steps(plans: Sequence[Plan], folder: Path) -> None:
    for number, plan in enumerate(plans, start=1):
        plan.save(folder / f"step-{number}")


def _write_report(report: Report, folder: Path, html: bool) -> None:
    from secateur.report.html import write_report

    (folder / "report.json").write_text(json_text(report.to_dict()) + "\n", encoding="utf8")
    if html:
        write_report(report, folder / "report.html")
