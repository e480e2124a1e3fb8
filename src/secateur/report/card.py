"""The model card of what was pruned: README.md of its folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from secateur.report.numbers import model_names

if TYPE_CHECKING:
    from secateur.plans import Plan
    from secateur.report import Report

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def card(
    name: str,
    *,
    front: Mapping[str, str],
    loading: str,
    base: str = "a network",
    base_name: str = "",
    plans: Sequence[Plan] = (),
    report: Report | None = None,
) -> str:
    """README.md with YAML front matter: base model, method, sparsity, data, metrics and how to load it.

    ``front`` are lines for the front matter, ``base`` says what was pruned when it has no name.
    """
    parts = [_front_matter(front, base_name, plans), f"# {name}\n", _summary(base, base_name, plans, report)]
    if report is not None and report.metrics:
        parts.append(_metrics(report))
    parts.append(f"## Load it\n\n{loading}")
    return "\n".join(part for part in parts if part)


def _front_matter(front: Mapping[str, str], base_name: str, plans: Sequence[Plan]) -> str:
    lines = ["---", *(f"{key}: {value}" for key, value in front.items())]
    if _HUB_ID.fullmatch(base_name):
        lines.append(f"base_model: {base_name}")
    lines += ["tags:", "- secateur", "- pruned"]
    lines += [f"- {_text(provenance.method)}" for plan in plans for provenance in plan.provenance]
    return "\n".join([*lines, "---", ""])


def _text(word: str) -> str:
    """A word as YAML, in quotes where it would be read as something else (a method may be called ``on``)."""
    return word if yaml.safe_load(word) == word else json.dumps(word)


def _summary(base: str, base_name: str, plans: Sequence[Plan], report: Report | None) -> str:
    source = f"`{base_name}`" if base_name else base
    rows = [("Base model", source)]
    if plans:
        steps = [provenance for plan in plans for provenance in plan.provenance]
        if steps[0].model.revision:
            rows.append(("Revision", f"`{steps[0].model.revision}`"))
        rows.append(("Method", f"`{'+'.join(p.method for p in steps)}`"))
        rows += [("Options", _options(p.options)) for p in steps if p.options]
        rows += [("Calibration", _calibration(p.calibration)) for p in steps if p.calibration]
        rows += [("Trained afterwards", recovery.label) for p in steps for recovery in p.recoveries]
        rows.append(("Seed", str(steps[0].seed)))
    elif report is not None and report.method:
        rows += [("Method", f"`{report.method}`"), ("Options", _options(report.options))]
    if report is not None and report.method:
        rows.append(("Removed", f"{report.achieved:.1%} (asked for: {report.requested})"))
        rows.append(("Left alone", report.reach))
    trained = report is not None and (bool(report.trainings) or not (plans or report.method))
    lines = [f"{'Trained' if trained else 'Pruned'} from {source} with secateur.", "", "| | |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {key} | {value} |" for key, value in rows if value), ""])


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"`{key}={json.dumps(value)}`" for key, value in sorted(options.items()))


def _calibration(info: Any) -> str:
    return f"{info.samples} × {info.length} tokens of `{info.source}`, seed {info.seed}"


def _metrics(report: Report) -> str:
    models = model_names(report.metrics)
    lines = ["## Before and after", "", f"| | {' | '.join(models)} | change |", "| --- " * (len(models) + 2) + "|"]
    for metric in report.metrics:
        label = f"{metric.name} ({metric.unit})" if metric.unit else metric.name
        values = [f"{metric.values[m]:,.6g}" if m in metric.values else "" for m in models]
        change = metric.change(models[-1]) if len(models) > 1 else None
        lines.append(f"| {label} | {' | '.join(values)} | {'' if change is None else f'{change:+.1%}'} |")
    protocols = dict.fromkeys(f"- {m.name}: {m.protocol}" for m in report.metrics if m.protocol)
    return "\n".join([*lines, "", *protocols, *([""] if protocols else [])])
