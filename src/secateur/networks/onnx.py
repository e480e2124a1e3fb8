"""ONNX models: what torch, TensorFlow, JAX, PaddlePaddle and scikit-learn export."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from secateur.errors import PlanMismatchError, UsageError
from secateur.latencytable import LatencyTable
from secateur.methods import Method
from secateur.methods.views import Flow
from secateur.networks.deciding import channel_method, decide_channels
from secateur.networks.kinds import Asked
from secateur.networks.latency import Latencies, Progress, measure_latencies
from secateur.networks.onnxcalls import OnnxCalls
from secateur.observe.gradients import Learned
from secateur.plans import Plan
from secateur.provenance import ExampleInputs, Fingerprint
from secateur.structure.groups import TracedAnatomy
from secateur.structure.onnx import cut_onnx, mask_onnx, onnx_anatomy, weights

if TYPE_CHECKING:
    import onnx

Inputs = Mapping[str, Sequence[int]]
"""Name of an input → its sizes."""

_SPEC = "onnx"
"""what a plan says of its inputs where they are sizes by name"""
_NORMS = ("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization")
_NORMS += ("RMSNormalization", "SimplifiedLayerNormalization")


def onnx_plan(
    method: Method,
    anatomy: TracedAnatomy,
    inputs: Inputs | None,
    asked: Asked,
    latencies: Latencies | None = None,
) -> Plan:
    """Decide which channels leave an ONNX model. Raises UsageError, NonFiniteError or BudgetError."""
    chosen = channel_method(method)
    if chosen.only_modules:
        raise UsageError(f"{method.name} is for torch modules: {chosen.only_modules}")
    if chosen.needed():
        raise UsageError(
            f"{method.name} needs gradients or inputs, which an ONNX model doesn't give: take spa_l1 or depgraph_l2"
        )
    tensors, scales = weights(anatomy), _scales(anatomy)

    def role(name: str, tensor: Tensor) -> str:
        return "scale" if name in scales else "weight" if tensor.dim() > 1 else "bias"

    return decide_channels(
        chosen,
        anatomy,
        tensors,
        role,
        model=_fingerprint(anatomy, tensors),
        inputs=ExampleInputs(
            spec=_SPEC, leaves=tuple({"name": n, "shape": list(s)} for n, s in (inputs or {}).items())
        ),
        probe=_Blind(),
        asked=asked,
        latencies=latencies,
    )


class _Blind:
    """An ONNX model isn't run, see ``Probe``: methods that want to are refused before."""

    def learned(self, removed: Iterable[int]) -> Sequence[Learned]:
        return [{}]

    def flow(self, removed: Iterable[int]) -> Flow:
        def under(masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            raise UsageError("synaptic flow runs the network, which an ONNX model isn't")

        return under


@dataclass(frozen=True)
class OnnxNetwork:
    """A traced ONNX model."""

    anatomy: TracedAnatomy
    inputs: Inputs | None
    source: Any = None
    """The file that it came from."""
    latencies: Latencies | None = None

    @classmethod
    def open(cls, model: Any, inputs: Any, *, heads: str, ignore: Sequence[str]) -> OnnxNetwork:
        """Trace it. Raises what ``onnx_anatomy`` raises, UsageError for sizes without names."""
        if inputs is not None and not isinstance(inputs, Mapping):
            raise UsageError("example_inputs of an ONNX model are sizes by name of the input: {'x': (1, 3, 224, 224)}")
        source = model if isinstance(model, str | Path) else None
        return cls(onnx_anatomy(model, inputs=inputs, heads=heads, ignore=ignore), inputs, source)

    def timed(self, path: str | Path | None, step: int, progress: Progress) -> OnnxNetwork:
        """See ``measure_latencies``."""
        calls, table = OnnxCalls(self.anatomy, self.source), LatencyTable.open(path)
        return replace(self, latencies=measure_latencies(self.anatomy, calls, table, step, progress))

    def plan(self, method: Method, asked: Asked) -> Plan:
        """See ``onnx_plan``."""
        return onnx_plan(method, self.anatomy, self.inputs, asked, self.latencies)

    def cut(self, plan: Plan, *, inplace: bool, optimizer: Any = None) -> tuple[onnx.ModelProto, list[str]]:
        """See ``apply_to_onnx``."""
        if inplace or optimizer is not None:
            raise UsageError("inplace and optimizer are for torch modules; an ONNX model is always a new one")
        return apply_to_onnx(plan, self.anatomy.trace.network.model, anatomy=self.anatomy), []


def _scales(anatomy: TracedAnatomy) -> set[str]:
    """Initialisers that are the scale of a norm."""
    nodes = anatomy.trace.network.model.graph.node
    return {node.input[1] for node in nodes if node.op_type in _NORMS and len(node.input) > 1}


def _fingerprint(anatomy: TracedAnatomy, tensors: Mapping[str, Tensor]) -> Fingerprint:
    """Name, hash of all names and shapes, hash of all values of the initialisers that can be cut."""
    shapes, values = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        shapes.update(f"{name}:{list(tensor.shape)};".encode())
        values.update(tensor.contiguous().numpy().tobytes())
    return Fingerprint(
        architecture="onnx",
        shapes=shapes.hexdigest(),
        weights=values.hexdigest(),
        num_layers=0,
        name=anatomy.model_type,
    )


def apply_to_onnx(
    plan: Plan, model: onnx.ModelProto | str | Path, *, anatomy: TracedAnatomy | None = None, mask: bool = False
) -> onnx.ModelProto:
    """The cut model, or with ``mask`` the dense one with zeros at what would leave; ``model`` stays as it is.

    Raises PlanMismatchError, and what ``onnx_anatomy`` raises.
    """
    provenance = plan.provenance[0]
    if provenance.inputs is not None and provenance.inputs.spec != _SPEC:
        raise PlanMismatchError(
            f"the plan was made for the torch module {plan.model.name}, whose groups aren't those of an ONNX model:"
            " make one for the file"
        )
    leaves = provenance.inputs.leaves if provenance.inputs else ()
    options = provenance.options
    traced = anatomy or onnx_anatomy(
        model,
        inputs={leaf["name"]: leaf["shape"] for leaf in leaves},
        heads=options.get("heads", "outer"),
        ignore=tuple(options.get("ignore", ())),
    )
    if _fingerprint(traced, weights(traced)).shapes != plan.model.shapes:
        raise PlanMismatchError(f"the plan was made for {plan.model.name}, whose initialisers have other shapes")
    removed = {name: plan.removed(name) for name in plan.keep}
    return (mask_onnx if mask else cut_onnx)(traced, removed)
