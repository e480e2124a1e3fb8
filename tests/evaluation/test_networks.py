"""Size, multiply-accumulates and latency of traced networks and ONNX models, by hand and by a clock of our own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from channel_networks import Residual
from secateur import timing
from secateur.errors import UsageError
from secateur.evaluation import Evaluation, make_task
from secateur.evaluation.latency import Latency
from secateur.structure.onnx import save_onnx

X = torch.zeros(2, 3, 12, 12)


class Slow(nn.Module):
    """Takes ``seconds`` of the clock in ``clock``, and notes that it ran."""

    def __init__(self, name: str, seconds: list[float], clock: dict) -> None:
        super().__init__()
        self.name, self.seconds, self.clock = name, iter(seconds), clock

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.clock["ran"].append((self.name, len(x), torch.get_num_threads()))
        self.clock["now"] += next(self.seconds)
        return x


@pytest.fixture
def clock(monkeypatch):
    state = {"now": 0.0, "ran": []}
    monkeypatch.setattr(timing, "now", lambda device: state["now"])
    return state


def test_models_take_turns_and_the_median_of_the_repeats_counts(clock):
    # the first round warms up
    models = [Slow("a", [9, 1, 2, 5], clock), Slow("b", [9, 4, 4, 1], clock)]
    table = sc.evaluate(models, tasks="latency:repeats=3", example_inputs=(torch.zeros(2, 3),))
    assert [name for name, *_ in clock["ran"]] == ["a", "b"] * 4
    metric = table["latency"]
    assert metric.values == {"dense": 2000.0, "pruned": 4000.0} and metric.unit == "ms"
    assert metric.higher_is_better is False
    assert metric.protocol.startswith("median of 3 interleaved repeats, one call on 2x3, torch float32 on cpu, ")
    assert metric.protocol.endswith(f"{torch.get_num_threads()} threads{timing.PAIRED}")
    assert metric.repeats == {"dense": [1000.0, 2000.0, 5000.0], "pruned": [4000.0, 4000.0, 1000.0]}
    assert all(model.training for model in models)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batch_and_threads_are_those_asked_for(clock, batch):
    before = torch.get_num_threads()
    table = sc.evaluate(
        Slow("a", [1, 1], clock),
        tasks=f"latency:batch={batch},repeats=1,threads={before + 1}",
        example_inputs=(torch.zeros(2, 3),),
    )
    assert clock["ran"] == [("a", batch, before + 1)] * 2
    assert (
        f"one call on {batch}x3" in table.metrics[0].protocol and f"{before + 1} threads" in table.metrics[0].protocol
    )
    assert torch.get_num_threads() == before


def test_macs_and_size_are_those_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(5 * 144, 2))
    net[2].weight.data[0] = 0
    table = sc.evaluate(net, tasks=["size", "macs"], example_inputs=(X,))
    found = {metric.name: metric.values["dense"] for metric in table}
    assert found["MACs"] == 2 * (5 * 3 * 9 * 144 + 2 * 5 * 144)
    assert found["parameters"] == 5 * 3 * 9 + 2 * 5 * 144 + 2
    assert found["non-zero parameters"] == found["parameters"] - 5 * 144
    assert found["bytes"] == 4 * found["parameters"]
    # weights, and the output of the convolution while the linear layer makes its own
    assert found["peak memory"] == found["bytes"] + 4 * (2 * 5 * 144 + 2 * 2)
    assert "one call on 2x3x12x12" in table["MACs"].protocol and "2x3x12x12" in table["peak memory"].protocol


def test_a_pruned_network_stands_beside_the_dense_one():
    module = Residual()
    cut = sc.prune(module, example_inputs=(X,), method="spa_l1", sparsity=0.5, budget="macs")
    table = sc.evaluate([module, cut.model], example_inputs=(X,))
    assert table.models == ["dense", "pruned"]
    assert [m.name for m in table][-2:] == ["MACs", "latency"] and "peak memory" in [m.name for m in table]
    assert table["MACs"].change("pruned") == pytest.approx(-cut.report.achieved)
    counted = {m.name: m.values for m in cut.report.metrics}
    assert table["parameters"].values == counted["parameters"] and table["MACs"].values == counted["MACs"]
    assert "latency" in str(table)


def test_an_onnx_model_is_measured_with_the_same_words(tmp_path):
    module, path = Residual().eval(), tmp_path / "net.onnx"
    torch.onnx.export(module, (X,), path, dynamo=True, verbose=False)
    result = sc.prune(path, method="spa_l1", sparsity=0.4)
    table = sc.evaluate([path, result.model], tasks=["size", "macs", "latency:repeats=1"])
    names = [m.name for m in table]
    assert names == ["parameters", "non-zero parameters", "bytes", "bytes on disk", "MACs", "latency:repeats=1"]
    assert table["MACs"].values["dense"] == sc.anatomy(module, example_inputs=(X,)).total.macs
    assert table["bytes"].change("pruned") < -0.3
    save_onnx(result.model, tmp_path / "small.onnx")
    assert table["bytes on disk"].values["pruned"] == (tmp_path / "small.onnx").stat().st_size
    assert "onnxruntime on cpu" in table["latency"].protocol and table["latency"].values["pruned"] > 0
    both = sc.evaluate({"torch": module, "onnx": path}, tasks=["macs", "latency:repeats=1"], example_inputs=(X,))
    assert len(set(both["MACs"].values.values())) == 1
    assert "torch float32 on cpu and onnxruntime on cpu" in both["latency"].protocol


def test_sizes_that_an_onnx_model_leaves_open_are_asked_for(tmp_path):
    path = tmp_path / "net.onnx"
    batch = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    torch.onnx.export(Residual().eval(), (X,), path, dynamo=True, verbose=False, dynamic_shapes=batch)
    with pytest.raises(UsageError, match=r"leaves sizes of x open: give example_inputs=\{'x': "):
        sc.evaluate(path, tasks="latency")
    table = sc.evaluate(path, tasks=["macs", "latency:batch=3,repeats=1"], example_inputs={"x": (1, 3, 12, 12)})
    assert table["MACs"].values["dense"] == sc.anatomy(Residual(), example_inputs=(X[:1],)).total.macs
    assert "one call on 3x3x12x12" in table["latency"].protocol
    with pytest.raises(UsageError, match="the ONNX model takes x; example_inputs give nothing"):
        sc.evaluate(path, tasks="latency", example_inputs=(3,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latency:batc=2", "latency has no setting 'batc'; did you mean 'batch'"),
        ("latency:repeats=0", "repeats must be a whole number of at least 1, got '0'"),
        ("macs:2", "macs has no settings, got '2'"),
        ("latancy", "unknown task 'latancy'; did you mean 'latency'"),
    ],
)
def test_bad_settings_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        make_task(text)


@pytest.mark.parametrize("text", ["latency", "macs", "accuracy:photos"])
def test_tasks_keep_the_contract(text):
    task = make_task(text)
    assert isinstance(task, Evaluation) and task.name == text
    assert make_task("latency:batch=4,repeats=7").name == "latency:batch=4,repeats=7" != Latency().name


@pytest.mark.parametrize("task", ["perplexity:builtin", "speed"])
def test_tasks_of_decoders_are_not_of_networks(task):
    with pytest.raises(UsageError, match=f"{task} is measured of language models only"):
        sc.evaluate(Residual(), tasks=["size", task], example_inputs=(X,))


@pytest.mark.parametrize("task", ["latency", "macs"])
def test_what_a_network_is_called_with_is_asked_for(task):
    with pytest.raises(UsageError, match=f"{task} is of networks: give example_inputs"):
        sc.evaluate(Residual(), tasks=task)
    with pytest.raises(UsageError, match="size of model dense needs example_inputs"):
        sc.evaluate(Residual(), tasks="size")
    with pytest.raises(UsageError, match="must be a tuple"):
        sc.evaluate(Residual(), tasks=task, example_inputs=X)
    with pytest.raises(UsageError, match="those of ONNX models"):
        sc.evaluate(Residual(), tasks="latency", example_inputs={"x": (1, 3, 12, 12)})
