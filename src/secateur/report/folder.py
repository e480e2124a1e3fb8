"""What lies in every folder that is written: plans, report and README beside weights; numbers and page of a study."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.files import write_text
from secateur.report.numbers import json_ready

if TYPE_CHECKING:
    from secateur.plans import Plan
    from secateur.report.report import Report


def write_documents(path: Path, plans: Sequence[Plan], report: Report | None, readme: str, *, html: bool) -> None:
    """Plans (``plan``, or ``plan/step-1``, ``-2``, …), report.json, with ``html`` report.html, and README.md.

    Plans that are there are replaced. Raises OutputError, and MissingExtraError without plotly.
    """
    shutil.rmtree(path / "plan", ignore_errors=True)
    for number, plan in enumerate(plans, start=1):
        step = path / "plan" if len(plans) == 1 else path / "plan" / f"step-{number}"
        step.mkdir(parents=True)
        plan.write(step)
    if report is not None:
        text = json.dumps(json_ready(report.to_dict()), indent=1, ensure_ascii=False)
        (path / "report.json").write_text(text + "\n", encoding="utf8")
        if html:
            from secateur.report.html import write_report

            write_report(report, path / "report.html")
    (path / "README.md").write_text(readme, encoding="utf8")


def write_study(
    folder: Path, numbers: str, document: Any, page: str, render: Callable[[], str], *, csv: str | None = None
) -> list[str]:
    """The ``document`` of a study as the file ``numbers``, its ``csv``, and the ``page`` that ``render`` gives.

    Each is written whole or not at all. Returns notes on what is missing: the page is, without plotly. Raises
    OutputError.
    """
    write_text(folder / numbers, json.dumps(json_ready(document), indent=1, ensure_ascii=False) + "\n")
    if csv is not None:
        write_text((folder / numbers).with_suffix(".csv"), csv)
    if importlib.util.find_spec("plotly") is None:
        return [f"{page} needs plotly, which is not installed: pip install 'secateur[report]'"]
    write_text(folder / page, render())
    return []
