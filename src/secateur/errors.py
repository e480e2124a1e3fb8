"""Every error that secateur raises on purpose; each message is one sentence that says what to do.

SecateurError
├── UsageError                the request itself is wrong (exit code 2)
│   ├── UnknownMethodError
│   ├── OptionError           a method option: unknown, out of range, wrong type
│   └── RecipeError           a recipe file
├── ModelError
│   ├── ModelLoadError        missing, corrupt or quantised checkpoint
│   ├── UnsupportedModelError not a decoder that we know
│   └── NonFiniteError        NaN or inf in weights, activations or scores
├── DataError                 calibration or evaluation data
├── PlanError
│   ├── PlanMismatchError     the plan was made for another model
│   └── BudgetError           the budget can't be met
├── SweepError                some points of a sweep failed
├── CorruptFileError          a safetensors file that is damaged, cut short or made to mislead
├── ResourceError             more memory or disk is needed than there is
├── OutputError               the output folder exists, or can't be written
├── RankError                 one of several processes has failed or gone
└── MissingExtraError         an optional dependency is not installed
"""

import difflib
import re
from collections.abc import Iterable


class SecateurError(Exception):
    """Base class: catch it to catch everything that secateur raises on purpose."""

    exit_code = 1


class UsageError(SecateurError):
    """The request itself is wrong: an argument out of range or an unknown name."""

    exit_code = 2


class UnknownMethodError(UsageError):
    """No method of that name is registered."""


class OptionError(UsageError):
    """A method option is unknown, out of range or of the wrong type."""


class RecipeError(UsageError):
    """A recipe file can't be read, or holds an unknown key or a bad value."""


class ModelError(SecateurError):
    """The model can't be used."""


class ModelLoadError(ModelError):
    """The checkpoint is missing, corrupt or quantised."""


class UnsupportedModelError(ModelError):
    """The architecture is not one that secateur can cut."""


class NonFiniteError(ModelError):
    """Weights, activations or scores hold NaN or inf; the message names the layer."""


class DataError(SecateurError):
    """Calibration or evaluation data is missing, unreadable or too short."""


class PlanError(SecateurError):
    """The plan is malformed."""


class PlanMismatchError(PlanError):
    """The plan was made for a model of other shapes."""


class BudgetError(PlanError):
    """The budget can't be met with the minimum that must be kept."""


class SweepError(SecateurError):
    """Some points of a sweep failed; the others are there."""


class CorruptFileError(SecateurError):
    """A safetensors file is damaged, cut short, or says things about itself that can't be."""


class ResourceError(SecateurError):
    """A run would take more memory or disk than there is; the message names what would make it fit."""


class OutputError(SecateurError):
    """The output exists already or can't be written."""


class RankError(SecateurError):
    """One of the processes that work on a run together has failed or gone."""


class MissingExtraError(SecateurError):
    """An optional dependency is missing; the message says how to install it."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`` did you mean 'flap'?`` for the closest of ``choices``, or an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def first_line(error: BaseException) -> str:
    """The message of somebody else's error on one line without its full stop, or the name of its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] = f"{lines[0]} {lines[1]}"
    # some quote the whole value that they don't like
    return lines[0].rstrip(".")[:500] if lines else type(error).__name__


def out_of_memory(error: BaseException) -> str:
    """What to say of an allocation that failed, on a device or in main memory; empty for an error of another kind."""
    text = str(error)
    # torch has a class for devices only; its message for main memory is this one
    if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError" and "DefaultCPU" not in text:
        return ""
    found = re.search(r"allocate ([\d.]+) (\w+)", text)
    if found is None:
        return "out of memory"
    size = f"{int(found[1]) / 1e9:,.1f} GB" if found[2] == "bytes" else f"{found[1]} {found[2]}"
    return f"out of memory: {size} more were asked for"


def unforeseen(error: Exception) -> str:
    """What a record says of an error that is none of ours."""
    return out_of_memory(error) or f"{type(error).__name__}: {error}"


def require_extra(module: str, extra: str, why: str):
    """Import an optional dependency, or say in one sentence how to get it.

    Raises MissingExtraError when ``module`` is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{why} needs {module.split('.')[0]}, which is not installed: pip install 'secateur[{extra}]'"
        ) from error
