"""The contract between the engine and a method.

The engine owns the sentence (observe, score, allocate, plan, cut) and a method supplies the words: which statistics
it needs, how a target is scored, how a budget is spread. A method never sees a model, a device, a file or a loop.
The kinds of methods stand beside this file, by what they remove.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from secateur.errors import UsageError
from secateur.healing.refit import aimed, with_statistics
from secateur.methods.descriptor import Descriptor
from secateur.observe import Gram, Statistic
from secateur.options import check_options
from secateur.provenance import Coverage
from secateur.structure import Anatomy


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base class of all methods; the fields of a subclass are its options.

    ``statistics`` maps a name to the Statistic class that observes the input of every target. ``sequential`` asks
    for block-by-block calibration: later blocks see what the cut ones give. Raises OptionError for bad options.
    """

    name: ClassVar[str] = ""
    descriptor: ClassVar[Descriptor]
    statistics: ClassVar[Mapping[str, type[Statistic]]] = {}
    sequential: ClassVar[bool] = False
    instead: ClassVar[str] = ""
    """For methods that don't prune decoders: why, and what to do; ``{name}`` is the method's."""
    costly: ClassVar[bool] = False
    """Whether even a small language model takes a minute or more, whatever the data."""
    reaches_all: ClassVar[bool] = False
    """Whether what leaves are parts of a model with all that they hold; others reach the matrices of its blocks."""
    spread: ClassVar[str] = ""
    """The allocator, with its options, that the method follows where nobody asks for another."""

    def __post_init__(self) -> None:
        check_options(self, self.name or type(self).__name__)

    @classmethod
    def option_fields(cls) -> dict[str, dataclasses.Field[Any]]:
        """The options by name; metadata holds help, unit and range."""
        return {f.name: f for f in dataclasses.fields(cls)}

    @classmethod
    def budget_options(cls, budget: str) -> dict[str, Any]:
        """The options that say what users write as a budget: ``params``, or ``latency=0.7``. Raises OptionError."""
        return {"budget": budget}

    def options(self) -> dict[str, Any]:
        """The options as plain values, for provenance."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def needed_statistics(self) -> Mapping[str, type[Statistic]]:
        """The statistics that these options need; by default all of the class."""
        return self.statistics

    @property
    def draws(self) -> bool:
        """Whether anything is drawn at random, so that another seed may give another plan."""
        return "seed" in self.option_fields()

    @property
    def kept_scores(self) -> str:
        """Under what name scores of the dense model serve whatever is asked for; empty where statistics do, or none."""
        return ""

    @property
    def refits(self) -> bool:
        """Whether the engine solves for what stays, on top of what the method decides."""
        return False

    @property
    def refits_later(self) -> bool:
        """Whether it does so in a walk of its own, since everything is decided on the dense model first."""
        return False

    @property
    def narrows(self) -> bool:
        """Whether hidden channels leave, and with them the same share of every tensor."""
        return False

    @property
    def in_sequence(self) -> bool:
        """Whether later blocks see what the cut ones give, in the walk that decides."""
        return self.sequential

    def observed_statistics(self) -> Mapping[str, type[Statistic]]:
        """All that is observed in the walk that decides: what the method needs, and what heals on the way."""
        return self.needed_statistics()

    @property
    def uses_data(self) -> bool:
        """Whether calibration data is needed."""
        return self.refits or bool(self.observed_statistics())


class Refittable(Method):
    """Methods behind whose decisions least squares can solve for what stays, as their options ``heal`` and ``target``
    say."""

    heal: str
    target: str

    fits: ClassVar[bool] = False
    """Whether the method itself looks at the ``target``."""

    @property
    def refits(self) -> bool:
        return self.heal == "refit"

    @property
    def refits_later(self) -> bool:
        return self.refits

    def refit_statistics(self) -> Mapping[str, type[Statistic]]:
        """What is observed in a walk that only refits."""
        return with_statistics({}, Gram, *aimed(self.target))


def reach(method: Method, anatomy: Anatomy) -> Coverage | None:
    """How much of the blocks of a model ``method`` can reach; None where that is all."""
    return None if method.reaches_all else anatomy.coverage


# a budget that less than half of the weights bear is not the one that was given
LEAST_REACH = 0.5


def check_reach(method: Method, anatomy: Anatomy, *, partial: bool) -> None:
    """Raises UsageError for a model of which ``method`` reaches less than half, unless ``partial`` allows that."""
    coverage = reach(method, anatomy)
    if coverage is not None and coverage.share < LEAST_REACH and not partial:
        raise UsageError(
            f"{method.name} {coverage.sentence}; pass --partial (partial=True, or partial: true in a recipe) to prune"
            " what it reaches, and leave the rest dense"
        )


def check_for_decoders(method: Method) -> None:
    """Raises UsageError for a method that prunes something else, or at another time, than a trained decoder."""
    if method.instead:
        raise UsageError(f"{method.name} {method.instead.format(name=method.name)}")
