"""The result of an evaluation: metrics of several models side by side."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from secateur.errors import nearest
from secateur.report import Metric


@dataclass(frozen=True)
class Table:
    """Metrics of ``models``, the first of which is the dense baseline."""

    metrics: list[Metric]
    models: list[str]

    def __getitem__(self, name: str) -> Metric:
        """The metric of that name; ``perplexity`` finds ``perplexity:builtin`` when it is the only one.

        Raises KeyError with the nearest name.
        """
        exact = [m for m in self.metrics if m.name == name]
        close = exact or [m for m in self.metrics if m.name.startswith(f"{name}:")]
        if len(close) != 1:
            raise KeyError(f"no single metric is named '{name}'{nearest(name, (m.name for m in self.metrics))}")
        return close[0]

    def __iter__(self) -> Iterator[Metric]:
        return iter(self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values: the models, and per metric its name, unit, values, change, protocol."""
        rows = []
        for metric in self.metrics:
            change = {name: metric.change(name) for name in self.models[1:]}
            rows.append({**dataclasses.asdict(metric), "change": change})
        return {"models": list(self.models), "metrics": rows}

    def __str__(self) -> str:
        from rich.console import Console

        from secateur.report.tables import metrics_table

        text = io.StringIO()
        Console(file=text, width=120, color_system=None).print(metrics_table(self.metrics))
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
