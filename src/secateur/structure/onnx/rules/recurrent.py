"""Recurrent layers: unit h of the hidden state owns row h of every gate and column h of the recurrent weight."""

from __future__ import annotations

import numpy as np

from secateur.structure.onnx.trace import OnnxTrace, operands, rule
from secateur.structure.traced import Call, NoRule, Value, Zeros
from secateur.structure.units import Labels

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@rule("LSTM", "GRU", "RNN", settings=(4,), zeros=Zeros.KEPT)
def recurrent(trace: OnnxTrace, call: Call) -> list[Value]:
    x, w, r, bias, _, *states = operands(call, 8)
    gates = GATES[call.name]
    hidden: Labels = r.dims[2]
    units = trace.units
    if len(w.dims[1]) != gates * len(hidden):
        raise NoRule("its weights don't fit together")
    trace.makes(w.dims[1])
    units.join(x.dims[2], w.dims[2])
    for rows, times in ((w.dims[1], gates), (r.dims[1], gates), (bias and bias.dims[1], 2 * gates)):
        if rows is not None:
            units.join(rows, np.tile(hidden, times))
    *initial, peepholes = states
    if peepholes is not None:
        units.join(peepholes.dims[1], np.tile(hidden, 3))
    for state in initial:
        if state is not None:
            units.join(state.dims[2], hidden)
            trace.pin(Value(state.dims[:2]), "a direction or a batch")
    for given in (w, r, bias, peepholes):
        if given is not None:
            units.pin(given.dims[0], "a direction")
    trace.pin(Value(x.dims[:2]), "a step of a sequence or a batch")
    trace.count(call, *x.dims[:2], w.dims[0], w.dims[1], w.dims[2])
    trace.count(call, *x.dims[:2], r.dims[0], r.dims[1], r.dims[2])
    return [Value((*trace.fixed(shape[:-1], "a step of a sequence or a batch").dims, hidden)) for shape in call.shapes]
