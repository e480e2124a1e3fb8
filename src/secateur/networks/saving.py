"""A cut network on disk: one file that other tools run, or a folder that says where it came from."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateur.errors import NonFiniteError, OutputError, UsageError, first_line, require_extra
from secateur.files import check_output, check_output_file, output_file, output_folder
from secateur.finite import all_finite
from secateur.kinds import GRAPH_FILE
from secateur.manifest import write_manifest
from secateur.networks.applying import module_fingerprint
from secateur.networks.example import Example
from secateur.networks.kinds import FILES, is_onnx
from secateur.plans import Plan
from secateur.remote import is_url
from secateur.report.card import card
from secateur.report.folder import write_documents
from secateur.structure.exporting import evaluation_mode, no_fast_path, quiet
from secateur.structure.onnx import save_onnx
from secateur.usercode import is_file

if TYPE_CHECKING:
    import onnx

    from secateur.report import Report

WEIGHTS = "model.safetensors"


def check_place(out: str | Path, *, onnx_model: bool, overwrite: bool = False) -> None:
    """Refuse a place that can't be written, before any work starts. Raises UsageError, OutputError."""
    suffix = Path(out).suffix
    if suffix not in FILES:
        check_output(out, overwrite)
        return
    if is_url(out):
        raise OutputError(f"{out} is a file on another machine: give a folder, or a file on this one")
    if onnx_model and suffix != ".onnx":
        raise UsageError(f"an ONNX model is written as .onnx, or to a folder, not to {out}")
    if suffix == ".onnx" and not onnx_model:
        require_extra("onnxscript", "onnx", "exporting a module to ONNX")
    check_output_file(Path(out), overwrite)


def save_network(
    network: nn.Module | onnx.ModelProto,
    out: str | Path,
    *,
    plan: Plan | Sequence[Plan] | None,
    report: Report | None = None,
    html: bool = False,
    overwrite: bool = False,
    factory: str = "",
    arguments: Mapping[str, Any] | None = None,
) -> Path:
    """Write a cut network, all or nothing; returns where it is.

    ``out`` may be a ``.onnx`` or ``.pt2`` file, a module is exported for it on inputs of the plan's shapes; or a
    folder, for the weights (``model.safetensors``, or ``model.onnx``), the plan, the report, with ``html`` drawn as
    well, and a README that says how to load it. An ONNX model that goes to a file, and a module that was trained and
    not pruned (the report says so), do without a plan.
    ``factory`` names what makes the dense module, called with these ``arguments``.
    Raises UsageError, NonFiniteError, OutputError, and MissingExtraError when an exporter is missing.
    """
    check_place(out, onnx_model=is_onnx(network), overwrite=overwrite)
    if isinstance(network, nn.Module):
        check_module_finite(network)
    suffix = Path(out).suffix
    if suffix == ".onnx" and not isinstance(network, nn.Module):
        save_onnx(network, out, overwrite=overwrite)
        return Path(out)
    if not isinstance(plan, Plan):
        if report is None or not report.trainings or suffix in FILES:
            raise UsageError(
                "give the plan with plan=: it knows what the network is called with and where it came from"
            )
        plan = None
    elif suffix == ".onnx" and isinstance(network, nn.Module):
        save_onnx(_as_onnx(network, plan), out, overwrite=overwrite)
        return Path(out)
    elif suffix == ".pt2":
        _save_program(network, out, plan)
        return Path(out)
    with output_folder(out, overwrite=overwrite) as folder:
        write_network(folder, network, out, plan, report, html=html, factory=factory, arguments=arguments)
    return Path(out)


def write_network(
    folder: Path,
    network: nn.Module | onnx.ModelProto,
    out: str | Path,
    plan: Plan | None,
    report: Report | None,
    *,
    html: bool,
    factory: str = "",
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """All that ``save_network`` writes to a folder, in ``folder``, which is empty and will have the name ``out``."""
    name = Path(out).name
    if isinstance(network, nn.Module):
        from safetensors.torch import save_model

        save_model(network, str(folder / WEIGHTS))
        code = _load_module(
            str(out), factory, arguments or {}, plan if plan is not None and _cuts(plan, network) else None
        )
    else:
        save_onnx(network, folder / GRAPH_FILE)
        code = f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{out}/{GRAPH_FILE}")\n'
    if report is not None:
        report.output, report.loading = str(out), code
    plans = [] if plan is None else [plan]
    trained = report is not None and report.trainings
    base_name = report.model if report is not None and trained else plan.model.name if plan is not None else ""
    loading = f"```python\n{code}```\n"
    readme = card(name, front={}, loading=loading, base_name=base_name, plans=plans, report=report)
    write_documents(folder, plans, report, readme, html=html)
    write_manifest(folder)


def check_module_finite(module: nn.Module) -> None:
    """Raises NonFiniteError that names the first tensor with NaN or inf."""
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor) and not all_finite(tensor):
            raise NonFiniteError(f"{name} holds NaN or inf; nothing was written")


def _exported(module: nn.Module, plan: Plan) -> torch.export.ExportedProgram:
    inputs = plan.inputs
    assert inputs is not None
    example = Example.of(inputs, module)
    with evaluation_mode(module), no_fast_path(), quiet():
        return torch.export.export(
            module,
            example.args,
            dict(example.kwargs or {}),
            dynamic_shapes=example.dynamic_shapes(module),
            strict=False,
        )


def _as_onnx(module: nn.Module, plan: Plan) -> onnx.ModelProto:
    exported = _exported(module, plan)
    # it logs which extensions are not there
    log, program = logging.getLogger("torch.onnx"), None
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(exported, dynamo=True, verbose=False)
    except Exception as error:  # the exporter's own kinds
        raise OutputError(f"torch can't export the module to ONNX: {first_line(error)}") from error
    finally:
        log.setLevel(level)
    assert program is not None
    return program.model_proto


def _save_program(network: Any, out: str | Path, plan: Plan) -> None:
    with output_file(out) as path:
        torch.export.save(_exported(network, plan), path)


def _cuts(plan: Plan, module: nn.Module) -> bool:
    """Whether the module is what the plan makes of the dense one, and not the dense one with zeros."""
    return bool(plan.keep) and module_fingerprint(module).shapes != plan.model.shapes


def _load_module(out: str, factory: str, arguments: Mapping[str, Any], plan: Plan | None) -> str:
    """Python that loads what was written; ``plan`` is the one that cuts the dense module."""
    source, _, name = factory.rpartition(":")
    module = Path(source).stem if is_file(source) else source
    called = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    dense = f"{name}({called})" if factory else "dense"
    first = f"from {module} import {name}  # what makes the dense module\n" if factory else ""
    if plan is None:
        # nothing was cut, and the zeros are among the weights
        return (
            f"from safetensors.torch import load_model\n{first}\nmodule = {dense}  # as it was made for training\n"
            f'load_model(module, "{out}/{WEIGHTS}")\n'
        )
    return (
        "import secateur as sc\nfrom safetensors.torch import load_model\n"
        f"{first}\n"
        f'module = sc.apply(sc.Plan.load("{out}/plan"), {dense})  # the same class with smaller layers\n'
        f'load_model(module, "{out}/{WEIGHTS}")\n'
    )
