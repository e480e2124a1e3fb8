"""What the studies share: results as files that say how they were made."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import secateur as sc
from secateur.versions import library_versions, machine

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def finished_rows(name: str) -> list[dict[str, Any]]:
    """Rows of an earlier, interrupted run of the same study; empty when there was none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf8"))["rows"] if path.exists() else []


def here() -> str:
    """The processor, for rows of a table that is made in several sittings; times of two are not to be compared."""
    return machine()["cpu"].split("@")[0].replace("(R)", "").replace(" Processor", "").strip()


def perplexity_of(model: Any, tokenizer: Any, text: str, *, windows: int, length: int = 512) -> float:
    """Perplexity of a model in memory on the first windows of a text."""
    table = sc.evaluate({"model": model}, tokenizer, [f"perplexity:{text}"], length=length, windows=windows)
    return table["perplexity"].values["model"]


def healed(
    cut: Any, tokenizer: Any, plan: sc.Plan, text: str, *, steps: int, batch: int, length: int, **more: Any
) -> Any:
    """A cut model after training of adapters on a text, by cross-entropy and in place; ``more`` are options of it."""
    options = {"batch": batch, "length": length, "measure": steps, **more}
    seed = options.pop("seed", 0)
    return sc.heal(
        cut, tokenizer, plan=plan, data=text, loss="ce", steps=steps, seed=seed, inplace=True, options=options
    ).model


def write_result(
    name: str,
    title: str,
    setting: dict[str, Any],
    rows: list[dict[str, Any]],
    text: str,
    leave_out: tuple[str, ...] = (),
) -> None:
    """``docs/results/<name>.json`` and ``.md``; ``text`` says what the table shows, in Markdown.

    The table leaves out what only the JSON should hold.
    """
    about = {"date": datetime.date.today().isoformat(), **setting, "machine": machine(), "versions": library_versions()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf8")
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in leave_out))
    lines = [f"# {title}", "", text.strip(), "", *_table(columns, rows), "", "How it was made:", ""]
    lines += [f"- {key}: {_flat(value)}" for key, value in about.items()]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf8")


def _table(columns: list[str], rows: list[dict[str, Any]]) -> list[str]:
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return head + ["| " + " | ".join(_cell(row.get(c, "")) for c in columns) + " |" for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def _flat(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
