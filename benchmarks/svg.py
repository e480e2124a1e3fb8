"""What studies draw their pictures with: SVG that stands by itself, on a light page and on a dark one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from secateur.report.looks import COLOURS

_INK = {
    "light": "text{fill:#1f2328} .small{fill:#57606a} .grid{stroke:#d0d7de}",
    "dark": "text{fill:#e6edf3} .small{fill:#8b949e} .grid{stroke:#30363d}",
}


def document(
    width: float, height: float, parts: Sequence[str], *, title: str, series: int = 0, light: str = "", dark: str = ""
) -> str:
    """A picture of so many pixels. The first ``series`` colours are the classes ``c0``, ``c1``, …, filled and stroked.

    ``light`` and ``dark`` are further rules of CSS on either kind of page.
    """
    colours = {
        page: " ".join(f".c{n}{{fill:{pair[place]};stroke:{pair[place]}}}" for n, pair in enumerate(_cycled(series)))
        for place, page in enumerate(("light", "dark"))
    }
    style = (
        f".small{{font-size:11px}} .grid{{fill:none}} {_INK['light']} {colours['light']} {light}\n"
        f"@media (prefers-color-scheme: dark){{{_INK['dark']} {colours['dark']} {dark}}}"
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" '
        'font-size="13" role="img" aria-labelledby="t">'
    )
    return "\n".join([head, f'<title id="t">{escape(title)}</title>', f"<style>{style}</style>", *parts, "</svg>", ""])


def below(top: float, part: str) -> str:
    """A part of a picture, so much further down."""
    return f'<g transform="translate(0 {top})">{part}</g>'


def text(x: float, y: float, said: str, *, anchor: str = "start", css: str = "", bold: bool = False) -> str:
    """A line of text; ``anchor``: which end of it lies at ``x``."""
    looks = (f'class="{css}" ' if css else "") + ('font-weight="bold" ' if bold else "")
    return f'<text {looks}x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'


def across(x: float, y: float, to: float, css: str = "grid") -> str:
    """A horizontal line."""
    return f'<path class="{css}" d="M{x:.1f} {y:.1f}H{to:.1f}"/>'


def down(x: float, y: float, to: float, css: str = "grid") -> str:
    """A vertical line."""
    return f'<path class="{css}" d="M{x:.1f} {y:.1f}V{to:.1f}"/>'


def dot(x: float, y: float, css: str, said: str, *, radius: float = 5) -> str:
    """A mark that says what it is when it is pointed at."""
    return f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"><title>{escape(said)}</title></circle>'


def logarithmic(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Where a value lies between ``start``, the place of ``low``, and ``end``; what is beyond lies at the edge."""
    width = math.log(high / low) or 1.0
    return lambda value: start + (end - start) * min(max(math.log(max(value, low) / low) / width, 0.0), 1.0)


def _cycled(count: int) -> list[tuple[str, str]]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]
