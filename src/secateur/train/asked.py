"""What a Sparsifier is asked for: its method and its schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from secateur.allocate import Schedule
from secateur.allocate.asked import contradiction
from secateur.errors import UsageError
from secateur.methods import TrainingMethod, get_method, list_methods, make_method


def training_method(name: str, options: Mapping[str, Any]) -> TrainingMethod:
    """The method of that name with these options. Raises UsageError, as when it prunes at another time."""
    method = make_method(name, options)
    if not isinstance(method, TrainingMethod):
        raise UsageError(
            f"{name} doesn't prune while a network is trained: call secateur.prune, or take one of"
            f" {', '.join(training_methods())}"
        )
    if {"sparsity", "pattern"} <= options.keys():
        said = method.options()
        if why := contradiction(said["sparsity"], said["pattern"]):
            raise UsageError(f"{name}: {why}")
    return method


def training_methods() -> list[str]:
    """Names of all methods that a Sparsifier takes."""
    return [name for name in list_methods(object="weights") if issubclass(get_method(name), TrainingMethod)]


def check_module(model: Any) -> None:
    """Raises UsageError for what is no module."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model must be a torch.nn.Module, got {type(model).__name__}")


def check_patterns(**given: Any) -> None:
    """Raises UsageError for a text where a list of patterns belongs, whose letters would be taken for patterns."""
    for name, patterns in given.items():
        if isinstance(patterns, str):
            raise UsageError(f"{name} takes a list of patterns: write {name}=['{patterns}']")


def checked_schedule(schedule: Callable[[int], Any]) -> Schedule:
    """A schedule of the user's own, which raises UsageError wherever it gives no sparsity, at once if at step 0."""
    if not callable(schedule):
        raise UsageError(f"schedule must be a function of the step, got {type(schedule).__name__}")

    def checked(step: int) -> float:
        found = schedule(step)
        if not isinstance(found, int | float) or not 0 <= found < 1:
            raise UsageError(
                f"schedule must give a sparsity in [0, 1), the fraction removed; at step {step} it gave {found!r}"
            )
        return found

    checked(0)
    return checked
