"""The model card of a pruned checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from secateur.plans import Plan
    from secateur.report import Report

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    name: str,
    *,
    base_name: str = "",
    plans: Sequence[Plan] = (),
    report: Report | None = None,
    format: str = "dense",
    remote: bool = False,
) -> str:
    """README.md with YAML front matter: base model, method, sparsity, data, metrics and how to load it.

    ``remote`` says that the checkpoint needs its modelling file.
    """
    parts = [_front_matter(base_name, plans), f"# {name}\n", _summary(base_name, plans, report)]
    if report is not None and report.metrics:
        parts.append(_metrics(report))
    parts.append(_loading(name, format, remote))
    return "\n".join(part for part in parts if part)


def _front_matter(base_name: str, plans: Sequence[Plan]) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if _HUB_ID.fullmatch(base_name):
        lines.append(f"base_model: {base_name}")
    lines += ["tags:", "- secateur", "- pruned"]
    lines += [f"- {_text(provenance.method)}" for plan in plans for provenance in plan.provenance]
    return "\n".join([*lines, "---", ""])


def _text(word: str) -> str:
    """A word as YAML, in quotes where it would be read as something else (a method may be called ``on``)."""
    return word if yaml.safe_load(word) == word else json.dumps(word)


def _summary(base_name: str, plans: Sequence[Plan], report: Report | None) -> str:
    source = f"`{base_name}`" if base_name else "a language model"
    rows = [("Base model", source)]
    if plans:
        steps = [provenance for plan in plans for provenance in plan.provenance]
        if steps[0].model.revision:
            rows.append(("Revision", f"`{steps[0].model.revision}`"))
        rows.append(("Method", f"`{'+'.join(p.method for p in steps)}`"))
        rows += [("Options", _options(p.options)) for p in steps if p.options]
        rows += [("Calibration", _calibration(p.calibration)) for p in steps if p.calibration]
        rows.append(("Seed", str(steps[0].seed)))
    elif report is not None:
        rows += [("Method", f"`{report.method}`"), ("Options", _options(report.options))]
    if report is not None:
        rows.append(("Removed", f"{report.achieved:.1%} (asked for: {report.requested})"))
    lines = [f"Pruned from {source} with secateur.", "", "| | |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {key} | {value} |" for key, value in rows if value), ""])


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"`{key}={json.dumps(value)}`" for key, value in sorted(options.items()))


def _calibration(info: Any) -> str:
    return f"{info.samples} × {info.length} tokens of `{info.source}`, seed {info.seed}"


def _metrics(report: Report) -> str:
    models = list(dict.fromkeys(name for metric in report.metrics for name in metric.values))
    lines = ["## Before and after", "", f"| | {' | '.join(models)} | change |", "| --- " * (len(models) + 2) + "|"]
    for metric in report.metrics:
        label = f"{metric.name} ({metric.unit})" if metric.unit else metric.name
        values = [f"{metric.values[m]:,.6g}" if m in metric.values else "" for m in models]
        change = metric.change(models[-1]) if len(models) > 1 else None
        lines.append(f"| {label} | {' | '.join(values)} | {'' if change is None else f'{change:+.1%}'} |")
    protocols = dict.fromkeys(f"- {m.name}: {m.protocol}" for m in report.metrics if m.protocol)
    return "\n".join([*lines, "", *protocols, *([""] if protocols else [])])


def _loading(name: str, format: str, remote: bool) -> str:
    lines = ["## Load it", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    options = ", trust_remote_code=True" if remote else ""
    lines.append(f'model = AutoModelForCausalLM.from_pretrained("{name}"{options})')
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{name}")', "```", ""]
    if remote:
        why = (
            "its weights are packed" if format == "packed" else "its layers have sizes that the stock class can't hold"
        )
        lines.append(f"`trust_remote_code` runs `modeling_secateur.py` in this folder, because {why}.")
        lines.append("Where secateur is installed, `secateur.load` does without.")
    else:
        lines.append("This is a plain checkpoint: stock transformers loads it.")
    return "\n".join([*lines, ""])
