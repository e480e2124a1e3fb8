"""``snapkv:0.5+think:0.4`` → methods: how a compression of the KV cache is written.

    spec     = step {"+" step}
    step     = name ["(" step ")"] [":" options]
    options  = option {"," option},  option = KEY=VALUE, or first of all a bare number: the sparsity

What stands in parentheses is the method that a wrapper takes its scores from: ``adakv(snapkv:0.5,window=32)``.
"""

from __future__ import annotations

import re
from typing import Any

from secateur.errors import OptionError, UsageError
from secateur.methods.caching import CacheMethod, EvictionMethod, WrapperMethod
from secateur.methods.registry import get_method, list_methods, make_method
from secateur.options import parse_named

STAGES = ("tokens", "channels", "elements")
_WHAT = "a compression of the cache"


def parse_cache_spec(spec: str) -> tuple[CacheMethod, ...]:
    """The methods of a spec in the order in which they act: tokens, then channels, then elements.

    Raises UsageError for what can't be read or can't be together, OptionError and UnknownMethodError.
    """
    if not isinstance(spec, str) or not spec.strip():
        raise UsageError(f"{_WHAT} is a text such as 'snapkv:0.5+think:0.4', got {spec!r}")
    methods = [_cache_method(*_parse(piece)) for piece in _split(spec)]
    for stage in STAGES:
        together = [m.name for m in methods if m.stage == stage]
        if len(together) > 1:
            raise UsageError(
                f"{' and '.join(together)} both remove {stage} of the cache: take one of them, got '{spec}'"
            )
    stages = {m.stage: m.name for m in methods}
    if {"channels", "elements"} <= set(stages):
        raise UsageError(
            f"{stages['channels']} and {stages['elements']} are alternatives: take one of them, got '{spec}'"
        )
    lasting = next((m.name for m in methods if isinstance(m, EvictionMethod) and m.every), None)
    if lasting and len(methods) > 1:
        other = next(m for m in methods if m.name != lasting)
        raise UsageError(
            f"{lasting} evicts while the model decodes, from rows that are whole, and {other.name} removes"
            f" {other.stage} of them: take one of them, got '{spec}'"
        )
    return tuple(sorted(methods, key=lambda m: STAGES.index(m.stage)))


def at_sparsity(spec: str, sparsity: float) -> str:
    """The spec with that fraction removed by every step that names none.

    ``snapkv+think:0.4`` → ``snapkv:0.5+think:0.4``.

    Raises UsageError for what can't be read, and for a spec of which every step names its fraction already.
    """
    steps = [_at_sparsity(piece.strip(), sparsity) for piece in _split(spec)]
    if all(before.strip() == after for before, after in zip(_split(spec), steps, strict=True)):
        raise UsageError(f"'{spec}' says itself how much is removed: leave the number of a step out, as in 'snapkv'")
    made = "+".join(steps)
    parse_cache_spec(made)
    return made


def _at_sparsity(step: str, sparsity: float) -> str:
    parsed = _parse(step)
    if "sparsity" in parsed[1] or not _cache_method(*parsed).by_sparsity:
        return step
    close = step.rfind(")") + 1
    name, colon, options = step[close:].partition(":")
    return f"{step[:close]}{name}:{sparsity:g}" + (f",{options}" if colon else "")


def wrapped(wrapper: WrapperMethod) -> EvictionMethod:
    """The method that ``wrapper.of`` names, at the wrapper's sparsity. Raises UsageError."""
    name, options = _parse(wrapper.of)
    if "sparsity" in options:
        raise OptionError(f"{wrapper.name}: the sparsity is that of {wrapper.name}, got of='{wrapper.of}'")
    return _eviction(name, {**options, "sparsity": wrapper.sparsity}, wrapper.name)


def _eviction(name: str, options: dict[str, Any], wrapper: str) -> EvictionMethod:
    method = _cache_method(name, options)
    if not isinstance(method, EvictionMethod):
        raise UsageError(
            f"{wrapper} takes the scores of a method that removes tokens, and {name} removes {method.stage}"
        )
    return method


def _cache_method(name: str, options: dict[str, Any]) -> CacheMethod:
    cls = get_method(name)
    if not issubclass(cls, CacheMethod):
        names = ", ".join(list_methods(object="kv_cache"))
        raise UsageError(f"{name} doesn't work on the KV cache: {names} do")
    if issubclass(cls, WrapperMethod) and cls.of_budgets and "of" in options and "sparsity" not in options:
        # what leaves while decoding may leave the prompt as it is
        options = {"sparsity": _default_sparsity(_parse(options["of"])[0], cls), **options}
    return make_method(name, options)  # type: ignore[return-value]


def _default_sparsity(inner: str, wrapper: type[WrapperMethod]) -> float:
    """What the ``inner`` method removes where nobody says how much."""
    cls = get_method(inner)
    return cls.sparsity if issubclass(cls, EvictionMethod) else wrapper.sparsity


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of a step; the method in parentheses becomes the option ``of``."""
    head, inner, tail = _parentheses(text)
    name, options = _read(head + tail)
    if inner is None:
        _check_budget(name, options, options, text)
        return name, options
    if not issubclass(get_method(name), WrapperMethod):
        raise UsageError(f"{name} wraps no other method, got '{text.strip()}'")
    if "of" in options:
        raise UsageError(f"say once what {name} wraps, got '{text.strip()}'")
    inside, theirs = _parse(inner)
    _check_budget(inside, theirs, options, text)
    if "sparsity" in theirs and "sparsity" in options:
        raise UsageError(f"say the sparsity once, inside the parentheses or behind them, got '{text.strip()}'")
    if "sparsity" in theirs:
        options["sparsity"] = theirs.pop("sparsity")
    of = theirs.pop("of", None)
    listed = ",".join(f"{key}={value}" for key, value in theirs.items())
    options["of"] = (f"{inside}({of})" if of else inside) + (f":{listed}" if listed else "")
    return name, options


def _check_budget(name: str, theirs: dict[str, Any], options: dict[str, Any], text: str) -> None:
    """What takes the place of a fraction doesn't stand beside one; ``options`` are those of the outermost method."""
    cls = get_method(name)
    other = cls.replaces_sparsity if issubclass(cls, EvictionMethod) else ""
    if other in theirs and "sparsity" in options:
        raise UsageError(f"say what {name} keeps once, as a {other} or as a sparsity, got '{text.strip()}'")


def _read(text: str) -> tuple[str, dict[str, Any]]:
    """``snapkv:0.5,window=32`` → name and options as text; a bare first option is the sparsity."""
    name, colon, rest = text.strip().partition(":")
    first, comma, others = rest.partition(",")
    if colon and "=" not in first:
        text = f"{name}:sparsity={first}{comma}{others}"
    return parse_named(text.strip(), _WHAT)


def _parentheses(text: str) -> tuple[str, str | None, str]:
    start, end = text.find("("), text.rfind(")")
    if start < 0 and end < 0:
        return text, None, ""
    if not 0 < start < end:
        raise UsageError(f"the parentheses of '{text.strip()}' don't match")
    return text[:start], text[start + 1 : end], text[end + 1 :]


def split_presses(text: str) -> list[str]:
    """``snapkv,adakv(snapkv:window=32,kernel=7),mustafar:k=0.7,v=0.7`` → three presses; an option goes on with the one
    before it, as long as it is no press with options of its own.

    Raises UsageError.
    """
    presses: list[str] = []
    for piece in _split(text, ","):
        if presses and re.fullmatch(r"\s*\w+\s*=[^:(]*", piece):
            presses[-1] += f",{piece.strip()}"
        else:
            presses.append(piece.strip())
    return presses


def _split(spec: str, between: str = "+") -> list[str]:
    """The pieces between plus signs (or commas) that stand outside of parentheses."""
    pieces, depth = [""], 0
    for letter in spec:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == between and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    if depth or not all(piece.strip() for piece in pieces):
        raise UsageError(f"{_WHAT} is NAME or NAME:SPARSITY, joined by '{between}', got '{spec}'")
    return pieces
