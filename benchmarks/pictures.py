"""The picture and the table of the guide to KV caches, drawn from the result that is committed.

    python benchmarks/pictures.py

Draws ``docs/images/cache-quality.svg`` and the table between the marks in ``docs/guides/halve-your-kv-cache.md``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import svg
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
LEAST = 0.7
"""increase in %: what is lower lies at the edge"""
STYLE = ".line{fill:none;stroke-width:1.6} .glyph{font-size:15px;stroke:none;text-anchor:middle}"


def series_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float, str]]]:
    """name → (bytes held in %, increase of perplexity in %, cache), the smallest first."""
    return {
        name: sorted((r["bytes held %"], r["increase %"], r["cache"]) for r in rows if re.fullmatch(rule, r["cache"]))
        for name, rule in SERIES.items()
    }


def picture(result: Mapping[str, Any]) -> str:
    """An SVG that stands by itself, light or dark: increase of perplexity over the bytes held, both measured."""
    found = {name: places for name, places in series_of(result["rows"]).items() if places}
    high = max(150.0, 1.1 * max(y for places in found.values() for _, y, _ in places))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    up = svg.logarithmic(LEAST, high, bottom, TOP)

    def along(x: float) -> float:
        return LEFT + (x - TICKS_X[0]) / (TICKS_X[-1] - TICKS_X[0]) * (right - LEFT)

    parts = []
    for x in TICKS_X:
        parts.append(svg.down(along(x), TOP, bottom))
        parts.append(svg.text(along(x), bottom + 18, f"{x} %", anchor="middle", css="small"))
    for y in TICKS_Y:
        parts.append(svg.across(LEFT, up(y), right))
        parts.append(svg.text(LEFT - 8, up(y) + 4, f"{y} %", anchor="end", css="small"))
    parts.append(svg.text(LEFT - 50, 24, "increase of perplexity, logarithmic"))
    parts.append(svg.text(right, HEIGHT - 10, "bytes held, of the dense cache", anchor="end"))
    for number, (name, look) in enumerate(looks_of(found).items()):
        places = [(along(x), up(y), f"{cache}: {x:.1f} % of the bytes, {y:+.1f} %") for x, y, cache in found[name]]
        if not name.startswith("tokens, then"):
            path = "L".join(f"{px:.1f} {py:.1f}" for px, py, _ in places)
            parts.append(f'<path class="line c{number}" d="M{path}"/>')
        for px, py, said in places:
            glyph = f'<text class="glyph c{number}" x="{px:.1f}" y="{py + 5:.1f}">'
            parts.append(f"{glyph}<title>{escape(said)}</title>{look.glyph}</text>")
        y = TOP + 20 + 26 * number
        parts.append(svg.text(right + 26, y, look.glyph, anchor="middle", css=f"glyph c{number}"))
        parts.append(svg.text(right + 42, y, name))
    title = f"What a compressed KV cache of {result['model']} costs, against the bytes that it holds"
    return svg.document(WIDTH, HEIGHT, parts, title=title, series=len(found), light=STYLE, dark=STYLE)


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
