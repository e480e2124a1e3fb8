"""The picture and the table of the guide to KV caches, drawn from the result that is committed.

    python benchmarks/pictures.py

Draws ``docs/images/cache-quality.svg`` and the table between the marks in ``docs/guides/halve-your-kv-cache.md``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from common import RESULTS

from secateur.report.looks import looks_of

RESULT = RESULTS / "kv-cache-smollm2-135m.json"
GUIDE = RESULTS.parent / "guides" / "halve-your-kv-cache.md"
PICTURE = RESULTS.parent / "images" / "cache-quality.svg"
BEGIN, END = "<!-- table: benchmarks/pictures.py -->", "<!-- end of table -->"

# name in the picture → which rows of the result
SERIES = {
    "channels of keys: think": r"think:[\d.]+",
    "elements: mustafar": r"mustafar:k=([\d.]+),v=\1,block=1",
    "tokens: adakv": r"adakv:[\d.]+",
    "tokens: expected_attention": r"expected_attention:[\d.]+",
    "tokens: streaming_llm": r"streaming_llm:[\d.]+",
    "tokens by chance": r"random_kv:[\d.]+",
    "tokens, then the rest": r"(snapkv|adakv):[\d.]+\+.*",
}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 420, 66, 240, 44, 54
TICKS_X, TICKS_Y = (20, 40, 60, 80, 100), (1, 3, 10, 30, 100)
_LIGHT = ("#2f6f6a", "#c26a1b", "#5b4b9a", "#a63d5b", "#5d7a1f", "#2a6496")
_DARK = ("#58a89d", "#e2a466", "#a99be0", "#ee8fa8", "#b3cf6b", "#7db8e8")


def series_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float, str]]]:
    """name → (bytes held in %, increase of perplexity in %, cache), the smallest first."""
    return {
        name: sorted((r["bytes held %"], r["increase %"], r["cache"]) for r in rows if re.fullmatch(rule, r["cache"]))
        for name, rule in SERIES.items()
    }


def picture(result: Mapping[str, Any]) -> str:
    """An SVG that stands by itself, light or dark: increase of perplexity over the bytes held, both measured."""
    found = {name: places for name, places in series_of(result["rows"]).items() if places}
    low, high = 0.7, max(150.0, 1.1 * max(y for places in found.values() for _, y, _ in places))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - TICKS_X[0]) / (TICKS_X[-1] - TICKS_X[0])
        up = math.log(max(y, low) / low) / math.log(high / low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    colours = [f".c{i}{{fill:{_LIGHT[i % 6]};stroke:{_LIGHT[i % 6]}}}" for i in range(len(found))]
    dark = [f".c{i}{{fill:{_DARK[i % 6]};stroke:{_DARK[i % 6]}}}" for i in range(len(found))]
    title = f"What a compressed KV cache of {result['model']} costs, against the bytes that it holds"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" '
        'font-size="14" role="img" aria-labelledby="t">',
        f'<title id="t">{escape(title)}</title>',
        "<style>text{fill:#1f2328} .small{font-size:12px;fill:#57606a} .grid{stroke:#d0d7de;fill:none} "
        ".line{fill:none;stroke-width:1.6} .glyph{font-size:15px;stroke:none;text-anchor:middle}",
        " ".join(colours),
        "@media (prefers-color-scheme: dark){text{fill:#e6edf3} .small{fill:#8b949e} .grid{stroke:#30363d} "
        + " ".join(dark)
        + "}</style>",
    ]
    for x in TICKS_X:
        px, bottom = at(x, low)
        parts.append(f'<path class="grid" d="M{px:.1f} {TOP}V{bottom:.1f}"/>')
        parts.append(f'<text class="small" x="{px:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{x} %</text>')
    for y in TICKS_Y:
        left, py = at(TICKS_X[0], y)
        parts.append(f'<path class="grid" d="M{left:.1f} {py:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="small" x="{left - 8:.1f}" y="{py + 4:.1f}" text-anchor="end">{y} %</text>')
    parts.append(f'<text x="{LEFT - 50}" y="24">increase of perplexity, logarithmic</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 10}" text-anchor="end">bytes held, of the dense cache</text>')
    for number, (name, look) in enumerate(looks_of(found).items()):
        places = [(*at(x, y), f"{cache}: {x:.1f} % of the bytes, {y:+.1f} %") for x, y, cache in found[name]]
        if not name.startswith("tokens, then"):
            path = "L".join(f"{px:.1f} {py:.1f}" for px, py, _ in places)
            parts.append(f'<path class="line c{number}" style="fill:none" d="M{path}"/>')
        for px, py, said in places:
            glyph = f'<text class="glyph c{number}" x="{px:.1f}" y="{py + 5:.1f}" style="stroke:none">'
            parts.append(f"{glyph}<title>{escape(said)}</title>{look.glyph}</text>")
        y = TOP + 20 + 26 * number
        parts.append(f'<text class="glyph c{number}" x="{WIDTH - RIGHT + 26}" y="{y}">{look.glyph}</text>')
        parts.append(f'<text x="{WIDTH - RIGHT + 42}" y="{y}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def table(result: Mapping[str, Any]) -> str:
    """The methods in Markdown, the least loss first among those that hold about the same."""
    rows = [r for r in result["rows"] if any(re.fullmatch(rule, r["cache"]) for rule in (*SERIES.values(), _REST))]
    rows.sort(key=lambda r: (-round(r["bytes held %"] / 12.5), r["increase %"]))
    lines = ["| cache | bytes held | perplexity | increase |", "| --- | --- | --- | --- |"]
    for row in [result["rows"][0], *rows]:
        lines.append(
            f"| `{row['cache']}` | {row['bytes held %']:.0f} % | {row['perplexity']:.1f} | {row['increase %']:.1f} % |"
        )
    return "\n".join(lines)


_REST = r"(snapkv|criticalkv|h2o|keydiff|lagkv|tova|knorm|pyramidkv|chunkkv|key_rerotation):[\d.]+"


def with_table(guide: str, result: Mapping[str, Any]) -> str:
    """The guide with a fresh table between the marks."""
    before, _, rest = guide.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table(result)}\n\n{END}{after}"


def main() -> None:
    result = json.loads(RESULT.read_text(encoding="utf8"))
    PICTURE.write_text(picture(result), encoding="utf8")
    guide = Path(GUIDE)
    guide.write_text(with_table(guide.read_text(encoding="utf8"), result), encoding="utf8")


if __name__ == "__main__":
    main()
