"""Tables for the terminal; everything here fits 80 columns and folds layers that are alike."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from secateur.report.coupled import coupled_head, coupled_table, kept_table
from secateur.report.numbers import (
    MISSING,
    change_from,
    footnotes,
    format_bytes,
    format_change,
    format_count,
    metric_value,
    model_names,
    percent,
    ranges,
    short_names,
    superscript,
    verdict,
)
from secateur.report.report import LayerCut, Metric

if TYPE_CHECKING:
    from secateur.plans import Plan, PlanDiff
    from secateur.provenance import Allocation, Provenance
    from secateur.structure import Anatomy
    from secateur.structure import Group as UnitGroup

WIDTH = 80
_MATRIX_COLUMNS = 8
"""more weight columns than this don't fit a terminal; their range is shown instead"""
_STYLES = {"better": "green", "worse": "red", "": ""}
_LAYER = re.compile(r"(?:^|(?<=\.))(\d+)\.")


def metrics_table(metrics: Sequence[Metric]) -> Table:
    """Every metric of every model beside the dense baseline; green is better, red is worse; protocols below."""
    models = model_names(metrics)
    notes = footnotes(metrics)
    table = _table(caption="\n".join(f"{superscript(n)} {protocol}" for protocol, n in notes.items()))
    table.add_column("metric")
    for position, model in enumerate(models):
        label = f"{model} (dense)" if position == 0 and "dense" not in model.lower() else model
        table.add_column(_plain(label), justify="right", overflow="fold")
    if len(models) == 2:
        table.add_column("change", justify="right", no_wrap=True)
    for metric in metrics:
        mark = f"{superscript(notes[metric.protocol])}" if metric.protocol else ""
        table.add_row(_plain(metric.name + mark), *_metric_cells(metric, models))
    return table


# characters of a list of what leaves
_RANGES_SHOWN = 400


def checks_table(checks: Sequence[Mapping[str, Any]]) -> Table:
    """What ``verify`` looked at: check, result, and what was counted or why nothing was."""
    table = _table()
    for name in ("check", "result", "detail"):
        table.add_column(name, overflow="fold")
    for check in checks:
        style = {"failed": "red", "passed": "green"}.get(check["status"], "dim")
        detail = check["detail"] if check["status"] != "failed" else f"{len(check['problems'])} wrong, see below"
        table.add_row(_plain(check["check"]), Text(check["status"], style=style), _plain(detail))
    return table


def anatomy_table(anatomy: Anatomy) -> Table:
    """What can be cut: groups (equal layers folded), units, cost of one unit, share of a block; then the rest."""
    table = _table(caption=_anatomy_caption(anatomy))
    for name in ("layers", "group", "units", "parameters", "bytes", "KV bytes", "share"):
        table.add_column(name, justify="left" if name in ("layers", "group") else "right")
    # biases and norms, which are no multiplications, would make a block more than the whole of its matrices
    block = anatomy.blocks.macs / max(anatomy.num_layers, 1)
    for group, layers in _folded_groups(anatomy):
        whole = group.kind in ("vocab", "hidden")
        share = group.cost.macs * (1 if group.kind == "layer" else group.units) / block if block else 0.0
        table.add_row(
            "all" if group.kind == "layer" else MISSING if whole else ranges(layers),
            _plain(_group_label(group)),
            f"{group.units:,}",
            format_count(group.cost.params),
            format_bytes(group.cost.bytes),
            f"{group.cost.kv_bytes:,}" if group.cost.kv_bytes else MISSING,
            MISSING if whole else f"{share:.0%}".replace("%", " %"),
            style="dim" if group.frozen else "",
        )
    return table


def anatomy_text(anatomy: Anatomy) -> str:
    """``anatomy_table`` as plain text under a line with the size of the model."""
    if not anatomy.num_layers:
        return plain_text(Group(Text(coupled_head(anatomy)), Text(), coupled_table(anatomy, _table())))
    total, blocks = anatomy.total, anatomy.blocks
    coverage = anatomy.coverage
    inside = "in the matrices of the blocks"
    if coverage is not None:
        inside = f"of {format_count(coverage.weights)} weights of the blocks in their matrices"
    head = (
        f"{anatomy.model_type}, {anatomy.num_layers} layers, {format_count(total.params)} parameters "
        f"({format_count(blocks.params)} {inside}), {format_bytes(total.bytes)}"
    )
    return plain_text(Group(Text(head), Text(), anatomy_table(anatomy)))


def plan_table(plan: Plan) -> RenderableType:
    """What a plan keeps, layer by layer (equal layers folded); where it comes from; what to know about it."""
    parts: list[RenderableType] = [Text(line) for line in _provenance_lines(plan.provenance)]
    if plan.inputs is not None:
        parts += [Text(), kept_table(plan, _table()), Text()]
        return Group(*parts, *(_note(note) for source in plan.provenance for note in source.notes))
    units = {name: f"{len(kept):,}/{plan.groups[name]:,}" for name, kept in plan.keep.items() if _LAYER.search(name)}
    sparsity = {name.removesuffix(".weight"): plan.sparsity(name) for name in plan.masks if not plan.refits(name)}
    if units or sparsity:
        parts += [Text(), _layer_table(_by_layer(units), _by_layer(sparsity), "kept"), Text()]
    for name in sorted(set(plan.keep) - set(units)):
        gone = ranges(plan.removed(name).tolist()) or "none"
        gone = gone if len(gone) <= _RANGES_SHOWN else f"{gone[:_RANGES_SHOWN].rpartition(',')[0]}, ..."
        parts.append(Text(f"{name}: {len(plan.keep[name]):,}/{plan.groups[name]:,} kept, removed: {gone}"))
    if plan.rotations:
        size, width = next(iter(plan.rotations.values())).shape
        parts.append(Text(f"hidden states: {width:,} of {size:,} directions kept, in {len(plan.rotations)} bases"))
    extras = _compensation_line(plan)
    notes = [note for source in plan.provenance for note in source.notes]
    return Group(*parts, *(Text(line) for line in extras), *(_note(note) for note in notes))


def plan_text(plan: Plan) -> str:
    """``plan_table`` as plain text."""
    return plain_text(plan_table(plan))


def diff_table(diff: PlanDiff) -> Table:
    """Where two plans differ: units or weights that both keep, that only one keeps, and their overlap."""
    table = _table(caption="" if diff else "the plans keep the same")
    table.add_column("group or weight", overflow="fold")
    for name in ("both keep", "only first", "only second", "overlap"):
        table.add_column(name, justify="right")
    for name, (both, first, second) in diff.rows.items():
        union = both + first + second
        counts = (f"{count:,}" for count in (both, first, second))
        table.add_row(_plain(name.removesuffix(".weight")), *counts, percent(both / union) if union else MISSING)
    if diff:
        table.caption = _plain("\noverlap: kept by both / kept by either")
    return table


def methods_table(methods: Iterable[Mapping[str, Any]]) -> Table:
    """One line per method; takes what ``describe`` returns."""
    table = _table()
    table.add_column("method", no_wrap=True, style="bold")
    for name in ("cuts", "score", "recovery", "speed-up"):
        table.add_column(name, no_wrap=True)
    table.add_column("what it does")
    for method in methods:
        about = method["descriptor"]
        words = (about["object"], about["score"], about["recovery"], about["speedup"])
        table.add_row(_plain(method["name"]), *(_two_lines(word) for word in words), _plain(_after_name(method)))
    return table


def method_text(method: Mapping[str, Any]) -> RenderableType:
    """All about one method: what it does, its descriptor, its options; takes what ``describe`` returns."""
    about = Table.grid(padding=(0, 2))
    for key, value in method["descriptor"].items():
        about.add_row(Text(key, style="dim"), _words(value))
    about.add_row(Text("sequential", style="dim"), "yes" if method["sequential"] else "no")
    return Group(
        Text(method["name"], style="bold"),
        Text(method["doc"]),
        Text(),
        about,
        Text(),
        _options_table(method["options"]),
    )


def allocators_table(allocators: Iterable[Mapping[str, Any]]) -> Table:
    """One line per allocator; takes what ``describe_allocator`` returns."""
    table = _table()
    table.add_column("allocator", no_wrap=True, style="bold")
    table.add_column("observes", no_wrap=True)
    table.add_column("for", no_wrap=True)
    table.add_column("what it does")
    for allocator in allocators:
        table.add_row(
            _plain(allocator["name"]), allocator["observes"], allocator["follows"], _plain(_after_name(allocator))
        )
    return table


def allocator_text(allocator: Mapping[str, Any]) -> RenderableType:
    """All about one allocator; takes what ``describe_allocator`` returns."""
    head = Text(allocator["name"], style="bold")
    return Group(head, Text(allocator["doc"]), Text(), _options_table(allocator["options"]))


def rows_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 0, caption: str = "") -> Table:
    """Plain cells under their heads; numbers to the right, and the first ``words`` columns to the left."""
    table = _table(caption)
    for position, name in enumerate(header):
        left = not name or position < words
        table.add_column(_plain(name), justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_plain(cell) for cell in row))
    return table


def cut_table(layers: Sequence[LayerCut]) -> Table:
    """Units before and after, and sparsity, of every layer (equal layers folded)."""
    units = {cut.layer: {kind: f"{old:,} → {new:,}" for kind, (old, new) in cut.units.items()} for cut in layers}
    matrices = {cut.layer: cut.matrices for cut in layers}
    return _layer_table(units, matrices, "", {cut.layer: cut.sparsity for cut in layers})


def plain_text(renderable: RenderableType, width: int = WIDTH) -> str:
    """What rich would print, without colours, at most ``width`` columns wide."""
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, force_terminal=False).print(renderable)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")


def _table(caption: str = "") -> Table:
    return Table(
        box=SIMPLE_HEAD,
        caption=_plain(f"\n{caption}") if caption else None,
        caption_justify="left",
        pad_edge=False,
        show_edge=False,
        padding=(0, 1),
        collapse_padding=True,
        header_style="bold",
    )


def _plain(text: str) -> Text:
    # names may hold square brackets, which rich would take for markup
    return Text(text)


def _words(value: str) -> Text:
    return _plain(value.replace("_", " "))


def _note(note: str) -> Text:
    return Text(f"note: {note}", style="yellow")


def _two_lines(value: str) -> Text:
    # broken here rather than by rich, which would cut words to make room
    return _plain("\n".join(value.rsplit("_", 1)).replace("_", " "))


def _after_name(method: Mapping[str, Any]) -> str:
    name, colon, rest = method["summary"].partition(": ")
    return rest if colon and len(name) <= 20 else method["summary"]


def _metric_cells(metric: Metric, models: Sequence[str]) -> list[Text]:
    cells = [Text(metric_value(metric, model)) for model in models]
    changes = [_change_text(metric, models[0], model) for model in models[1:]]
    if len(models) == 2:
        return [*cells, *changes]
    for cell, change in zip(cells[1:], changes, strict=True):
        if change.plain != MISSING:
            cell.append("\n").append_text(change)
    return cells


def _change_text(metric: Metric, dense: str, model: str) -> Text:
    change = change_from(metric, dense, model)
    return Text(format_change(change), _STYLES[verdict(change, metric.higher_is_better)])


def _group_label(group: UnitGroup) -> str:
    name = group.name if group.kind == "layer" else _LAYER.sub("", group.name, count=1).removeprefix("layers.")
    label = name if name in (group.kind, f"{group.kind}s") else f"{name} ({group.kind})"
    return label + (" frozen" if group.frozen else "")


def _folded_groups(anatomy: Anatomy) -> list[tuple[UnitGroup, list[int]]]:
    folded: dict[Any, tuple[UnitGroup, list[int]]] = {}
    for group in anatomy.groups:
        name = _LAYER.sub("", group.name, count=1)
        key = (name, group.kind, group.units, group.cost, group.frozen, group.inexact)
        folded.setdefault(key, (group, []))[1].append(group.layer)
    return list(folded.values())


def _anatomy_caption(anatomy: Anatomy) -> str:
    lines = ["costs are of one unit; KV bytes per token; share of the matrices of one block"]
    if anatomy.matrices:
        lines.append(_matrices_line(anatomy))
    if (coverage := anatomy.coverage) is not None:
        lines.append(f"a method for matrices {coverage.sentence}")
    frozen: dict[str, list[str]] = {}
    for item in anatomy.frozen:
        frozen.setdefault(item.reason, []).append(item.name)
    lines += [f"frozen: {_names_folded(names)}: {reason}" for reason, names in frozen.items()]
    inexact = dict.fromkeys(g.inexact for g in anatomy.groups if g.inexact)
    return "\n".join([*lines, *(f"masked and cut differ: {reason}" for reason in inexact)])


def _matrices_line(anatomy: Anatomy) -> str:
    kinds: dict[str, int] = {}
    for matrix in anatomy.matrices:
        after = re.split(r"\.\d+\.", matrix.module, maxsplit=1)[-1]
        kinds[f"{after} {matrix.shape[0]}x{matrix.shape[1]}"] = 1
    shown = list(kinds)[:12]
    more = f" and {len(kinds) - len(shown)} more" if len(kinds) > len(shown) else ""
    return f"{len(anatomy.matrices)} matrices whose weights can be zeroed: {', '.join(shown)}{more}"


def _names_folded(names: Sequence[str]) -> str:
    layers: dict[str, list[int]] = {}
    for name in names:
        found = _LAYER.search(name)
        layers.setdefault(_LAYER.sub("*.", name, count=1), []).extend([int(found[1])] if found else [])
    return ", ".join(f"{n} ({ranges(found)})" if found else n for n, found in layers.items())


def _provenance_lines(provenance: Sequence[Provenance]) -> list[str]:
    lines = []
    for source in provenance:
        options = ", ".join(f"{key}={value}" for key, value in source.options.items())
        lines.append(f"{source.method}({options})")
        if source.allocation is not None:
            lines.append(_allocation_line(source.allocation))
        if source.coverage is not None:
            lines.append(source.coverage.sentence)
        lines += [f"trained afterwards: {recovery.label}" for recovery in source.recoveries]
        lines.append(f"model: {source.model.label or source.model.architecture}, {source.model.num_layers} layers")
        data = source.calibration
        if data is not None:
            lines.append(
                f"calibration: {data.source}, {data.samples} windows of {data.length} tokens, seed {data.seed}, "
                f"sha256 {data.sha256[:12]}"
            )
        versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
        lines.append(f"seed {source.seed}, {source.dtype}" + (f"; {versions}" if versions else ""))
    return lines


def _allocation_line(allocation: Allocation) -> str:
    given = allocation.sparsities.values()
    span = f": matrices lose {100 * min(given):.1f} to {100 * max(given):.1f} %" if given else ""
    return f"allocation: {allocation.label}{span}"


def _compensation_line(plan: Plan) -> list[str]:
    lines = [f"bias corrections: {len(plan.biases)}"] if plan.biases else []
    return lines + ([f"weights whose kept entries are updated: {len(plan.values)}"] if plan.values else [])


def _by_layer(values: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    layers: dict[int, dict[str, Any]] = {}
    for name, value in values.items():
        found = _LAYER.search(name)
        layer, kind = (int(found[1]), name[found.end() :]) if found else (-1, name)
        layers.setdefault(layer, {})[kind] = value
    return dict(sorted(layers.items()))


def _layer_table(
    units: Mapping[int, Mapping[str, str]],
    matrices: Mapping[int, Mapping[str, float]],
    verb: str,
    sparsity: Mapping[int, float] | None = None,
) -> Table:
    kinds = list(dict.fromkeys(kind for row in units.values() for kind in row))
    names = list(dict.fromkeys(name for row in matrices.values() for name in row))
    wide = len(names) > _MATRIX_COLUMNS
    if names and not wide:
        sparsity = None
    table = _table(caption="zeros in % of the entries" if names else "")
    table.add_column("layers", no_wrap=True)
    for kind in kinds:
        table.add_column(_plain(f"{kind} {verb}".strip()), justify="right")
    for label in ["weights"] if wide else [short_names(names)[name] for name in names]:
        table.add_column(_plain(label), justify="right")
    if sparsity:
        table.add_column("sparsity", justify="right")
    rows = {}
    for layer in sorted({*units, *matrices}):
        row = [units.get(layer, {}).get(kind, MISSING) for kind in kinds]
        row += _sparsity_cells(matrices.get(layer, {}), names, wide)
        rows[layer] = (*row, percent(sparsity[layer])) if sparsity else tuple(row)
    for layers, row in _fold(rows):
        table.add_row(ranges(layers) if layers[0] >= 0 else "other", *row)
    return table


def _sparsity_cells(values: Mapping[str, float], names: Sequence[str], wide: bool) -> list[str]:
    if wide:
        return [f"{100 * min(values.values()):.1f}–{100 * max(values.values()):.1f}" if values else MISSING]
    return [f"{100 * values[name]:.1f}" if name in values else MISSING for name in names]


def _fold(rows: Mapping[int, tuple[str, ...]]) -> list[tuple[list[int], tuple[str, ...]]]:
    folded: list[tuple[list[int], tuple[str, ...]]] = []
    for layer, row in rows.items():
        if folded and folded[-1][1] == row:
            folded[-1][0].append(layer)
        else:
            folded.append(([layer], row))
    return folded


def _options_table(options: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table()
    table.add_column("option", no_wrap=True, style="bold")
    for name in ("default", "unit", "range", "meaning"):
        table.add_column(name)
    for name, spec in options.items():
        allowed = " | ".join(spec["choices"]) or spec["range"]
        default = '""' if spec["default"] == "" else str(spec["default"])
        cells = (default, spec["unit"] or MISSING, allowed or MISSING, spec["help"])
        table.add_row(_plain(name), *(_plain(cell) for cell in cells))
    return table
