"""The HTML report: one file that holds everything it shows, and asks the network for nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from secateur.report.build import BUDGET_WORDS
from secateur.report.channels import WAY_KEY, channel_scores, channels_chart, way_chart
from secateur.report.charts import KIND_WORDS, score_charts, sparsity_chart, units_chart
from secateur.report.numbers import (
    MISSING,
    change_from,
    footnotes,
    format_change,
    metric_value,
    model_names,
    percent,
    ranges,
    verdict,
)
from secateur.report.page import facts_table, figure, page, scrolling, table
from secateur.report.recovery import recovery_section
from secateur.report.report import Metric, Report
from secateur.report.speeds import is_disk, is_faster, is_speed, speed_sentences
from secateur.report.training import training_section


def write_report(report: Report, path: str | Path) -> Path:
    """Write the page to ``path``, whole or not at all; returns the path.

    Raises OutputError when it can't be written, MissingExtraError without plotly.
    """
    from secateur.files import write_text

    write_text(path, render(report))
    return Path(path)


def render(report: Report) -> str:
    """The report as one HTML document, scripts and styles inlined. Raises MissingExtraError without plotly."""
    charts: dict[str, Any] = {}
    sections = [
        _headline(report),
        _cuts(report, charts),
        _scores(report, charts),
        *(training_section(training, charts) for training in report.trainings),
        *(recovery_section(recovery, charts) for recovery in report.recoveries),
        _comparison(report),
        _samples(report),
        _loading(report),
        _provenance(report),
    ]
    deed = f"pruned with {report.method}" if report.method else "trained"
    return page(f"{report.model} {deed}", sections, charts, "the HTML report")


def _headline(report: Report) -> str:
    numbers = "".join(_big_number(metric) for metric in _headline_metrics(report.metrics))
    deed = "zeroed" if report.trainings or any(cut.matrices for cut in report.layers) else "removed"
    lede = (
        f'<p class="lede"><strong>{escape(report.method)}</strong> {deed} {percent(report.achieved)}'
        f" {_of_what(report)}; asked for: {escape(report.requested)}.</p>"
        + (f"<p>{escape(report.reach)}.</p>" if report.reach else "")
    )
    return (
        f'<header><p class="kicker">{"Pruning" if report.method else "Training"} report</p>'
        f"<h1>{escape(report.model)}</h1>"
        + (lede if report.method else "")
        + (f'<dl class="headline">{numbers}</dl>' if numbers else "")
        + "</header>"
    )


def _of_what(report: Report) -> str:
    if report.groups:
        return f"of the {BUDGET_WORDS[report.options['budget']]}"
    if report.trainings:
        return "of the weights that are pruned"
    masked = any(cut.matrices for cut in report.layers)
    if report.coverage is not None:
        return f"of the {'weights' if masked else 'parameters'} of the decoder blocks that it reaches"
    return f"of the {'weights' if masked else 'parameters'} of the decoder blocks"


def _headline_metrics(metrics: Sequence[Metric]) -> list[Metric]:
    wanted = (
        lambda m: "perplexity" in m.name.lower() or m.name == "accuracy",
        is_disk,
        lambda m: m.unit.lower() in ("parameters", "params") or m.name.lower() == "parameters",
        lambda m: is_speed(m) and "decode" in m.name.lower(),
        lambda m: m.name == "MACs",
    )
    found = (next((m for m in metrics if len(m.values) > 1 and test(m)), None) for test in wanted)
    return [metric for metric in found if metric is not None]


def _big_number(metric: Metric) -> str:
    before, *_, after = metric.values
    change = _change(metric, before, after)
    # the data set is told in the table, and one line keeps the numbers level
    name = re.split(r"[(:]", metric.name)[0].strip()
    number, _, unit = metric_value(metric, after).partition(" ")
    # a long unit as large as its number would stand over the column
    small = f' <span class="unit">{escape(unit)}</span>' if unit else ""
    return (
        f'<div><dt>{escape(name)}</dt><dd class="now">{escape(number)}{small}</dd>'
        f'<dd class="was">from {escape(metric_value(metric, before))}, {change}</dd></div>'
    )


def _change(metric: Metric, dense: str, model: str) -> str:
    change = change_from(metric, dense, model)
    return f'<span class="{verdict(change, metric.higher_is_better) or "same"}">{format_change(change)}</span>'


def _cuts(report: Report, charts: dict[str, Any]) -> str:
    if report.groups:
        parts = [figure(channels_chart(report), charts), _channels_table(report)]
        parts += [figure(way_chart(way), charts, WAY_KEY) for way in report.ways]
        return "\n".join(["<section><h2>What was cut</h2>", *parts, "</section>"])
    kinds = list(dict.fromkeys(kind for cut in report.layers for kind in cut.units))
    parts = [_blocks(report)] if "layer" in kinds else []
    parts += [figure(units_chart(report.layers, kind), charts) for kind in kinds if kind != "layer"]
    if any(cut.matrices for cut in report.layers):
        parts.append(figure(sparsity_chart(report.layers), charts))
    if not parts:
        return ""
    return "\n".join(["<section><h2>What was cut</h2>", *parts, _cuts_table(report, kinds), "</section>"])


def _blocks(report: Report) -> str:
    gone = [cut.layer for cut in report.layers if cut.units.get("layer", (1, 1))[1] == 0]
    cells = (
        f'<li class="gone" title="removed">{cut.layer}</li>' if cut.layer in gone else f"<li>{cut.layer}</li>"
        for cut in report.layers
    )
    sentence = f"Layers {ranges(gone)} were removed" if gone else "No layer was removed"
    left = len(report.layers) - len(gone)
    return f'<p>{sentence}; {left} of {len(report.layers)} stay.</p><ol class="blocks">{"".join(cells)}</ol>'


def _cuts_table(report: Report, kinds: Sequence[str]) -> str:
    names = list(dict.fromkeys(name for cut in report.layers for name in cut.matrices))
    header = ["layer", *(KIND_WORDS.get(kind, kind) for kind in kinds), *names, "sparsity"]
    rows = [
        [
            str(cut.layer),
            *(f"{cut.units[k][1]:,} of {cut.units[k][0]:,}" if k in cut.units else MISSING for k in kinds),
            *(percent(cut.matrices[n]) if n in cut.matrices else MISSING for n in names),
            percent(cut.sparsity),
        ]
        for cut in report.layers
    ]
    return f"<details><summary>The same in numbers</summary>{table(header, rows)}</details>"


def _channels_table(report: Report) -> str:
    rows = [
        [name, f"{len(kept):,}", f"{report.groups[name]:,}", percent(1 - len(kept) / report.groups[name])]
        for name, kept in report.keep.items()
    ]
    header = ["group", "kept", "of", "removed"]
    return f"<details><summary>The same in numbers</summary>{table(header, rows)}</details>"


def _scores(report: Report, charts: dict[str, Any]) -> str:
    of_channels = channel_scores(report) if report.groups else None
    drawn = ([of_channels] if of_channels else []) if report.groups else score_charts(report)
    figures = [figure(chart, charts) for chart in drawn]
    return "\n".join(["<section><h2>Scores</h2>", *figures, "</section>"]) if figures else ""


def _comparison(report: Report) -> str:
    if not report.metrics:
        return ""
    notes = footnotes(report.metrics)
    items = "".join(f'<li id="note-{number}">{escape(protocol)}</li>' for protocol, number in notes.items())
    protocols = f'<h3>How it was measured</h3><ol class="notes">{items}</ol>' if items else ""
    # what a training begins with may be sparse, and is cut where the training is to recover
    trained = bool(report.trainings or report.recoveries)
    table = _metrics_table(report.metrics, notes, first="" if trained else " (dense)")
    return f"<section><h2>Before and after</h2>{table}{_speed_note(report)}{protocols}</section>"


def _metrics_table(metrics: Sequence[Metric], notes: Mapping[str, int], *, first: str) -> str:
    models = model_names(metrics)
    columns = "".join(
        f'<th scope="col">{escape(model)}{"" if i or "dense" in model.lower() else first}</th>'
        + ('<th scope="col">change</th>' if i else "")
        for i, model in enumerate(models)
    )
    rows = "".join(_metric_row(metric, models, notes.get(metric.protocol)) for metric in metrics)
    head = f'<thead><tr><th scope="col">metric</th>{columns}</tr></thead>'
    return scrolling(f"<table>{head}<tbody>{rows}</tbody></table>")


def _metric_row(metric: Metric, models: Sequence[str], note: int | None) -> str:
    mark = f'<sup><a href="#note-{note}" aria-label="measurement note {note}">{note}</a></sup>' if note else ""
    cells = "".join(
        f"<td>{escape(metric_value(metric, model))}</td>"
        + (f"<td>{_change(metric, models[0], model)}</td>" if i else "")
        for i, model in enumerate(models)
    )
    return f'<tr><th scope="row">{escape(metric.name)}{mark}</th>{cells}</tr>'


def _speed_note(report: Report) -> str:
    masked = any(cut.matrices for cut in report.layers)
    sentences = speed_sentences(report.metrics, masked)
    if not sentences:
        return ""
    css = "box warning" if masked and not is_faster(report.metrics) else "box"
    return f'<div class="{css}" role="note">{"".join(f"<p>{escape(s)}</p>" for s in sentences)}</div>'


def _samples(report: Report) -> str:
    if not report.samples:
        return ""
    parts = []
    for sample in report.samples:
        columns = "".join(
            f"<div><h3>{escape(model)}</h3><p>{escape(text.strip())}</p></div>"
            for model, text in sample.outputs.items()
        )
        parts.append(f'<blockquote>{escape(sample.prompt)}</blockquote><div class="samples">{columns}</div>')
    return f"<section><h2>What they write</h2><p class='muted'>Greedy continuations.</p>{''.join(parts)}</section>"


def _loading(report: Report) -> str:
    if report.output is None:
        return ""
    if report.loading:
        return f"<section><h2>Load it</h2><pre tabindex='0'><code>{escape(report.loading)}</code></pre></section>"
    folder = json.dumps(report.output, ensure_ascii=False)
    if report.plain:
        why = "A plain checkpoint: stock transformers and what builds on it load it as it is."
        argument = ""
    else:
        why = (
            "The layers differ in shape or the weights are packed, so the folder ships its own modelling file; "
            "without secateur installed it needs trust_remote_code=True, with it import secateur is enough."
        )
        argument = ", trust_remote_code=True"
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({folder}{argument})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({folder})\n"
    )
    return f"<section><h2>Load it</h2><p>{why}</p><pre tabindex='0'><code>{escape(code)}</code></pre></section>"


def _provenance(report: Report) -> str:
    seconds = {stage: f"{value:,.1f} s" for stage, value in report.seconds.items()}
    blocks = (
        ("Model", {"name": report.model, "revision": report.revision} if report.revision else {}),
        ("Options", report.options),
        ("Calibration", report.calibration or {}),
        ("Time", seconds),
        ("Machine", report.machine),
        ("Versions", report.versions),
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    parts = [f"<h3>{title}</h3>{facts_table(facts)}" for title, facts in blocks if facts]
    head = f'<h3>To know</h3><ul class="notes">{notes}</ul>' if notes else ""
    return f"<section><h2>How it was made</h2>{head}{''.join(parts)}</section><footer class='muted'>secateur</footer>"
