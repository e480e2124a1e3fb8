"""torch.export, with its many ways to fail turned into one sentence each."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from secateur.errors import UnsupportedModelError, UsageError
from secateur.structure.functional import make_functional


@dataclass(frozen=True)
class Exported:
    """An exported program. ``decomposed``: torch made it functional, otherwise ``graph_module`` does."""

    program: torch.export.ExportedProgram
    decomposed: bool
    _ready: list[fx.GraphModule] = field(default_factory=list, repr=False)
    """One that was made on the way, and that nobody has yet: making one takes a good part of an export."""

    def graph_module(self) -> fx.GraphModule:
        """The program as a module with a flat functional graph: a new one, of the same nodes, with every call."""
        if self._ready:
            return self._ready.pop()
        made: Any = self.program.module(check_guards=False)
        if not self.decomposed:
            make_functional(made.graph)
        return made


def export(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    known: Callable[[fx.Node], bool],
    dynamic_shapes: Any = None,
    training: bool = False,
) -> Exported:
    """The flat functional ATen graph of ``module`` in evaluation mode; the module is left as it is.

    ``known`` tells whether an operator can be left as it is; others are taken apart where torch can.
    ``dynamic_shapes`` are those of ``torch.export``: what they name must stay free. With ``training`` modules take the
    branches that their own code has for training.
    Raises UsageError when the module doesn't run on these inputs, UnsupportedModelError when it can't be exported.
    """
    with evaluation_mode(module, but_for_branches=training), quiet(), no_fast_path():
        try:
            program = torch.export.export(
                module, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False
            )
            graph: Any = program.module(check_guards=False)
            if make_functional(graph.graph) and all(known(n) for n in graph.graph.nodes if n.op == "call_function"):
                return Exported(program, decomposed=False, _ready=[graph])
            return Exported(program.run_decompositions({}), decomposed=True)
        except Exception as error:
            _check_runs(module, args, kwargs, error)
            raise UnsupportedModelError(_sentence(module, error)) from None


def record(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> fx.GraphModule:
    """The flat functional graph of what ``module`` computes in its branches for training on these very inputs.

    A branch that depends on values is the one that they take. A copy runs, so that the module is left as it is.
    Raises UnsupportedModelError.
    """
    leaves, spec = tree_flatten((tuple(args), dict(kwargs or {})))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    tensors = dict(_tensors_of(module))
    try:
        copy = deepcopy(module)

        def call(*given: torch.Tensor) -> Any:
            found = list(leaves)
            for place, tensor in zip(places, given, strict=True):
                found[place] = tensor
            args, kwargs = tree_unflatten(found, spec)
            return copy(*args, **kwargs)

        run = make_fx(call, pre_dispatch=True, _error_on_data_dependent_ops=False)
        with (
            evaluation_mode(copy, but_for_branches=True),
            quiet(),
            no_fast_path(),
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
        ):
            made = run(*(leaves[place].clone() for place in places))
    except Exception as error:
        raise UnsupportedModelError(_sentence(module, error)) from None
    if not make_functional(made.graph):
        raise UnsupportedModelError(f"{type(module).__name__} changes buffers, or views of tensors, in training")
    names = {id(tensor): name for name, tensor in reversed(list(_tensors_of(copy)))}
    root: dict[str, Any] = {}
    for node in made.graph.nodes:
        if node.op == "get_attr":
            given = getattr(made, str(node.target))
            name = names.get(id(given), str(node.target))
            node.target, root[name] = name, tensors.get(name, given)
    return fx.GraphModule(root, made.graph)


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _check_runs(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, error: Exception) -> None:
    """Tell a module that doesn't run on the inputs from one that can't be exported."""
    from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

    if isinstance(error, DynamicOutputShapeException) or type(error).__module__.startswith("torch.fx"):
        return
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            module(*_empty_like(args), **_empty_like(dict(kwargs or {})))
    except (RuntimeError, TypeError, ValueError, IndexError) as problem:
        if "data-dependent" in str(problem) or isinstance(problem, DynamicOutputShapeException):
            return
        name = type(module).__name__
        raise UsageError(f"{name} doesn't run on the example inputs{_where(problem)}: {_first_line(problem)}") from None
    except Exception:  # what fake tensors can't do says nothing about the module
        return


def _empty_like(value: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=t.device), value)


def _sentence(module: nn.Module, error: Exception) -> str:
    """Which line of the user's model stands in the way."""
    text = str(error)
    line = re.search(r'File "([^"]+)", line (\d+), in (\w+)(?!.*File ")', text, re.DOTALL)
    where = f" at {line[1]}:{line[2]}" if line and "/torch/" not in line[1] else ""
    return f"{type(module).__name__} can't be exported{_where(error) or where}: {_first_line(error)}"


def _where(error: BaseException) -> str:
    """`` at file:line`` of the innermost line outside torch, or nothing."""
    frames = [f for f in _frames(error) if "/torch/" not in f[0]]
    return f" at {frames[-1][0]}:{frames[-1][1]}" if frames else ""


def _frames(error: BaseException) -> Iterator[tuple[str, int]]:
    tb = error.__traceback__
    while tb is not None:
        path = tb.tb_frame.f_code.co_filename
        # code that torch made has no line that one could look at
        if "secateur/structure" not in path and not path.startswith("<"):
            yield path, tb.tb_lineno
        tb = tb.tb_next


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    return (line if len(line) <= 300 else line[:300].rpartition(". ")[0] or line[:300]).rstrip(".")


@contextmanager
def evaluation_mode(module: nn.Module, *, but_for_branches: bool = False) -> Iterator[None]:
    """Every sub-module in evaluation mode, and back as it was.

    ``but_for_branches``: only those of torch, which compute in training what they do otherwise, but for noise and
    statistics; the user's own modules are in training mode.
    """
    before = {m: m.training for m in module.modules()}
    try:
        # an exported graph, or a part that is one, has the mode that it was exported in
        with suppress(NotImplementedError):
            module.eval()
        for part in before:
            part.training = but_for_branches and not of_torch(part)
        yield
    finally:
        for part, training in before.items():
            part.training = training


def of_torch(part: nn.Module) -> bool:
    """Whether torch knows what a module does, and what its attributes are."""
    plain = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return any(c.__module__.startswith("torch.nn.") and c not in plain for c in type(part).__mro__)


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Attention modules of torch compute step by step, not as one fused operator that hides its dimensions."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def quiet() -> Iterator[None]:
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before
