"""Traced networks on the command line: modules that a function makes, and .onnx files."""

import json
import re

import numpy as np
import onnxruntime
import pytest
import torch

import secateur as sc
from channel_networks import Residual

SIZE = "2x3x12x12"
NET = """
import torch
from channel_networks import Residual

def make():
    return Residual().eval()

def batches():
    torch.manual_seed(0)
    return [(torch.randn(4, 3, 12, 12), torch.randint(10, (4,))) for _ in range(2)]

def loss(module, batch):
    return module(batch[0]).square().mean()

def drying():
    yield from batches()
    raise OSError("the disk is full of sand")

def failing(module, batch):
    return batch[7]

def broken():
    raise ValueError("no weights here")

def needy(width):
    return Residual()

def diverged():
    module = Residual()
    module.head.weight.data[0, 0] = float("nan")
    return module

module, number = Residual().eval(), 3
"""


@pytest.fixture
def net(tmp_path, monkeypatch):
    """A working folder with net.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    return "net.py"


@pytest.fixture
def onnx_file(net, cli):
    run = cli("prune", "net.py:make", "--input", SIZE, "--method", "spa_l1", "--sparsity", 0, "--out", "dense.onnx")
    assert run.code == 0, run.err
    return "dense.onnx"


def ran(file, x):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def x():
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def pruned_here(**options):
    module = Residual().eval()
    return sc.prune(module, example_inputs=(x(),), method="spa_l1", sparsity=0.4, budget="macs", **options)


PRUNE = ("--input", SIZE, "--method", "spa_l1", "--sparsity", 0.4, "--budget", "macs")
TAYLOR = ("--input", SIZE, "--method", "taylor")


def test_a_folder_says_how_to_load_it(net, cli, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    run = cli("prune", "net.py:make", *PRUNE, "--out", "small", "--no-report")
    assert run.code == 0, run.err
    assert "MACs" in run.out and "small/README.md says how to load it" in run.out
    assert sorted(p.name for p in (tmp_path / "small").iterdir()) == [
        *("README.md", "manifest.json", "model.safetensors", "plan", "report.json"),
    ]
    code = re.search(r"```python\n(.*?)```", (tmp_path / "small" / "README.md").read_text(), re.S)
    assert code
    names: dict = {}
    (tmp_path / "small" / "load.py").write_text(code[1])
    exec(compile(code[1], "load.py", "exec"), names)
    expected = pruned_here().model
    assert [tuple(p.shape) for p in names["module"].parameters()] == [tuple(p.shape) for p in expected.parameters()]
    assert torch.equal(names["module"].eval()(x()), expected(x()))


@pytest.mark.parametrize("name", ["small.onnx", "small.pt2"])
def test_a_file_runs_elsewhere(net, cli, tmp_path, name):
    run = cli("prune", "net.py:make", *PRUNE, "--out", name, "--json")
    assert run.code == 0, run.err
    document = json.loads(run.out)
    assert document["output"] == name and 0.35 < document["achieved"] < 0.45
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["net.py", name]
    got = ran(name, x()) if name.endswith("onnx") else torch.export.load(name).module()(x())
    assert torch.allclose(got, pruned_here().model(x()), atol=1e-5)


def test_an_onnx_file_becomes_a_smaller_one(onnx_file, cli, tmp_path):
    run = cli("prune", onnx_file, "--method", "spa_l1", "--sparsity", 0.4, "--budget", "macs", "--out", "small.onnx")
    assert run.code == 0, run.err
    assert (tmp_path / "small.onnx").stat().st_size < (tmp_path / onnx_file).stat().st_size
    again = cli("prune", onnx_file, "--method", "spa_l1", "--sparsity", 0.4, "--budget", "macs", "--out", "small")
    assert again.code == 0, again.err
    assert (tmp_path / "small" / "model.onnx").read_bytes() == (tmp_path / "small.onnx").read_bytes()
    sc.save(sc.apply(sc.Plan.load("small/plan"), onnx_file, mask=True), None, "masked.onnx")
    assert torch.allclose(ran("small.onnx", x()), ran("masked.onnx", x()), atol=1e-5)
    applied = cli("plan", "apply", "small", onnx_file, "--out", "again.onnx")
    assert applied.code == 0, applied.err
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "small.onnx").read_bytes()


def test_a_plan_is_shown_and_applied_again(net, cli, tmp_path):
    cli("prune", "net.py:make", *PRUNE, "--out", "small", "--no-report")
    assert "conv1" in cli("plan", "show", "small").out
    run = cli("plan", "apply", "small", "net.py:make", "--out", "again")
    assert run.code == 0, run.err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("small", "again")]
    assert weights[0] == weights[1]


def test_a_plan_of_masks_alone_is_named_as_one(net, cli, tmp_path):
    sc.Sparsifier(Residual(), method="erk_random", sparsity=0.5).finish().save("masks")
    run = cli("plan", "apply", "masks", "net.py:make", "--out", "again")
    assert run.code == 2 and "the plan masks single weights of a Residual, and cuts nothing" in run.err
    assert not (tmp_path / "again").exists()


def test_a_dry_run_writes_nothing(net, cli, tmp_path):
    run = cli("prune", "net.py:module", *PRUNE, "--dry-run")
    assert run.code == 0 and "conv1" in run.out
    document = json.loads(cli("prune", "net.py:module", *PRUNE, "--dry-run", "--json").out)
    assert document["dry_run"] and document["plans"][0]["method"] == "spa_l1"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["net.py"]


def test_data_and_loss_of_the_users(net, cli, tmp_path):
    base = ("prune", "net.py:make", "--input", SIZE, "--method", "taylor", "--sparsity", 0.3)
    for out, more in (("a", ()), ("b", ("--loss", "net.py:loss"))):
        run = cli(*base, "--data", "net.py:batches", *more, "--out", out, "--no-report")
        assert run.code == 0, run.err
    a, b = (sc.Plan.load(tmp_path / name / "plan") for name in ("a", "b"))
    assert any(not torch.equal(a.scores[name], b.scores[name]) for name in a.scores)


def test_inspect_lists_groups_and_says_why(net, cli):
    run = cli("inspect", "net.py:make", "--input", SIZE)
    assert run.code == 0 and "stem.0" in run.out
    document = json.loads(cli("inspect", "net.py:make", "--input", SIZE, "--json").out)
    assert {group["name"] for group in document["groups"]} >= {"stem.0", "conv1"}
    why = cli("inspect", "net.py:make", "--input", SIZE, "--why", "conv1")
    assert "conv1.weight[0]: group conv1: 24 of its channels leave together with bn1.weight[0]" in why.out
    assert "stays: a kernel's size" in why.out
    ignored = cli("inspect", "net.py:make", "--input", SIZE, "--ignore", "conv1", "--why", "bn1.weight").out
    assert "ignored by 'conv1'" in ignored
    assert json.loads(cli("inspect", "net.py:make", "--input", SIZE, "--why", "head", "--json").out)["why"]


def test_named_inputs(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.py").write_text(
        "from torch import nn\n"
        "class Words(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.table, self.out = nn.Embedding(50, 16), nn.Linear(16, 3)\n"
        "    def forward(self, ids, scale):\n"
        "        return self.out(self.table(ids) * scale)\n"
    )
    inputs = ("--input", "ids=2x7:int64", "--input", "scale=2x7x1")
    run = cli("prune", "words.py:Words", *inputs, "--method", "spa_l1", "--sparsity", 0.5, "--out", "small")
    assert run.code == 0, run.err
    assert sc.Plan.load(tmp_path / "small" / "plan").groups == {"table": 16}


@pytest.fixture
def images(net, tmp_path):
    """Twenty labelled pictures."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 12, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x=pixels, y=rng.integers(0, 10, 20))
    return "images.npz"


def test_measured_beside_the_dense_one(images, cli):
    tasks = ("--evaluate", f"accuracy:{images}", "--evaluate", "latency:repeats=2", "--evaluate", "macs")
    run = cli("prune", "net.py:make", *PRUNE, *tasks, "--out", "small.onnx", "--json")
    assert run.code == 0, run.err
    names = [metric["name"] for metric in json.loads(run.out)["metrics"]]
    assert len(names) == len(set(names)) and any("accuracy" in name for name in names)
    assert any("latency" in name for name in names)
    run = cli("evaluate", "net.py:make", "net.py:module", "--input", SIZE, "--task", f"accuracy:{images}", "--json")
    assert run.code == 0, run.err
    accuracy = json.loads(run.out)["metrics"][0]["values"]
    assert set(accuracy) == {"net.py:make", "net.py:module"} and len(set(accuracy.values())) == 1
    shown = cli("evaluate", "small.onnx", "--task", "latency:repeats=2")
    assert shown.code == 0 and "latency" in shown.out, shown.err


@pytest.mark.parametrize("named", [("net.py:make", "--input", SIZE), ("dense.onnx",)])
def test_a_latency_budget_keeps_its_table(onnx_file, cli, tmp_path, named):
    asked = ("--method", "spa_l1", "--budget", "latency=0.9", "--set", "round_to=4", "--latency-table", "times.json")
    run = cli("prune", *named, *asked, "--out", "small", "--no-report")
    # what it can save is a matter of the machine; the table is there either way
    assert run.code == 0 or "can't remove" in run.err, run.err
    kept = (tmp_path / "times.json").read_bytes()
    cli("prune", *named, *asked, "--out", "again", "--no-report")
    assert (tmp_path / "times.json").read_bytes() == kept


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["net.py:make", "smollm2-135m"], "can't be measured side by side"),
        (["net.py:make", "--input", SIZE, "--windows", "3"], "--windows is for language models"),
        (["smollm2-135m", "--input", SIZE], "--input is for traced networks"),
        (["net.py:make", "--input", SIZE, "--task", "acuracy:x.npz"], "did you mean 'accuracy'?"),
        (["net.py:make", "--input", SIZE, "--task", "perplexity:builtin"], "perplexity"),
    ],
)
def test_misuse_of_evaluate(net, cli, arguments, said):
    run = cli("evaluate", *arguments)
    assert run.code == 2 and run.out == "" and run.err.count("\n") == 1
    assert said in run.err


@pytest.mark.parametrize("size", ["n2x3x12x12", "x=batch2x3x12x12"])
def test_a_free_size_stays_free_in_the_file(net, cli, size):
    options = ("--input", size, "--method", "spa_l1", "--sparsity", 0.3)
    assert cli("prune", "net.py:make", *options, "--out", "net.onnx").code == 0
    assert ran("net.onnx", torch.randn(5, 3, 12, 12)).shape[0] == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["net.py:make", "--method", "spa_l1", "--dry-run"], "--input 1x3x224x224"),
        (["net.py:make", *PRUNE], "--out"),
        (["net.py:make", "--input", SIZE, "--dry-run"], "--method"),
        (["net.py:make", *PRUNE, "--samples", "3", "--dry-run"], "--samples is for language models"),
        (["smollm2-135m", "--method", "flap", "--input", SIZE, "--dry-run"], "--input is for traced networks"),
        (["net.py:make", "--method", "flap", "--input", SIZE, "--dry-run"], "flap doesn't remove channels"),
        (["net.py:make", "--method", "spa_l1", "--input", "3,4", "--dry-run"], "--input is a size"),
        (["net.py:make", "--method", "spa_l1", "--input", "9x9999999x9999999", "--dry-run"], "more than fits into"),
        (["net.py:make", "--method", "spa_l1", "--input", "3x" + "9" * 20, "--dry-run"], "more than fits into"),
        (["net.py:make", "--method", "spa_l1", "--input", "n1x3x12x12", "--dry-run"], "example of size 2 or more"),
        (["net.onnx", "--method", "spa_l1", "--input", "x=n2x3x12x12", "--dry-run"], "knows its types and open sizes"),
        (["net.py:make", "--method", "spa_l1", "--input", "x=3:int46", "--dry-run"], "did you mean 'int"),
        (["net.py:make", "--method", "spa_l1", "--input", "x=3", "--input", "x=4", "--dry-run"], "given twice"),
        (["net.py:mak", *PRUNE, "--dry-run"], "did you mean 'make'?"),
        (["nte.py:make", *PRUNE, "--dry-run"], "nte.py is not a file"),
        (["nte:make", *PRUNE, "--dry-run"], "nte is not installed"),
        (["net.py:broken", *PRUNE, "--dry-run"], "net.py:broken failed: ValueError: no weights here"),
        (
            ["net.py:needy", *PRUNE, "--dry-run"],
            "net.py:needy failed: TypeError: needy() missing 1 required positional argument: 'width'\n",
        ),
        (["net.py:number", *PRUNE, "--dry-run"], "net.py:number must be a torch.nn.Module"),
        (["net.py:batches", *PRUNE, "--dry-run"], "must make a torch.nn.Module, it made list"),
        (["net.py:make", *PRUNE, "--data", "net.py:number", "--dry-run"], "must be batches"),
        (["net.py:make", *PRUNE, "--loss", "net.py:number", "--dry-run"], "must be a function"),
        (
            ["net.py:make", "--input", SIZE, "--method", "activation_norm", "--data", "net.py:drying", "--dry-run"],
            "net.py:drying failed: OSError: the disk is full of sand (",
        ),
        (
            ["net.py:make", *TAYLOR, "--data", "net.py:batches", "--loss", "net.py:failing", "--dry-run"],
            "net.py:failing failed: IndexError: ",
        ),
        (["net.py:make", *PRUNE, "--ignore", "nothing", "--dry-run"], "matches no parameter"),
        (["net.py:make", *PRUNE, "--latency-table", "times.json", "--dry-run"], "is for budget='latency'"),
        (["net.py:make", *PRUNE[:4], "--budget", "latency=0.7,macs=0.5", "--dry-run"], "channels leave for one budget"),
        (["dense.onnx", "--method", "spa_l1", "--out", "x.pt2"], "is written as .onnx"),
        (["dense.onnx", "--method", "spa_l1", "--input", SIZE, "--dry-run"], "--input as NAME="),
    ],
)
def test_misuse_is_one_line_and_code_2(net, cli, tmp_path, arguments, said):
    run = cli("prune", *arguments)
    assert run.code == 2 and run.out == ""
    assert run.err.startswith("error: ") and run.err.count("\n") == 1
    assert said in run.err
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["net.py"]


@pytest.mark.parametrize("out", ["there.onnx", "there.pt2", "there"])
def test_what_exists_is_not_overwritten(net, cli, tmp_path, out):
    place = tmp_path / out
    kept = place / "precious" if place.suffix == "" else place
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("x")
    run = cli("prune", "net.py:make", *PRUNE, "--out", out)
    assert run.code == 1 and "exists" in run.err and kept.read_text() == "x"
    assert cli("prune", "net.py:make", *PRUNE, "--out", out, "--overwrite", "--no-report").code == 0
    assert not kept.exists() or kept.read_bytes() != b"x"


def test_nan_is_not_written(net, cli, tmp_path):
    run = cli("prune", "net.py:diverged", *PRUNE, "--ignore", "head", "--out", "small")
    assert run.code == 1 and "NaN" in run.err
    assert not (tmp_path / "small").exists()


def test_why_of_something_unknown(net, cli):
    run = cli("inspect", "net.py:make", "--input", SIZE, "--why", "conv11")
    assert run.code == 2 and "did you mean 'conv1'?" in run.err


def test_a_plan_of_a_module_is_none_of_a_file(onnx_file, cli, tmp_path):
    assert cli("prune", "net.py:make", *PRUNE, "--out", "small").code == 0
    run = cli("plan", "apply", "small/plan", "dense.onnx", "--out", "cut.onnx")
    assert run.code == 1 and run.err.count("\n") == 1 and "was made for the torch module" in run.err
    assert not (tmp_path / "cut.onnx").exists()


def test_an_onnx_file_that_is_none(net, cli, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(np.arange(40, dtype=np.uint8).tobytes())
    run = cli("prune", "bad.onnx", "--method", "spa_l1", "--out", "x.onnx")
    assert run.code == 1 and "bad.onnx is not an ONNX model" in run.err and not (tmp_path / "x.onnx").exists()
