"""The anatomy and the plan of a traced module as text: groups of coupled channels have names, not layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from secateur.errors import UsageError, nearest
from secateur.report.numbers import format_bytes, format_count, percent

if TYPE_CHECKING:
    from secateur.plans import Plan
    from secateur.structure import Anatomy
    from secateur.structure.anatomy import Group

# more slices of one group than this are counted, not named
_SHOWN = 4


def coupled_table(anatomy: Anatomy, table: Table) -> Table:
    """One row per group of coupled channels; what stays and why below."""
    for name in ("group", "units", "parameters", "MACs", "bytes", "leaves together"):
        table.add_column(name, justify="left" if name in ("group", "leaves together") else "right", overflow="fold")
    for group in anatomy:
        table.add_row(
            Text(group.name),
            f"{group.units:,}",
            format_count(group.cost.params),
            format_count(group.cost.macs),
            format_bytes(group.cost.bytes),
            Text(_slices(group)),
            style="dim" if group.frozen else "",
        )
    table.caption = Text("\n".join(_caption(anatomy)))
    table.caption_justify = "left"
    return table


def coupled_head(anatomy: Anatomy) -> str:
    """One line with the size of the module."""
    total = anatomy.total
    return (
        f"{anatomy.model_type}, {format_count(total.params)} parameters, {format_count(total.macs)} MACs, "
        f"{format_bytes(total.bytes)}"
    )


def _slices(group: Group) -> str:
    places = [f"{part.tensor}[{part.dim}]" for part in group.slices]
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    return ", ".join(places[:_SHOWN]) + more


def _caption(anatomy: Anatomy) -> list[str]:
    lines = ["costs are of one unit; MACs of one call on the example inputs; tensor[dimension]"]
    reasons: dict[str, list[str]] = {}
    for name, reason in [(g.name, g.frozen) for g in anatomy if g.frozen] + [
        (f.name, f.reason) for f in anatomy.frozen
    ]:
        reasons.setdefault(str(reason), []).append(name)
    lines += [f"stays: {_some(names)}: {reason}" for reason, names in reasons.items()]
    inexact: dict[str, list[str]] = {}
    for group in anatomy:
        if group.inexact and not group.frozen:
            inexact.setdefault(group.inexact, []).append(group.name)
    return [*lines, *(f"masked and cut differ: {_some(names)}: {reason}" for reason, names in inexact.items())]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def reasons(anatomy: Anatomy, name: str) -> list[tuple[str, str]]:
    """(place, what holds for it) for every dimension of the parameters ``name`` or of the module ``name``: what leaves
    together with its channels, or why nothing leaves. Raises UsageError when there are none."""

    def meant(tensor: str) -> bool:
        return tensor == name or tensor.startswith(f"{name}.")

    told = []
    for group in anatomy:
        for part in (part for part in group.slices if meant(part.tensor)):
            place = f"{part.tensor}[{part.dim}]"
            width = part.index.shape[1]
            count = f"{group.units:,} of its channels" if width == 1 else f"{group.units:,} times {width:,} positions"
            others = [f"{p.tensor}[{p.dim}]" for p in group.slices if p is not part]
            also = f" leave together with {', '.join(others)}" if others else " leave alone"
            kept = f"; they stay: {group.frozen}" if group.frozen else ""
            changed = f"; masked and cut differ: {group.inexact}" if group.inexact and not group.frozen else ""
            told.append((place, f"group {group.name}: {count}{also}{kept}{changed}"))
    for item in anatomy.frozen:
        tensor, _, dim = item.name.partition(" dim ")
        if meant(tensor):
            told.append((f"{tensor}[{dim}]", f"stays: {item.reason}"))
    if not told:
        names = {part.tensor for group in anatomy for part in group.slices} | {
            f.name.split()[0] for f in anatomy.frozen
        }
        places = names | {tensor.rpartition(".")[0] for tensor in names}
        raise UsageError(f"{anatomy.model_type} has no parameter or module '{name}'{nearest(name, places)}")
    return sorted(told)


def kept_table(plan: Plan, table: Table) -> Table:
    """One row per group: how many of its channels stay."""
    table.add_column("group", overflow="fold")
    for name in ("kept", "of", "removed"):
        table.add_column(name, justify="right")
    for name, kept in plan.keep.items():
        units = plan.groups[name]
        table.add_row(Text(name), f"{len(kept):,}", f"{units:,}", percent(1 - len(kept) / units))
    return table
