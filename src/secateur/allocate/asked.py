"""Budgets as users write them: ``params``, or ``latency=0.7,kv_bytes=0.5``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from secateur.errors import OptionError, nearest

OF_WEIGHTS = ("params", "macs", "bytes")
"""Budgets that are sums over the weights of the blocks, so that a share of them is known before anything leaves."""
BUDGETS = (*OF_WEIGHTS, "kv_bytes", "latency", "neurons")


def parse_budgets(text: str, sparsity: float, names: Sequence[str] = BUDGETS) -> dict[str, float]:
    """Budget → fraction of the dense model that may stay, in the order in which they are written.

    A name alone leaves ``1 - sparsity``. Raises OptionError.
    """
    if "=" not in text:
        _check_name(text, names)
        return {text: 1 - sparsity}
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        _check_name(name, names)
        if name in found:
            raise OptionError(f"budget {name} is given twice")
        try:
            found[name] = float(value)
        except ValueError:
            raise OptionError(
                f"budget {name} takes a fraction of the dense model, as in {name}=0.7, got {value!r}"
            ) from None
        if not 0 < found[name] <= 1:
            raise OptionError(
                f"budget {name} must lie in (0, 1], got {value} (it is the fraction of the dense model that may stay)"
            )
    return found


def written(budget: str | Mapping[str, float]) -> str:
    """Budgets as text: ``{"latency": 0.7}`` is ``latency=0.7``."""
    if isinstance(budget, str):
        return budget
    return ",".join(f"{name}={fraction!r}" for name, fraction in budget.items())


def contradiction(sparsity: float | None, pattern: str | None) -> str:
    """What is wrong where both are given and don't say the same; empty where nothing is."""
    found = re.fullmatch(r"(\d+):([1-9]\d*)", pattern or "")
    removed = int(found[1]) / int(found[2]) if found else 0.0
    if not found or sparsity is None or abs(removed - sparsity) <= 1e-9:
        return ""
    return f"sparsity {sparsity:g} contradicts pattern {pattern} ({removed:g} is removed)"


def _check_name(name: str, names: Sequence[str]) -> None:
    if name not in names:
        several = "fractions of them that stay (latency=0.7,kv_bytes=0.5)" if names is BUDGETS else "latency=0.7"
        raise OptionError(f"budget must be one of {', '.join(names)}, or {several}, got {name!r}{nearest(name, names)}")
