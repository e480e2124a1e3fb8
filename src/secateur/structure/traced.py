"""A network as a graph with labels, whatever it was traced from: what rules of operators read and say.

The front ends (``trace`` for torch, ``onnx`` for ONNX graphs) fill it; groups, costs and cuts ask it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from numpy.typing import NDArray

from secateur.structure.units import Labels, Units

SAMPLES = ((0.7, 1.9, 2.3, 1.3), (-0.6, 1.1, -2.9, 0.4), (2.1, -1.7, -0.3, -0.9), (-1.2, -0.8, 1.6, 0.5))
"""Numbers to try a point-wise call on, for every operand another one."""


EVERY, BOTH = slice(None), slice(2)
"""Operands that are multiplied: all of them, or the first two."""


class Zeros(Enum):
    """What a call makes of operands that are 0 for some of its units. Those from ``WEIGHED`` on have operands like
    ATen's operators of that kind."""

    LOST = "lost"
    """Nothing is known."""
    POINTWISE = "pointwise"
    """An entry of the output follows from the entries at the same place, so that the call can be tried on numbers."""
    KEPT = "kept"
    """Zeros give zeros: entries are moved, pooled or summed."""
    FIRST = "first"
    """The same for the first output; others hold places of entries."""
    REPEATED = "repeated"
    """Zeros give zeros, but for units along dimensions that the output has and the operand hasn't."""
    PADDED = "padded"
    """Zeros give zeros where what is added is 0 or was there."""
    MADE = "made"
    """The output is 0."""
    WEIGHED = "weighed"
    """The first operand is multiplied by a weight, of which every row (of a convolution: channel) is an output."""
    MULTIPLIED = "multiplied"
    """A product of matrices."""
    CONTRACTED = "contracted"
    """A product with an ``equation``."""
    ATTENDED = "attended"
    """The third operand is averaged."""
    NORMED = "normed"
    """Zeros give zeros where they are scaled or nothing is added."""
    CENTRED = "centred"
    """The same, but a mean over what may leave is subtracted, so that without a scale nothing is known."""


class NoRule(Exception):
    """A rule can't say what leaves together in this call; everything that it touches stays."""


@dataclass(frozen=True)
class Value:
    """A tensor in the graph: labels [size] of every dimension."""

    dims: tuple[Labels, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(labels) for labels in self.dims)

    def with_dim(self, dim: int, labels: Labels) -> Value:
        """The same with other labels along ``dim``."""
        dims = list(self.dims)
        dims[dim] = labels
        return Value(tuple(dims))


@dataclass(frozen=True)
class Call:
    """One operator call: its arguments by the names of the operator's schema, tensors as ``Value``."""

    node: Any
    name: str
    arguments: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the outputs; a dynamic size has its example's."""
    describe: Callable[[Any], str] = str

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0]

    def values(self) -> list[Value]:
        """The tensors among the arguments, in order."""
        return [v for _, v in self.places()]

    def places(self) -> list[tuple[str, Value]]:
        """The same with the names of their arguments."""
        found = []
        for name, argument in self.arguments.items():
            many = argument if isinstance(argument, list | tuple) else [argument]
            found += [(name, value) for value in many if isinstance(value, Value)]
        return found

    @property
    def where(self) -> str:
        """``op (module, file:line)`` for messages."""
        return self.describe(self.node)


@dataclass(frozen=True)
class Rule:
    """What is known of an operator: what leaves together in a call of it, and what it makes of zeros."""

    says: Callable[[Any, Call], Value | Sequence[Value]]
    zeros: Zeros = Zeros.LOST


@dataclass(frozen=True)
class Sum:
    """The positions over which a call sums, and the places of the operands that it multiplies before."""

    labels: Labels
    factors: slice


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of one call: the product of the sizes of ``factors`` times ``times``."""

    node: Any
    factors: tuple[Labels, ...]
    times: int = 1
    operands: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Step:
    """One call of a network, for those who follow a channel through it. ``sources`` are the numbers of the steps whose
    outputs it reads."""

    operator: str
    where: str
    sources: tuple[int, ...]
    parameters: Mapping[str, Value]
    outputs: tuple[Value, ...]


@dataclass
class Traced:
    """A traced network. ``parameters`` maps the names of parameters, buffers and constants to their values."""

    units: Units = field(default_factory=Units, kw_only=True)
    parameters: dict[str, Value] = field(default_factory=dict, kw_only=True)
    work: list[Work] = field(default_factory=list, kw_only=True)
    lanes: list[Labels] = field(default_factory=list, kw_only=True)
    """Labels of dimensions inside attention heads."""
    inexact: list[tuple[Labels, str]] = field(default_factory=list, kw_only=True)
    """Labels of which zeroing is not removing, and why, such as those over which an average runs."""
    summed: dict[Any, list[Sum]] = field(default_factory=dict, kw_only=True)
    """Node → over what it sums."""
    calls_made: list[tuple[Call, list[Value]]] = field(default_factory=list, kw_only=True)
    """All calls with their outputs, in order."""
    averaging: set[Any] = field(default_factory=set, kw_only=True)
    """The nodes that average."""
    unknown: dict[str, list[str]] = field(default_factory=dict, kw_only=True)
    """Operators that keep what they touch → where they are called."""

    # -- words for rules -----------------------------------------------------------------------------------------

    def fixed(self, shape: Sequence[int], why: str) -> Value:
        """A tensor of which nothing can leave."""
        return Value(tuple(self.units.fixed(n, why) for n in shape))

    def fresh(self, shape: Sequence[int]) -> Value:
        """A tensor of which nothing is known; a dimension of size 1 broadcasts, so it stays."""
        one = "a dimension of size 1"
        return Value(tuple(self.units.fresh(n) if n > 1 else self.units.fixed(n, one) for n in shape))

    def pin(self, value: Value | Sequence[Value], why: str) -> None:
        """Nothing of these tensors can leave."""
        for one in [value] if isinstance(value, Value) else value:
            for labels in one.dims:
                self.units.pin(labels, why)

    def count(self, call: Call, *factors: Labels, times: int = 1) -> None:
        """Note the multiply-accumulates of a call."""
        self.work.append(Work(call.node, factors, times, tuple(call.values())))

    def averages(self, call: Call, labels: Labels, what: str) -> None:
        """Note that a call, ``what``, runs over these positions."""
        self.inexact.append((labels, f"{what} runs over it"))
        self.averaging.add(call.node)

    def undefined(self, labels: Labels, why: str) -> None:
        """Note that zeros at these positions leave no number, as in 0 / 0."""
        self.inexact.append((labels, why))

    def sums(self, call: Call, labels: Labels, factors: slice = EVERY) -> None:
        """Note that a call sums over these positions, where zeros add nothing. ``factors`` are the places of the
        operands that are multiplied before."""
        self.summed.setdefault(call.node, []).append(Sum(labels, factors))

    # -- words for front ends ------------------------------------------------------------------------------------

    def ruled(self, call: Call, rule: Callable[[Any, Call], Value | Sequence[Value]]) -> list[Value]:
        """What the rule says of the outputs; everything that the call touches stays where it can't say."""
        try:
            found = rule(self, call)
        except NoRule as error:
            return self.freeze(call, str(error))
        # values of their own, also where a rule hands its input on
        values = [Value(value.dims) for value in ([found] if isinstance(found, Value) else found)]
        if tuple(v.shape for v in values) != call.shapes:
            return self.freeze(call, "its rule doesn't fit this call")
        for labels in (labels for value in values for labels in value.dims if len(labels) == 1):
            # such a dimension broadcasts, so it means another thing than a larger one that was cut
            self.units.pin(labels, "a dimension of size 1")
        self.calls_made.append((call, values))
        return values

    def freeze(self, call: Call, why: str) -> list[Value]:
        """Keep everything that a call touches."""
        reason = f"{call.where} keeps what it touches: {why}"
        self.unknown.setdefault(call.name, []).append(call.where)
        self.pin(call.values(), reason)
        return [self.fixed(shape, reason) for shape in call.shapes]

    # -- what is known at the end --------------------------------------------------------------------------------

    def distinct_parameters(self) -> dict[str, tuple[Labels, ...]]:
        """Labels of every parameter, buffer and constant, a tied one under its first name only."""
        seen: set[int] = set()
        found = {}
        for name, value in self.parameters.items():
            if id(value) not in seen:
                seen.add(id(value))
                found[name] = value.dims
        return found

    @property
    def title(self) -> str:
        """What the network is called."""
        raise NotImplementedError

    def element_sizes(self) -> dict[str, int]:
        """Bytes of one entry of every parameter that counts as one; buffers and constants don't."""
        raise NotImplementedError

    def steps(self) -> list[Step]:
        """The calls, in order."""
        raise NotImplementedError

    def unmasked(self) -> Collection[str]:
        """Parameters, buffers and constants that a mask leaves as they are."""
        raise NotImplementedError

    def zeros(self, call: Call) -> Zeros:
        """What the rule of a call says that it makes of zeros."""
        raise NotImplementedError

    def sampled(self, call: Call, zero: Collection[int]) -> NDArray[Any] | None:
        """Entries that a point-wise call gives where the values with these ids are 0 and others aren't, or None."""
        raise NotImplementedError

    def pads_with_zeros(self, call: Call) -> bool:
        """Whether a call that pads adds zeros, or entries that are there."""
        return not call.get("value")

    def maker(self, name: str) -> tuple[str, int]:
        """What units are called that lie along a dimension of a parameter, and the dimension."""
        return name.removesuffix(".weight"), 0
