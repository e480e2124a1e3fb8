"""Recurrent layers: unit h of the hidden state owns row h of every gate and column h of the recurrent weight."""

from __future__ import annotations

import numpy as np

from secateur.structure.trace import Call, NoRule, Trace, Value, Zeros, rule
from secateur.structure.units import Labels

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule("aten::lstm.input", "aten::gru.input", "aten::rnn_tanh.input", "aten::rnn_relu.input", zeros=Zeros.KEPT)
def recurrent(trace: Trace, call: Call) -> list[Value]:
    x, states, parameters = call["input"], call["hx"], call["params"]
    gates = GATES[call.name.removeprefix("aten::")]
    directions = 2 if call["bidirectional"] else 1
    states = states if isinstance(states, list) else [states]
    layers = call["num_layers"]
    each = len(parameters) // (layers * directions)
    # a step whose input is zero still changes the state, and the states have the batch of the input
    trace.pin(Value(x.dims[:-1]), "a step of a sequence or a batch")
    inputs: Labels = x.dims[-1]
    hidden: list[Labels] = []
    for layer in range(layers):
        hidden = []
        for direction in range(directions):
            at = (layer * directions + direction) * each
            hidden.append(_cell(trace, call, parameters[at : at + each], inputs, gates, bool(call["has_biases"]), x))
        inputs = np.concatenate(hidden)
    everything = [h for h in hidden]
    for labels in everything[1:]:
        # states of the two directions lie in one tensor
        trace.units.join(everything[0], labels)
    cell = everything[0]
    for at in range(0, layers * directions):
        weight = parameters[at * each]
        _same_hidden(trace, weight, cell, gates)
    for state in states:
        trace.pin(Value(state.dims[:-1]), "a layer, a direction or a batch")
        trace.units.join(state.dims[-1], cell)
    batch = x.dims[:-1]
    output = Value((*batch, np.concatenate(everything) if directions == 2 else cell))
    return [output, *(Value((*states[0].dims[:-1], cell)) for _ in call.shapes[1:])]


@rule("aten::lstm_cell", "aten::gru_cell", "aten::rnn_tanh_cell", "aten::rnn_relu_cell", zeros=Zeros.KEPT)
def cell(trace: Trace, call: Call) -> list[Value]:
    """One step of one layer."""
    x, states = call["input"], call["hx"]
    parameters = [call[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if call[name] is not None]
    gates = GATES[call.name.removeprefix("aten::").removesuffix("_cell")]
    hidden = _cell(trace, call, parameters, x.dims[-1], gates, len(parameters) > 2, x)
    # an input of zeros still changes the state
    trace.pin(Value(x.dims[:-1]), "a batch")
    for state in states if isinstance(states, list) else [states]:
        trace.pin(Value(state.dims[:-1]), "a batch")
        trace.units.join(state.dims[-1], hidden)
    return [Value((*x.dims[:-1], hidden)) for _ in call.shapes]


def _cell(
    trace: Trace, call: Call, parameters: list[Value], inputs: Labels, gates: int, biased: bool, x: Value
) -> Labels:
    w_input, w_hidden, *rest = parameters
    hidden = w_hidden.dims[1]
    if len(rest) > (2 if biased else 0):
        raise NoRule("its hidden state is projected")
    trace.units.join(w_input.dims[1], inputs)
    for rows in (w_input.dims[0], w_hidden.dims[0], *(b.dims[0] for b in rest)):
        trace.units.join(rows, np.tile(hidden, gates))
    trace.count(call, *x.dims[:-1], w_input.dims[0], w_input.dims[1])
    trace.count(call, *x.dims[:-1], w_hidden.dims[0], w_hidden.dims[1])
    return hidden


def _same_hidden(trace: Trace, weight: Value, hidden: Labels, gates: int) -> None:
    """All layers and directions have one hidden size."""
    trace.units.join(weight.dims[0], np.tile(hidden, gates))
