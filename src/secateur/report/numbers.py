"""How numbers are written, alike on the terminal and in the HTML report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from secateur.report.report import Metric

MISSING = "–"
_COUNTS = {"parameters", "params", "weights", "macs"}
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def format_value(value: float, unit: str = "") -> str:
    """A number with its unit, to read: ``134.5 M``, ``538 MB``, ``25.6``, ``1,234 tok/s``, ``50.0 %``.

    Units: ``bytes`` becomes kB, MB or GB (powers of 1000), ``fraction`` becomes %, counts of parameters are scaled.
    """
    if not math.isfinite(value):
        return "inf" if value > 0 else "−inf" if value < 0 else "NaN"
    base = unit.lower()
    if base in ("b", "byte", "bytes") or base.startswith("bytes/"):
        return format_bytes(value) + unit[5:]
    if base in _COUNTS or (not unit and abs(value) >= 1e6):
        return format_count(value)
    if base in ("fraction", "%"):
        return f"{value * 100 if base == 'fraction' else value:.1f} %".replace("-", "−")
    return f"{_plain(value)} {unit}".strip()


def format_bytes(value: float) -> str:
    """``538 MB``, ``53.8 MB``, ``1.2 GB``; powers of 1000."""
    scaled, suffix = _scaled(value, ("B", "kB", "MB", "GB", "TB"))
    return f"{scaled:.0f} {suffix}" if suffix == "B" or abs(scaled) >= 99.95 else f"{scaled:.1f} {suffix}"


def format_count(value: float) -> str:
    """``134.5 M``, ``1,234``."""
    if abs(value) < 99_950:
        return f"{value:,.0f}"
    scaled, suffix = _scaled(value, ("", "k", "M", "G", "T"))
    return f"{scaled:.1f} {suffix}"


def format_change(change: float | None) -> str:
    """A relative change: ``−20.0 %``, ``+12.3 %``, and as a factor from twofold on: ``×18.9``."""
    if change is None or not math.isfinite(change):
        return MISSING
    if change >= 1:
        return f"×{_plain(change + 1)}"
    if abs(change) < 0.0005:
        return "0.0 %"
    return f"{change * 100:+.1f} %".replace("-", "−")


def percent(fraction: float) -> str:
    """``20.0 %`` for 0.2."""
    return format_value(fraction, "fraction")


def metric_value(metric: Metric, model: str) -> str:
    """The value of one model; a unit that the metric's name already says is left out."""
    if model not in metric.values:
        return MISSING
    said = metric.unit.lower() in metric.name.lower() and metric.unit.lower() not in ("bytes", *_COUNTS)
    return format_value(metric.values[model], "" if said else metric.unit)


def change_from(metric: Metric, dense: str, model: str) -> float | None:
    """Relative change of ``model`` against ``dense``; None when the dense model was not measured."""
    return metric.change(model) if next(iter(metric.values), None) == dense else None


def verdict(change: float | None, higher_is_better: bool | None) -> str:
    """``better``, ``worse``, or an empty string where a change is neither or too small to show."""
    if higher_is_better is None or change is None or not abs(change) >= 0.0005:
        return ""
    return "better" if (change > 0) == higher_is_better else "worse"


def model_names(metrics: Iterable[Metric]) -> list[str]:
    """Names of all models, the dense baseline first, also where the first of the metrics lacks it."""
    places: dict[str, int] = {}
    for metric in metrics:
        for place, name in enumerate(metric.values):
            places[name] = max(place, places.get(name, 0))
    return sorted(places, key=places.__getitem__)


def footnotes(metrics: Iterable[Metric]) -> dict[str, int]:
    """Protocol → number of its footnote, from 1; metrics that were measured alike share one."""
    protocols = dict.fromkeys(metric.protocol for metric in metrics if metric.protocol)
    return {protocol: number for number, protocol in enumerate(protocols, start=1)}


def superscript(number: int) -> str:
    """``12`` → ``¹²``."""
    return str(number).translate(_SUPERSCRIPTS)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending integers, folded: ``0–3, 5, 8–9``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in parts)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Dotted name → its shortest ending that no other name shares: ``self_attn.q_proj`` → ``q_proj``."""
    split = {name: name.split(".") for name in names}
    short = {}
    for name, parts in split.items():
        others = [p for n, p in split.items() if n != name]
        length = next((k for k in range(1, len(parts)) if all(p[-k:] != parts[-k:] for p in others)), len(parts))
        short[name] = ".".join(parts[-length:])
    return short


def _scaled(value: float, suffixes: Sequence[str]) -> tuple[float, str]:
    for suffix in suffixes[:-1]:
        if abs(value) < 999.5:
            return value, suffix
        value /= 1000
    return value, suffixes[-1]


def _plain(value: float) -> str:
    size = abs(value)
    if size >= 999.5:
        text = f"{value:,.0f}"
    elif value == int(value):
        text = f"{value:.0f}"
    elif size >= 9.995:
        text = f"{value:.1f}"
    elif size >= 0.995:
        text = f"{value:.2f}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", "−") if "e" not in text else text


def json_ready(value: Any) -> Any:
    """``value`` as JSON can hold it: NaN and infinities become null, keys become text, tuples lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    return value
