"""Sizes of inputs that stay free in what is cut, above all where only a graph can be."""

import pytest
import torch
from torch import nn
from torch.export import Dim

import secateur as sc
from channel_networks import Residual
from secateur.errors import DataError, UnsupportedModelError, UsageError

X = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OTHERS = [(2, 5, 8), (7, 5, 8), (3, 9, 8)]
BOTH = ({0: "batch", 1: "length"},)


class Heads(nn.Module):
    """Its code holds the number and the size of the heads, so that only its graph can be cut."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(8, 12) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(12, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, scale=None):
        batch, length, _ = x.shape
        q, k, v = (f(x).reshape(batch, length, 3, 4).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, 12))
        wide = self.up(x).relu().repeat(1, 2, 1)[:, :length].reshape(batch * length, 2, 8)
        y = self.down(wide.reshape(batch, length, 16)).split([length], dim=1)[0]
        return y if scale is None else y * scale


def heads():
    return Heads().double().eval()


def pruned(module, x=X, **options):
    return sc.prune(module, example_inputs=(x,), method="spa_l1", sparsity=0.4, **options)


def equal_at(cut, masked, shapes=OTHERS):
    inputs = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return all(torch.allclose(cut(x), masked(x), atol=1e-12) for x in inputs)


def test_a_graph_takes_other_sizes():
    module = heads()
    result = pruned(module, dynamic_shapes=BOTH)
    assert isinstance(result.model, torch.fx.GraphModule) and 0 < len(result.plan.keep["up"]) < 16
    assert equal_at(result.model, sc.apply(result.plan, module, mask=True))


def test_without_them_it_takes_those_of_the_example_and_says_so():
    result = pruned(heads())
    assert "dynamic_shapes=" in result.report.notes[0]
    with pytest.raises(RuntimeError):
        result.model(torch.randn(7, 5, 8, dtype=torch.float64))


def test_a_module_stays_a_module():
    module, x = Residual().eval(), torch.randn(2, 3, 12, 12)
    result = pruned(module, x, dynamic_shapes=([Dim("batch"), None, None, None],))
    assert type(result.model) is Residual
    assert result.plan.keep.keys() == pruned(module, x).plan.keep.keys()


def test_the_plan_keeps_them_on_disk_and_for_programs(tmp_path):
    module = heads()
    result = pruned(module, dynamic_shapes={"x": {0: Dim.AUTO, -2: Dim.DYNAMIC}})
    result.plan.save(tmp_path / "plan")
    again = sc.Plan.load(tmp_path / "plan")
    masked = sc.apply(again, module, mask=True)
    assert equal_at(sc.apply(again, module), masked)
    sc.save(result.model, None, tmp_path / "net.pt2", plan=again)
    assert equal_at(torch.export.load(tmp_path / "net.pt2").module(), masked)


def test_inputs_by_keyword():
    module = heads()
    called = {"x": X, "scale": torch.ones(5, 1, dtype=torch.float64)}
    free = {"x": {0: "batch", 1: 5}, "scale": None}
    plan = sc.plan(module, example_kwargs=called, method="spa_l1", sparsity=0.4, dynamic_shapes=free)
    cut, masked = sc.apply(plan, module), sc.apply(plan, module, mask=True)
    called["x"] = torch.randn(6, 5, 8, dtype=torch.float64)
    assert torch.allclose(cut(**called), masked(**called), atol=1e-12)


def test_batches_of_other_sizes_calibrate_and_are_left_unmarked():
    module, batches = heads(), [torch.randn(size, 5, 8, dtype=torch.float64) for size in (2, 4)]
    asked = {"example_inputs": (X,), "method": "obspa", "sparsity": 0.3, "dynamic_shapes": ({0: "batch"},)}
    result = sc.prune(module, data=batches, **asked)
    assert result.model(torch.randn(7, 5, 8, dtype=torch.float64)).shape == (7, 5, 8)
    assert not any(name.startswith("_dynamo") for batch in batches for name in vars(batch))
    with pytest.raises(DataError, match=r"batch 1 of the data: dimension 0 .* size 2 or more"):
        sc.prune(module, data=[X, X[:1]], **asked)


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.up(x.reshape(2, 5, 8)))


@pytest.mark.parametrize(
    ("shapes", "error", "said"),
    [
        ({"y": {0: "batch"}}, UsageError, "dynamic_shapes names y, but the inputs are x"),
        (({0: "batch"}, None), UsageError, "a tuple with an entry per example input"),
        (0, UsageError, "a tuple with an entry per example input"),
        (({3: "depth"},), UsageError, "frees dimension 3 of an input of shape"),
        (({0: "batch"},), UnsupportedModelError, "dimension 0 of input x can't stay free: the code of Fixed"),
    ],
)
def test_what_is_refused(shapes, error, said):
    with pytest.raises(error, match=said):
        sc.anatomy(Fixed().double(), example_inputs=(X,), dynamic_shapes=shapes)


def test_a_size_of_one_broadcasts():
    with pytest.raises(UsageError, match="give an example of size 2 or more"):
        sc.anatomy(heads(), example_inputs=(X[:1],), dynamic_shapes=BOTH)


def test_onnx_models_say_it_themselves():
    with pytest.raises(UsageError, match="an ONNX model says itself which sizes are open"):
        sc.plan("net.onnx", method="spa_l1", sparsity=0.4, dynamic_shapes=BOTH)
