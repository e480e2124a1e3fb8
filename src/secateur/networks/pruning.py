"""Opening a network by what it is, a torch module or an ONNX model, and pruning it with one trace for plan and cut."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from secateur.errors import UsageError
from secateur.methods import Method
from secateur.networks.deciding import channel_method, network_report
from secateur.networks.example import Example
from secateur.networks.iterating import TrainFn, prune_in_steps
from secateur.networks.kinds import Asked, Network, is_onnx
from secateur.networks.modules import ModuleNetwork
from secateur.networks.onnx import OnnxNetwork
from secateur.plans import Plan
from secateur.report import Report


@dataclass(frozen=True)
class Called:
    """What a network is called with, as the user says it: for ONNX models sizes by name of the input."""

    args: Any = None
    kwargs: Mapping[str, Any] | None = None
    dynamic_shapes: Any = None

    def example(self, module: Any) -> Example:
        """Raises UsageError."""
        if self.args is not None and not isinstance(self.args, tuple | list):
            name = type(self.args).__name__
            raise UsageError(f"example_inputs must be a tuple of what the module is called with, got {name}")
        return Example(tuple(self.args or ()), self.kwargs).freed(module, self.dynamic_shapes)


def open_network(
    model: Any,
    method: Method,
    called: Called,
    *,
    ignore: Sequence[str] = (),
    latency_table: str | Path | None = None,
    progress: Callable[[str, int, int], None],
) -> Network:
    """Trace it, and measure its latencies where the budget of the method needs them. Raises UsageError."""
    chosen = channel_method(method)
    if latency_table is not None and chosen.budget != "latency":
        raise UsageError(f"latency_table is for budget='latency', got budget='{chosen.budget}'")
    network: Network
    if is_onnx(model):
        if called.dynamic_shapes is not None:
            raise UsageError("dynamic_shapes= is for torch modules: an ONNX model says itself which sizes are open")
        network = OnnxNetwork.open(model, called.args, heads=chosen.heads, ignore=ignore)
    else:
        network = ModuleNetwork.open(model, called.example(model), heads=chosen.heads, ignore=ignore)
    if chosen.budget != "latency":
        return network
    return network.timed(latency_table, chosen.round_to, progress)


def prune_network(
    model: Any,
    method: Method,
    called: Called,
    asked: Asked,
    *,
    inplace: bool = False,
    latency_table: str | Path | None = None,
    steps: int = 1,
    train_fn: TrainFn | None = None,
    optimizer: Any = None,
    progress: Callable[[str, int, int], None],
) -> tuple[nn.Module | Any, Plan, Report]:
    """The cut network (an ``onnx.ModelProto`` of an ONNX model), its plan and its report."""
    start = time.perf_counter()
    opened = partial(
        open_network,
        method=method,
        called=called,
        ignore=asked.ignore,
        latency_table=latency_table,
        progress=progress,
    )
    done = prune_in_steps(
        model,
        channel_method(method),
        opened,
        steps=steps,
        train_fn=train_fn,
        inplace=inplace,
        optimizer=optimizer,
        asked=asked,
    )
    report = network_report(done.plan, done.dense.anatomy, done.dense.latencies)
    report.notes += done.notes
    report.seconds = {"prune": time.perf_counter() - start}
    return done.network, done.plan, report
