"""The Python API on ONNX models: the same words as for modules."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

import secateur as sc
from channel_networks import Residual
from secateur.errors import ModelLoadError, PlanMismatchError, UsageError
from secateur.methods import get_method, list_methods
from secateur.plans import Plan
from secateur.structure.onnx import load_onnx, save_onnx

CHANNELS = {m: get_method(m) for m in list_methods(object="channels")}
METHODS = [m for m, cls in CHANNELS.items() if not cls.needs and not cls.only_modules]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    torch.onnx.export(Residual().eval(), (torch.zeros(2, 3, 12, 12),), path, dynamo=True, verbose=False)
    return path


def outputs(model):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((2, 3, 12, 12)).astype(np.float32)
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize("method", [m for m in METHODS if m != "slimming"])
def test_masked_model_equals_cut_model(method, file):
    dense = load_onnx(file)
    result = sc.prune(str(file), method=method, sparsity=0.4)
    masked = sc.apply(result.plan, file, mask=True)
    np.testing.assert_allclose(outputs(result.model), outputs(masked), rtol=1e-4, atol=1e-5)
    assert np.abs(outputs(result.model) - outputs(dense)).max() > 1e-3
    assert result.model.ByteSize() < 0.8 * dense.ByteSize()
    assert result.report.achieved == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize("method", [m for m, cls in CHANNELS.items() if cls.only_modules])
def test_methods_that_run_or_build_the_network_say_so(method, file):
    with pytest.raises(UsageError, match=f"{method} is for torch modules: .*ONNX"):
        sc.prune(str(file), method=method, sparsity=0.4)


def test_a_plan_is_applied_again_after_the_disk(file, tmp_path):
    result = sc.prune(load_onnx(file), method="spa_l1", sparsity=0.3, budget="macs")
    plan = Plan.load(result.plan.save(tmp_path / "plan"))
    assert sc.apply(plan, file).SerializeToString() == result.model.SerializeToString()
    save_onnx(result.model, tmp_path / "small.onnx")
    with pytest.raises(PlanMismatchError, match="other shapes"):
        sc.apply(plan, tmp_path / "small.onnx")


def test_the_same_network_gives_the_same_groups_in_both_front_ends(file):
    module = {(g.units, g.kind) for g in sc.anatomy(Residual(), example_inputs=(torch.zeros(2, 3, 12, 12),))}
    assert module == {(g.units, g.kind) for g in sc.anatomy(file)}


def test_user_mistakes_are_one_sentence(file, tmp_path):
    with pytest.raises(UsageError, match="needs gradients"):
        sc.prune(file, method="taylor", sparsity=0.3, data=[1])
    with pytest.raises(UsageError, match="by name"):
        sc.prune(file, method="spa_l1", sparsity=0.3, example_inputs=(1, 2))
    with pytest.raises(UsageError, match="inplace"):
        sc.prune(file, method="spa_l1", sparsity=0.3, inplace=True)
    with pytest.raises(ModelLoadError, match="not there"):
        sc.anatomy(tmp_path / "missing.onnx")
