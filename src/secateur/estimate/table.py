"""An estimate as tables for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from secateur.estimate.result import Estimate, StepEstimate, about
from secateur.progress import seconds_text
from secateur.report.numbers import format_bytes


def estimate_table(found: Estimate) -> RenderableType:
    """The sums beside what there is, then where each of them goes; 80 columns."""
    parts: list[RenderableType] = [_sums(found)]
    for step in found.steps:
        heading = f"\n{step.method}: where it goes" if len(found.steps) > 1 else "\nwhere it goes"
        parts += [Text(heading), _parts(step)]
    left = [Text(step.reach) for step in found.steps if step.reach]
    return Group(*parts, Text(f"\n{_after(found)}"), *left)


def _sums(found: Estimate) -> Table:
    table = _table("", "takes", "there is", "")
    table.add_row(
        "memory", format_bytes(found.memory_bytes), format_bytes(found.available_memory), _verdict(found.fits_memory)
    )
    device = found.available_device_memory
    if device is not None:
        table.add_row(
            "device", format_bytes(found.device_memory_bytes), format_bytes(device), _verdict(found.fits_device)
        )
    disk = found.free_disk
    table.add_row(
        "disk", format_bytes(found.disk_bytes), "" if disk is None else format_bytes(disk), _verdict(found.fits_disk)
    )
    table.add_row("time", about(found.seconds), "", f"{found.flops / 1e12:,.2f} TFLOP in {found.dtype}")
    return table


def _parts(step: StepEstimate) -> Table:
    table = _table("memory", "", "disk", "", "time", "")
    columns = (
        [
            *((name, format_bytes(size)) for name, size in _largest(step.memory)),
            *((f"{name} (device)", format_bytes(size)) for name, size in _largest(step.device_memory)),
        ],
        [(name, format_bytes(size)) for name, size in _largest(step.disk)],
        [(name, seconds_text(time)) for name, time in _largest(step.seconds) if time >= 0.05],
    )
    for row in range(max(len(column) for column in columns)):
        cells = [column[row] if row < len(column) else ("", "") for column in columns]
        table.add_row(*(text for cell in cells for text in cell))
    return table


def _largest(parts: dict[str, int] | dict[str, float]) -> list[tuple[str, float]]:
    return sorted(parts.items(), key=lambda item: -item[1])


def _after(found: Estimate) -> str:
    size = f"afterwards: {format_bytes(found.bytes_after)} instead of {format_bytes(found.bytes_before)}"
    if found.speed_bound <= 1:
        return f"{size}; zeros among the weights make it no faster by themselves"
    return f"{size}, at most {found.speed_bound:.2f} times as fast"


def _verdict(fits: bool) -> Text:
    return Text("fits", style="green") if fits else Text("does not fit", style="red")


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    numbers = ("takes", "there is")
    for place, name in enumerate(columns):
        beside = place > 0 and not name and columns[place - 1] not in numbers
        table.add_column(name, justify="right" if name in numbers or beside else "left")
    return table
