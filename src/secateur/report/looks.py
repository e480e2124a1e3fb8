"""How series are told apart in one chart: by colours that differ in lightness as well as in hue, and by marks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape

# (name, light, dark, symbol, glyph, glyph of the open symbol)
_LOOKS = (
    ("one", "#2f6f6a", "#58a89d", "circle", "●", "○"),
    ("two", "#c26a1b", "#e2a466", "square", "■", "□"),
    ("three", "#5b4b9a", "#a99be0", "triangle-up", "▲", "△"),
    ("four", "#a63d5b", "#ee8fa8", "diamond", "◆", "◇"),
    ("five", "#5d7a1f", "#b3cf6b", "triangle-down", "▼", "▽"),
    ("six", "#2a6496", "#7db8e8", "star", "★", "☆"),
)
COLOURS = tuple((light, dark) for _, light, dark, *_ in _LOOKS)
"""of series one after another, on a light page and on a dark one"""
LOOKS_STYLE = (
    ":root {" + "".join(f"--{name}: {light};" for name, light, *_ in _LOOKS) + "}\n"
    "@media (prefers-color-scheme: dark) { :root {"
    + "".join(f"--{name}: {dark};" for name, _, dark, *_ in _LOOKS)
    + "} }\n.key b { margin-right: .35rem; font-weight: 400; }\n"
)


@dataclass(frozen=True)
class Look:
    """The colour of a series as a name of the style sheet, its symbol in plotly, and the same as a character."""

    colour: str
    symbol: str
    glyph: str


def looks_of(names: Iterable[str]) -> dict[str, Look]:
    """A look for each of the names, in their order; from the seventh on symbols are open."""
    found = {}
    for number, name in enumerate(names):
        colour, _, _, symbol, full, empty = _LOOKS[number % len(_LOOKS)]
        opened = number // len(_LOOKS) % 2 == 1
        found[name] = Look(f"var(--{colour})", f"{symbol}-open" if opened else symbol, empty if opened else full)
    return found


def key_of(looks: Mapping[str, Look]) -> str:
    """The list items of a chart's key."""
    return "".join(
        f'<li><b style="color:{look.colour}">{look.glyph}</b>{escape(name)}</li>' for name, look in looks.items()
    )
