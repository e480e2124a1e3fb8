"""Networks of any front end as evaluations see them: something to call, with sizes of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from secateur.errors import UsageError
from secateur.evaluation.base import Inputs
from secateur.kinds import is_onnx
from secateur.structure.exporting import evaluation_mode
from secateur.structure.groups import TracedAnatomy, traced_anatomy
from secateur.structure.onnx.session import open_session


class Runner(Protocol):
    """A network that can be called."""

    @property
    def device(self) -> torch.device: ...

    @property
    def kind(self) -> str:
        """What runs it, for protocols: ``torch float32``."""
        ...

    @property
    def fixed_batch(self) -> int | None:
        """The only number of images that it takes at a time; None for any."""
        ...

    def ready(self, inputs: Inputs) -> Any:
        """Context manager that gives ``call()``, which runs the network in evaluation mode, without gradients."""
        ...

    def classify(self, x: Tensor) -> Tensor:
        """Scores of the classes, [images, classes] on the CPU, for at most ``fixed_batch`` images."""
        ...

    def traced(self, inputs: Inputs) -> TracedAnatomy:
        """The network traced on these inputs. Raises UsageError or UnsupportedModelError."""
        ...


def open_runner(model: Any) -> Runner:
    """The runner of a torch module or of an ONNX model. Raises UsageError for anything else, MissingExtraError."""
    if is_onnx(model):
        return OnnxRunner(model)
    if isinstance(model, nn.Module):
        return TorchRunner(model)
    raise UsageError(f"can't evaluate a {type(model).__name__}: give a torch module, an .onnx file or a ModelProto")


def scores_of(output: Any) -> Tensor:
    """The tensor with the scores of the classes in what a classifier returns: itself, ``.logits``, or the first."""
    found = getattr(output, "logits", output)
    found = found[0] if isinstance(found, list | tuple) and found else found
    if not isinstance(found, Tensor) or found.dim() != 2:
        shape = f"{list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise UsageError(f"accuracy is of classifiers, whose output is [images, classes]; this one gives {shape}")
    return found


class TorchRunner:
    """A torch module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._example = next((p for p in (*module.parameters(), *module.buffers())), torch.zeros(0))

    @property
    def device(self) -> torch.device:
        return self._example.device

    @property
    def kind(self) -> str:
        return f"torch {str(self._example.dtype).removeprefix('torch.')} on {self.device.type}"

    @property
    def fixed_batch(self) -> int | None:
        if not isinstance(self._module, fx.GraphModule):
            return None
        # an exported graph has the sizes of its example inputs
        first = next((n.meta.get("val") for n in self._module.graph.nodes if n.op == "placeholder"), None)
        return int(first.shape[0]) if isinstance(first, Tensor) and first.dim() else None

    @contextmanager
    def ready(self, inputs: Inputs) -> Iterator[Callable[[], Any]]:
        if inputs.sizes:
            raise UsageError("example_inputs by name and size are those of ONNX models; give a tuple of tensors")
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(self.device), (inputs.args, dict(inputs.kwargs)))
        # not inference_mode: composite operators would then hide their intermediate tensors from a count of memory
        with evaluation_mode(self._module), torch.no_grad():
            yield lambda: self._module(*args, **kwargs)

    def classify(self, x: Tensor) -> Tensor:
        with self.ready(Inputs((x,))) as call:
            return scores_of(call()).float().cpu()

    def traced(self, inputs: Inputs) -> TracedAnatomy:
        from secateur.structure.trace import trace

        return traced_anatomy(trace(self._module, inputs.args, inputs.kwargs))


class OnnxRunner:
    """An ONNX model in onnxruntime, on the CPU and as many threads as torch has."""

    device = torch.device("cpu")
    kind = "onnxruntime on cpu"

    def __init__(self, model: Any) -> None:
        self._model = model
        self._session: Any = open_session(model, extra="vision")

    @property
    def fixed_batch(self) -> int | None:
        shape = self._session.get_inputs()[0].shape
        return shape[0] if shape and isinstance(shape[0], int) else None

    @contextmanager
    def ready(self, inputs: Inputs) -> Iterator[Callable[[], Any]]:
        fed = self._fed(inputs)
        yield lambda: self._session.run(None, fed)

    def classify(self, x: Tensor) -> Tensor:
        with self.ready(Inputs((x,))) as call:
            return scores_of(torch.from_numpy(call()[0])).float()

    def traced(self, inputs: Inputs) -> TracedAnatomy:
        from secateur.structure.onnx import onnx_anatomy

        return onnx_anatomy(self._model, inputs={name: array.shape for name, array in self._fed(inputs).items()})

    def _fed(self, inputs: Inputs) -> dict[str, np.ndarray[Any, Any]]:
        """What the session is fed: the given tensors, or ones of the given sizes."""
        wanted = {one.name: one for one in self._session.get_inputs()}
        if inputs.args or inputs.kwargs:
            given = dict(zip(wanted, inputs.args, strict=False)) | dict(inputs.kwargs)
            fed = {name: t.detach().cpu().numpy() for name, t in given.items() if isinstance(t, Tensor)}
        else:
            fed = {name: _ones(one, inputs.sizes.get(name)) for name, one in wanted.items()}
        if set(fed) != set(wanted):
            raise UsageError(
                f"the ONNX model takes {', '.join(wanted)}; example_inputs give {', '.join(fed) or 'nothing'}"
            )
        return fed


def _ones(one: Any, sizes: Sequence[int] | None) -> np.ndarray[Any, Any]:
    shape = list(sizes if sizes is not None else one.shape)
    if any(not isinstance(n, int) for n in shape):
        raise UsageError(
            f"the ONNX model leaves sizes of {one.name} open: give example_inputs={{'{one.name}': (1, 3, 224, 224)}}"
        )
    kind = one.type.removeprefix("tensor(").removesuffix(")")
    return np.ones(shape, dtype={"float": np.float32, "double": np.float64}.get(kind, kind))


def open_runners(models: Mapping[str, Any]) -> dict[str, Runner]:
    """The runner of every model, by name."""
    return {name: open_runner(model) for name, model in models.items()}
