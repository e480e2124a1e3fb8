"""Which channels of a masked network aren't silent, and where that is heard.

A masked network has zeros in the parameters of what leaves. As a rule what leaves is then *silent*, 0 in every tensor,
and the masked network computes what the cut one does. But a function needn't be 0 at 0 (``softplus``, ``cos``, adding a
constant): such channels are *loud*. As long as the next matrix has zeros for them nothing follows from that; where
something sums over them without such zeros, the masked network keeps what the cut one hasn't.

The calls are followed in their order, with the set of the loud units of every tensor. The rule of a call says what it
makes of zeros (``traced.Zeros``): a point-wise one is run on numbers, one that moves or pools entries gives 0 for
zeros, and so on. Where a rule doesn't say everything is loud. So a unit may be loud here that isn't, never the other
way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from secateur.structure.equations import spelled
from secateur.structure.traced import Call, Traced, Value, Zeros
from secateur.structure.units import Labels

Loud = frozenset[int]
_NONE: Loud = frozenset()

ADDED = "a sum over it counts values that aren't 0 where its parameters are"


def heard(trace: Traced) -> dict[int, str]:
    """Units that a masked network still hears, and why."""
    return _Pass(trace).run()


class _Pass:
    def __init__(self, trace: Traced) -> None:
        self.trace = trace
        self.heard: dict[int, str] = {}
        self._loud: dict[int, Loud] = {}
        self._known: dict[int, tuple[Labels, Loud]] = {}

    def run(self) -> dict[int, str]:
        stay = self.trace.unmasked()
        for name, value in self.trace.parameters.items():
            self._loud[id(value)] = self._all(value) if name in stay else _NONE
        for call, outputs in self.trace.calls_made:
            self._listen(call)
            for number, output in enumerate(outputs):
                self._loud[id(output)] = self._call(call, number, output)
        return self.heard

    # -- sets of units -------------------------------------------------------------------------------------------

    def units(self, labels: Labels) -> Loud:
        """The units along a dimension."""
        known = self._known.get(id(labels))
        if known is None:
            units = np.unique(self.trace.units.table(labels)).tolist()
            # the array is held, so that its id stays its own
            known = self._known[id(labels)] = (labels, frozenset(units) - {-1})
        return known[1]

    def loud(self, value: Value) -> Loud:
        """The units of a tensor that aren't silent in it."""
        found = self._loud.get(id(value))
        return self._all(value) if found is None else found

    def _all(self, value: Value) -> Loud:
        return _NONE.union(*map(self.units, value.dims))

    def _within(self, value: Value, units: Iterable[int]) -> Loud:
        return self._all(value).intersection(units)

    # -- where loud units are heard ------------------------------------------------------------------------------

    def _listen(self, call: Call) -> None:
        """Note the units over which a call sums that are loud in all that it multiplies."""
        for over in self.trace.summed.get(call.node, ()):
            units = self.units(over.labels)
            for factor in call.values()[over.factors] if units else ():
                if units & self._all(factor):
                    units &= self.loud(factor)
            for unit in units:
                self.heard.setdefault(unit, ADDED)

    # -- what is loud in the output ------------------------------------------------------------------------------

    def _call(self, call: Call, number: int, output: Value) -> Loud:
        everything = self._all(output)
        if not everything:
            return _NONE
        match self.trace.zeros(call):
            case Zeros.POINTWISE:
                return self._pointwise(call, output)
            case Zeros.KEPT:
                return self._kept(call, output)
            case Zeros.FIRST if not number:
                return self._kept(call, output)
            case Zeros.PADDED if self.trace.pads_with_zeros(call):
                return self._kept(call, output)
            case Zeros.REPEATED:
                return self._broadcast(call.values()[0], output)
            case Zeros.MADE:
                return _NONE
            case Zeros.WEIGHED | Zeros.MULTIPLIED as kind:
                return self._product(call, output, weighed=kind is Zeros.WEIGHED)
            case Zeros.CONTRACTED:
                return self._einsum(call, output)
            case Zeros.ATTENDED:
                value = call.values()[2]
                return everything - self._all(value) | self._within(output, self.loud(value))
            case Zeros.NORMED | Zeros.CENTRED as kind:
                return self._norm(call, output, centred=kind is Zeros.CENTRED)
        return everything

    def _kept(self, call: Call, output: Value) -> Loud:
        return self._within(output, _NONE.union(*map(self.loud, call.values())))

    def _pointwise(self, call: Call, output: Value) -> Loud:
        values, found = call.values(), set()
        for back, labels in enumerate(reversed(output.dims), start=1):
            for zero, units in self._patterns([v for v in values if _holds(v, back, len(labels))], labels).items():
                found |= units if self._sounds(call, zero, units) else _NONE
        return frozenset(found)

    def _patterns(self, held: Sequence[Value], labels: Labels) -> dict[Loud, set[int]]:
        """Ids of the operands that are silent → the units for which they are."""
        units = self.units(labels)
        mixed = units & _NONE.union(*map(self.loud, held))
        found = {frozenset(map(id, held)): set(units - mixed)} if units - mixed else {}
        for unit in mixed:
            found.setdefault(frozenset(id(v) for v in held if unit not in self.loud(v)), set()).add(unit)
        return found

    def _sounds(self, call: Call, zero: Loud, units: Iterable[int]) -> bool:
        """Whether a point-wise call gives anything but 0 where these operands are 0."""
        if not zero:
            return True
        given = self.trace.sampled(call, zero)
        if given is None:
            return True
        if not np.isfinite(given).all():
            usual = self.trace.sampled(call, _NONE)
            if usual is not None and np.isfinite(usual[~np.isfinite(given)]).any():
                operator = call.name.rpartition("::")[2]
                for unit in units:
                    self.heard.setdefault(unit, f"{operator} isn't finite where its parameters are 0")
        return bool((given != 0).any())

    def _broadcast(self, value: Value, output: Value) -> Loud:
        found = set(self._within(output, self.loud(value)))
        for back, labels in enumerate(reversed(output.dims), start=1):
            found |= _NONE if _holds(value, back, len(labels)) else self.units(labels)
        return frozenset(found)

    def _product(self, call: Call, output: Value, weighed: bool) -> Loud:
        """Rows are those of the first factor, columns those of the second, and all else is loud if both are."""
        first, second = call.values()[self.trace.summed[call.node][0].factors]
        column = len(second.dims) - 1 if weighed else 1 if len(second.dims) > 1 else 0
        row = (2 if column else 1) if len(first.dims) > 1 else 0
        more = [v for v in call.values() if v is not first and v is not second]
        found: set[int] = set()
        for back, labels in enumerate(reversed(output.dims), start=1):
            units = self.units(labels)
            if back == column:
                found |= units & self.loud(second)
            elif back == row or weighed:
                found |= units & self.loud(first)
            else:
                held = [self.loud(v) for v in (first, second) if _holds(v, back, len(labels))]
                found |= units.intersection(*held)
            for value in more:
                # what is added: a bias lies along the columns
                along = back == column if len(value.dims) == 1 else _holds(value, back, len(labels))
                found |= units & self.loud(value) if along else units
        return frozenset(found)

    def _einsum(self, call: Call, output: Value) -> Loud:
        inputs, made = spelled(call["equation"], [len(v.dims) for v in call.values()])
        found: set[int] = set()
        for letter, labels in zip(made, output.dims, strict=True):
            holding = zip(inputs, call.values(), strict=True)
            found |= self.units(labels).intersection(*[self.loud(v) for letters, v in holding if letter in letters])
        return frozenset(found)

    def _norm(self, call: Call, output: Value, centred: bool) -> Loud:
        x, *others = call.values()
        # scales that are 0 silence whatever they scale; without any a mean is taken off the zeros of a layer
        scaled = call.get("weight") is not None or (bool(others) and "inputs" in call.arguments)
        if centred and not scaled:
            return self._all(output)
        found = set() if scaled else set(self.loud(x))
        for other in others:
            found |= self.loud(other) | (self._all(output) - self._all(other))
        return self._within(output, found)


def _holds(value: Value, back: int, size: int) -> bool:
    """Whether an operand has all positions of this dimension of the output, counted from the last."""
    return len(value.dims) >= back and len(value.dims[-back]) == size
