"""What a cut has changed in speed and bytes, in sentences, and why decoding isn't faster than it is."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.report.numbers import format_bytes, format_change
from secateur.report.report import DECODE, DECODE_BOUND, DECODE_PRODUCTS, Metric
from secateur.timing import BUSY

_NOTICEABLE = 0.1
"""a change of speed below this fraction is within what repeated measurements scatter"""
_AS_ALLOWED = 0.97
"""of what fewer bytes allow: a decoding that gains so much needs no explanation"""


def is_disk(metric: Metric) -> bool:
    """Whether it counts bytes on disk."""
    return metric.unit.lower() in ("bytes", "b") and "disk" in metric.name.lower()


def is_speed(metric: Metric) -> bool:
    """Whether it is a speed that a model has; what a runtime could do at best must not pass for what it does."""
    return metric.unit.lower() in ("tok/s", "tokens/s") and metric.name not in (DECODE_BOUND, DECODE_PRODUCTS)


def is_faster(metrics: Sequence[Metric]) -> bool:
    """Whether the last model has a noticeably higher speed than the first."""
    return any((m.change(list(m.values)[-1]) or 0) >= _NOTICEABLE for m in metrics if is_speed(m) and m.values)


def speed_sentences(metrics: Sequence[Metric], masked: bool) -> list[str]:
    """What the last model has gained over the first; ``masked``: single weights are zero."""
    found = (_bytes_sentence(metrics, masked), _speed_sentence(metrics, masked), decode_sentence(metrics))
    return [sentence for sentence in found if sentence]


def decode_sentence(metrics: Sequence[Metric]) -> str:
    """Why the last model doesn't decode as much faster than the first as its bytes allow.

    A token takes the time of its products with weights, which have been timed alone, and the rest. Empty where decoding
    gains what it may, where nothing was cut, or where a speed wasn't measured.
    """
    measured = {m.name: m for m in metrics if len(m.values) > 1}
    known = {name: list(m.values.values()) for name, m in measured.items()}
    if not {DECODE, DECODE_BOUND} <= known.keys():
        return ""
    gained, allowed = (_times(measured[name]) for name in (DECODE, DECODE_BOUND))
    if allowed < 1.005 or gained >= _AS_ALLOWED * allowed:
        return ""
    said = f"Decoding is {gained:.2f} times as fast, where reading fewer bytes of weights allows {allowed:.2f}"
    if len(known.get(DECODE_PRODUCTS, ())) != len(known[DECODE]):
        return f"{said}."
    whole = [1000 / known[DECODE][at] for at in (0, -1)]
    products = [1000 / known[DECODE_PRODUCTS][at] for at in (0, -1)]
    rest = [max(a - b, 0.0) for a, b in zip(whole, products, strict=True)]
    busy = any(BUSY in metric.protocol for metric in metrics if metric.name == DECODE)
    return (
        f"{said}: of {whole[0]:.3g} ms a token, products with weights took {products[0]:.3g} and take {products[1]:.3g}"
        f" now, {_times(measured[DECODE_PRODUCTS]):.2f} times as fast; the rest (attention to the cache, norms, the"
        f" calls themselves{', and waiting for processors that others had' if busy else ''}) took {rest[0]:.3g} and"
        f" takes {rest[1]:.3g}."
    )


def _times(metric: Metric) -> float:
    """How many times the first value the last one is."""
    return 1 + (metric.change(list(metric.values)[-1]) or 0)


def _speed_sentence(metrics: Sequence[Metric], masked: bool) -> str:
    speeds = [m for m in metrics if is_speed(m) and len(m.values) > 1]
    changes = ", ".join(f"{m.name} {format_change(m.change(list(m.values)[-1]))}" for m in speeds)
    if masked and not is_faster(metrics):
        measured = f" (measured: {changes})" if changes else ""
        return (
            f"The zeros made nothing faster{measured}: ordinary kernels multiply a zero like any other number. "
            "Time is saved where the runtime has sparse kernels, or by removing whole heads, neurons or layers."
        )
    return f"Speed: {changes}." if changes else ""


def _bytes_sentence(metrics: Sequence[Metric], masked: bool) -> str:
    disk = next((m for m in metrics if is_disk(m) and len(m.values) > 1), None)
    if disk is None:
        return ""
    before, *_, after = disk.values.values()
    if after < before * 0.995:
        return f"{format_bytes(before - after)} of {format_bytes(before)} are gone."
    remedy = " The packed format (one bit per weight and the kept values) is the smaller one." if masked else ""
    return f"The checkpoint takes as many bytes as before.{remedy}"
