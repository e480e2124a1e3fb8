"""Options of methods, allocators and recovery training: fields of a dataclass with their meaning, unit and range,
and what reads and checks them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from secateur.errors import OptionError, UsageError, nearest


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """An option: its published default, meaning, unit and range. Feeds CLI, recipes, docs and range checks."""
    metadata = {"help": help, "unit": unit, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def check_options(options: Any, name: str) -> None:
    """Raises OptionError when a field of this dataclass has a value of the wrong type or out of its range."""
    hints = get_type_hints(type(options))
    for spec in dataclasses.fields(options):
        _check_option(name, spec, getattr(options, spec.name), hints[spec.name])


def _check_option(method: str, spec: dataclasses.Field[Any], value: Any, hint: Any) -> None:
    meta, name = spec.metadata, spec.name
    kinds = get_args(hint) or (hint,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(k.__name__ for k in kinds)
        raise OptionError(f"{method}: {name} must be of type {wanted}, got {value!r}")
    if meta.get("choices") and value not in meta["choices"]:
        choices = ", ".join(meta["choices"])
        raise OptionError(
            f"{method}: {name} must be one of {choices}, got {value!r}{nearest(str(value), meta['choices'])}"
        )
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not _in_range(meta, value):
        raise OptionError(f"{method}: {name} must lie in {interval(meta)}, got {value!r} ({meta.get('help', '')})")
    if isinstance(value, float) and not math.isfinite(value):
        raise OptionError(f"{method}: {name} must be a finite number, got {value!r} ({meta.get('help', '')})")


def parse_named(text: str, what: str) -> tuple[str, dict[str, str]]:
    """``owl:m=5,lam=0.08`` → the name and the options that it is given, as text; ``what`` says what is named so.

    Raises UsageError.
    """
    name, colon, rest = text.partition(":")
    options: dict[str, str] = {}
    for pair in rest.split(",") if colon else ():
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        if not key or not equals or key in options:
            raise UsageError(f"{what} is NAME or NAME:KEY=VALUE,KEY=VALUE, each key once, got '{text}'")
        options[key] = value
    return name.strip(), options


def _in_range(meta: Mapping[str, Any], value: float) -> bool:
    # written so that NaN is refused wherever there is a bound
    return (
        (meta.get("ge") is None or value >= meta["ge"])
        and (meta.get("gt") is None or value > meta["gt"])
        and (meta.get("le") is None or value <= meta["le"])
        and (meta.get("lt") is None or value < meta["lt"])
    )


def interval(meta: Mapping[str, Any]) -> str:
    """The range of an option as text: ``[0, 1)``; an empty string when it has none."""
    low, high = (meta.get("ge"), meta.get("gt")), (meta.get("le"), meta.get("lt"))
    if low == high == (None, None):
        return ""
    left = f"[{low[0]:g}" if low[0] is not None else f"({low[1]:g}" if low[1] is not None else "(-inf"
    right = f"{high[0]:g}]" if high[0] is not None else f"{high[1]:g})" if high[1] is not None else "inf)"
    return f"{left}, {right}"


def option_values(name: str, cls: type[Any], options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of a dataclass as values of their types; ``where`` says what lists them. Raises OptionError."""
    known, hints = {field.name for field in dataclasses.fields(cls)}, get_type_hints(cls)
    for key in options:
        if key not in known:
            raise OptionError(f"{name} has no option '{key}'{nearest(key, known) or ';'} {where}")
    return {key: _convert(name, key, value, hints[key]) for key, value in options.items()}


def describe_options(cls: type[Any]) -> dict[str, Any]:
    """The options of a dataclass by name, with default, unit, range, choices and meaning."""
    return {
        field.name: {
            "default": field.default,
            "unit": field.metadata.get("unit", ""),
            "range": interval(field.metadata),
            "choices": list(field.metadata.get("choices") or ()),
            "help": field.metadata.get("help", ""),
        }
        for field in dataclasses.fields(cls)
    }


def _convert(method: str, key: str, value: Any, hint: Any) -> Any:
    kinds = get_args(hint) or (hint,)
    if str in kinds:
        # what may be 3% or a list is a number in a recipe as soon as it looks like one
        plain = isinstance(value, int | float) and not isinstance(value, (bool, *kinds))
        return str(value) if plain else value
    if not isinstance(value, str):
        return value
    if bool in kinds:
        if value.lower() in ("true", "yes", "on", "1"):
            return True
        if value.lower() in ("false", "no", "off", "0"):
            return False
        raise OptionError(f"{method}: {key} must be true or false, got {value!r}")
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(value)
            except ValueError:
                continue
    wanted = " or ".join(k.__name__ for k in kinds)
    raise OptionError(f"{method}: {key} must be of type {wanted}, got {value!r}")
