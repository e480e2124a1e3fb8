"""What a checkpoint says of itself is checked, and each kind of damage is named by the check that it concerns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import nn

import secateur as sc
from families import make_tiny, tiny_ids
from runs import plan_for
from secateur.errors import ModelLoadError
from secateur.manifest import write_manifest
from secateur.structure.onnx import load_onnx, save_onnx
from secateur.tensorfiles import Stored

IDS = tiny_ids()
GATE = "model.layers.1.mlp.gate_proj.weight"


def build(
    folder: Path, *steps: tuple[str, dict[str, Any]], family: str = "llama", format: str = "dense", merge: bool = False
) -> Path:
    """``folder/base`` and ``folder/out``, the same after these steps; ``merge`` makes one plan of two on the base."""
    model = make_tiny(family)
    sc.save(model, None, folder / "base")
    plans, current = [], model
    for method, options in steps:
        plans.append(plan_for(method, model if merge else current, IDS, **options))
        if not merge:
            current = sc.apply(plans[-1], current)
    if merge:
        plans = [plans[0].merge(plans[1])]
        current = sc.apply(plans[0], model)
    return sc.save(current, None, folder / "out", plan=plans, format=format)


WANDA, SPARSEGPT = ("wanda", {"pattern": "2:4"}), ("sparsegpt", {"sparsity": 0.5})
MAGNITUDE, FLAP = ("magnitude", {"sparsity": 0.6}), ("flap", {"sparsity": 0.4})
HEADS, BLOCKS = ("random_sp", {"sparsity": 0.4}), ("shortgpt", {"layers": 1})
SUBLAYERS = ("blockpruner", {"sublayers": 3})
QUERIES = ("wanda_sp", {"sparsity": 0.3, "heads": "query"})


def problems(folder: Path, base: Path | None = None) -> dict[str, list[str]]:
    """The sentences of every check that failed."""
    found = {finding.check: finding.problems for finding in sc.verify(folder, base) if not finding.ok}
    assert all("\n" not in sentence for sentences in found.values() for sentence in sentences)
    return found


def status(folder: Path, base: Path | None = None) -> dict[str, str]:
    return {finding.check: finding.status for finding in sc.verify(folder, base)}


CHAINS = {
    "wanda": [WANDA],
    "sparsegpt": [SPARSEGPT],
    "flap": [FLAP],
    "flap, refitted": [("flap", {"sparsity": 0.3, "heal": "refit"})],
    "sparsegpt then magnitude": [SPARSEGPT, MAGNITUDE],
    "osscar then magnitude": [("osscar", {"sparsity": 0.3}), MAGNITUDE],
    "blocks": [BLOCKS],
    "queries": [QUERIES],
    "sub-layers": [SUBLAYERS],
    "wanda then sub-layers": [WANDA, SUBLAYERS],
    "sub-layers then heads": [SUBLAYERS, HEADS],
    "flap then magnitude": [FLAP, MAGNITUDE],
    "wanda then heads": [WANDA, HEADS],
    "sparsegpt then heads": [SPARSEGPT, HEADS],
    "wanda then blocks": [WANDA, BLOCKS],
    "blocks then wanda": [BLOCKS, WANDA],
    "blocks then flap": [BLOCKS, FLAP],
    "wanda then sparsegpt": [WANDA, SPARSEGPT],
    "heads then heads": [HEADS, ("random_sp", {"sparsity": 0.3})],
    "heads then queries": [HEADS, QUERIES],
    "wanda, heads, blocks": [WANDA, HEADS, BLOCKS],
}


@pytest.mark.parametrize("format", ["dense", "packed"])
@pytest.mark.parametrize("chain", CHAINS)
def test_what_was_saved_is_verified(chain: str, format: str, tmp_path: Path) -> None:
    folder = build(tmp_path, *CHAINS[chain], format=format)
    assert problems(folder) == {}
    found = status(folder, tmp_path / "base")
    masks = [method in ("wanda", "sparsegpt", "magnitude") for method, _ in CHAINS[chain]]
    # new values of columns that stay come with a mask
    refits = any("heal" in options or method == "osscar" for method, options in CHAINS[chain])
    assert found == {
        **dict.fromkeys(("manifest", "headers", "shapes", "finite values", "plan", "base model"), "passed"),
        "units": "passed" if not all(masks) else "not checked",
        "zeros": "passed" if any(masks) or refits else "not checked",
    }


def test_a_merged_plan(tmp_path: Path) -> None:
    folder = build(tmp_path, WANDA, HEADS, merge=True)
    assert problems(folder, tmp_path / "base") == {}
    # masks are in the coordinates of the dense model, which alone says where they end up
    zeros = next(finding for finding in sc.verify(folder) if finding.check == "zeros")
    assert "were cut after masking and not checked" in zeros.detail or zeros.status == "not checked"


@pytest.mark.parametrize("family", ["gpt2", "phi3", "opt", "falcon", "llama-tied-bias", "gemma3"])
def test_other_families(family: str, tmp_path: Path) -> None:
    folder = build(tmp_path, WANDA, HEADS, family=family)
    assert problems(folder, tmp_path / "base") == {}


# -- damage -----------------------------------------------------------------------------------------------------------


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change tensors and bring the manifest in line, as somebody would who wants to hide it."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_manifest(folder)


def setting(name: str, entry: int, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[entry] = value

    return change


def entry(folder: Path, kept: bool) -> int:
    """The first entry of the gate of layer 1 that the last plan keeps, or removes."""
    plan = folder / "plan"
    mask = sc.Plan.load(plan if (plan / "plan.json").exists() else plan / "step-1").masks[GATE].flatten()
    return int((mask == kept).nonzero()[0])


def test_files_that_changed(tmp_path: Path) -> None:
    folder = build(tmp_path, FLAP)
    data = bytearray((folder / "plan" / "plan.json").read_bytes())
    data[-2] = ord(" ")
    (folder / "generation_config.json").unlink()
    (folder / "extra.txt").write_text("x")
    (folder / "README.md").write_text("shorter")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"use_cache": true', '"use_cache": fals'))
    assert problems(folder)["manifest"][:4] == [
        "generation_config.json is in the manifest and not in the folder",
        "extra.txt is in the folder and not in the manifest",
        next(p for p in problems(folder)["manifest"] if p.startswith("README.md has 7 bytes, the manifest says ")),
        "config.json has changed: its SHA-256 is not that of the manifest",
    ]


def test_a_folder_without_manifest_or_plan(tmp_path: Path) -> None:
    sc.save(make_tiny("llama"), None, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    assert status(tmp_path / "out", tmp_path / "out") == {
        **dict.fromkeys(("headers", "shapes", "finite values"), "passed"),
        **dict.fromkeys(("manifest", "plan", "base model", "units", "zeros"), "not checked"),
    }


@pytest.mark.parametrize("steps", [[WANDA], [WANDA, BLOCKS]])
def test_a_weight_that_should_be_zero(steps: list, tmp_path: Path) -> None:
    folder = build(tmp_path, *steps)
    # the block that leaves renumbers those behind it
    gone = [] if len(steps) == 1 else sc.Plan.load(folder / "plan" / "step-2").removed("layers").tolist()
    name = GATE if not gone or gone[0] > 1 else GATE.replace("1", "0", 1) if gone[0] == 0 else GATE
    removed = int((load_file(folder / "model.safetensors")[name].flatten() == 0).nonzero()[0])
    edit_weights(folder, setting(name, removed, 1e-30))
    (sentence,) = problems(folder).pop("zeros")
    assert sentence == f"{name}: 1 of 640 entries that the plan removes are not zero"


def test_a_weight_that_should_be_zero_under_a_later_cut(tmp_path: Path) -> None:
    folder = build(tmp_path, WANDA, HEADS)
    weight = load_file(folder / "model.safetensors")[GATE]
    edit_weights(folder, setting(GATE, int((weight.flatten() == 0).nonzero()[0]), 1.0))
    assert problems(folder) == {}
    (sentence,) = problems(folder, tmp_path / "base")["zeros"]
    assert sentence.startswith(f"{GATE}: 1 of ") and sentence.endswith(" entries that the plan removes are not zero")


def test_a_packed_weight_that_should_be_zero(tmp_path: Path) -> None:
    folder = build(tmp_path, WANDA, format="packed")

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        # another entry of the first byte is stored: as many ones, in another place
        byte = int(tensors[f"{GATE}.bitmap"][0])
        tensors[f"{GATE}.bitmap"][0] = ~byte & 0xFF

    edit_weights(folder, swap)
    (sentence,) = problems(folder)["zeros"]
    assert sentence == f"{GATE}: 4 of 640 entries that the plan removes are not zero"


def test_kept_values(tmp_path: Path) -> None:
    folder = build(tmp_path / "a", SPARSEGPT)
    edit_weights(folder, setting(GATE, entry(folder, True), 0.125))
    assert problems(folder) == {"zeros": [f"{GATE}: 1 of 640 entries that the plan keeps have another value"]}
    folder = build(tmp_path / "b", WANDA)
    edit_weights(folder, setting(GATE, entry(folder, True), 0.0))
    zeros = next(finding for finding in sc.verify(folder) if finding.check == "zeros")
    assert zeros.ok and "1 entries that it keeps are zero too" in zeros.detail
    assert problems(folder, tmp_path / "b" / "base") == {
        "zeros": [f"{GATE}: 1 of 640 entries that the plan keeps have another value"]
    }


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("format", ["dense", "packed"])
def test_values_that_are_not_finite(value: float, format: str, tmp_path: Path) -> None:
    folder = build(tmp_path, WANDA, format=format)
    name = f"{GATE}.values" if format == "packed" else "model.norm.weight"
    edit_weights(folder, setting(name, 3, value))
    (sentence,) = problems(folder)["finite values"]
    assert sentence.startswith(f"{name}: 1 of ") and sentence.endswith("weights are NaN or inf")


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(tmp_path, FLAP)
    monkeypatch.setattr("secateur.verification.weights._CHUNK_ENTRIES", 100)
    sizes = []
    real = Stored.read_flat
    monkeypatch.setattr(Stored, "read_flat", lambda self, first, n: sizes.append(n) or real(self, first, n))
    edit_weights(folder, setting(GATE, 333, float("inf")))
    sizes.clear()
    (sentence,) = problems(folder)["finite values"]
    assert sentence.startswith(f"{GATE}: 1 of")
    tensors = load_file(folder / "model.safetensors").values()
    # nothing but the plan and the finite check is read where no masks are
    assert sum(size <= 100 for size in sizes) >= sum(-(-t.numel() // 100) for t in tensors)


def test_shapes_and_units(tmp_path: Path) -> None:
    folder = build(tmp_path, HEADS)
    other = build(tmp_path / "other", ("random_sp", {"sparsity": 0.6}))
    shutil.rmtree(folder / "plan")
    shutil.copytree(other / "plan", folder / "plan")
    write_manifest(folder)
    found = problems(folder)
    assert list(found) == ["units"]
    assert "the plan leaves" in found["units"][0] and "the checkpoint has" in found["units"][0]
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(4)}))
    found = problems(folder)
    assert "model.norm.weight has shape [4], but config.json asks for [32]" in found["shapes"][0]
    assert status(folder)["units"] == status(folder)["zeros"] == "not checked"


def test_a_plan_for_fewer_blocks(tmp_path: Path) -> None:
    folder = build(tmp_path, BLOCKS)
    path = folder / "plan" / "plan.safetensors"
    save_file({**load_file(path), "keep/layers": torch.tensor([0])}, path)
    assert problems(folder)["units"] == ["the plan leaves 1 units of layers, the checkpoint has 2"]


def test_steps_that_do_not_follow(tmp_path: Path) -> None:
    folder = build(tmp_path, HEADS, ("random_sp", {"sparsity": 0.3}))
    (folder / "plan" / "step-1").rename(folder / "plan" / "step-3")
    assert "cuts layers.0." in problems(folder)["units"][0]


def test_the_base_model(tmp_path: Path) -> None:
    folder = build(tmp_path, WANDA)
    sc.save(make_tiny("llama", seed=1), None, tmp_path / "weights")
    sc.save(make_tiny("llama", intermediate_size=48), None, tmp_path / "shapes")
    sc.save(make_tiny("gpt2"), None, tmp_path / "gpt2")
    found = problems(folder, tmp_path / "weights")
    assert found["base model"] == ["the plan was made for other weights of the same shapes than those of weights"]
    for name in ("shapes", "gpt2"):
        (sentence,) = problems(folder, tmp_path / name)["base model"]
        assert sentence.endswith(f"{name} has other tensors or shapes")
    with pytest.raises(ModelLoadError, match="there is no config"):
        sc.verify(folder, tmp_path)


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
def test_a_damaged_plan(name: str, tmp_path: Path) -> None:
    folder = build(tmp_path, WANDA)
    (folder / "plan" / name).write_bytes((folder / "plan" / name).read_bytes()[:-9])
    found = problems(folder)
    assert set(found) == {"manifest", "plan"} and name in found["plan"][0]


def test_damaged_weights(tmp_path: Path) -> None:
    folder = build(tmp_path, WANDA)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    found = problems(folder)
    assert set(found) == {"manifest", "headers", "shapes"}
    assert "is corrupt or cut short" in found["headers"][0]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="there is no checkpoint folder at"):
        sc.verify(tmp_path / "none")


def test_many_problems_are_counted(tmp_path: Path) -> None:
    folder = build(tmp_path, FLAP)
    for number in range(30):
        (folder / f"extra-{number}").write_text("x")
    finding = sc.verify(folder)[0]
    assert len(finding.sentences()) == 21 and finding.sentences()[-1] == "10 more of this kind"


def test_command(cli, tmp_path: Path) -> None:
    folder = build(tmp_path, WANDA)
    run = cli("verify", folder, "--base", tmp_path / "base")
    assert run.code == 0 and "zeros" in run.out and "failed" not in run.out
    edit_weights(folder, setting(GATE, entry(folder, False), 1.0))
    run = cli("verify", folder)
    assert run.code == 1
    assert f"zeros: {GATE}: 1 of 640 entries that the plan removes are not zero" in run.out
    run = cli("verify", folder, "--json", "--quiet")
    document = json.loads(run.out)
    assert run.code == 1 and run.err == "" and not document["ok"]
    assert {check["check"]: check["status"] for check in document["checks"]}["zeros"] == "failed"
    run = cli("verify", tmp_path / "none")
    assert (run.code, run.err) == (1, f"error: there is no checkpoint folder at {tmp_path}/none\n")


# -- networks, which have no config.json ----------------------------------------------------------------------------


def a_network() -> tuple[nn.Module, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10)).eval()
    return net, (torch.randn(2, 3, 8, 8),)


@pytest.mark.parametrize("method", ["depgraph_l2", "preconfig"])
def test_a_network_is_sound(method: str, tmp_path: Path) -> None:
    net, inputs = a_network()
    plan = sc.plan(net, method=method, sparsity=0.3, example_inputs=inputs)
    folder = sc.save(sc.apply(plan, net), None, tmp_path / "net", plan=plan)
    assert not problems(folder)
    assert status(folder, Path("any")) == {
        "manifest": "passed", "headers": "passed", "shapes": "not checked", "finite values": "passed",
        "zeros": "not checked", "plan": "passed", "base model": "not checked",
    }  # fmt: skip
    edit_weights(folder, setting("3.weight", 0, torch.nan))
    assert set(problems(folder)) == {"finite values"}
    # without its manifest nobody can know that there never was a config.json
    (folder / "manifest.json").unlink()
    assert "there is no config.json" in problems(folder)["shapes"][0]


def test_a_graph_is_sound(tmp_path: Path) -> None:
    net, inputs = a_network()
    plan = sc.plan(net, method="depgraph_l2", sparsity=0.3, example_inputs=inputs)
    sc.save(net, None, tmp_path / "net.onnx", plan=plan)
    plan = sc.plan(str(tmp_path / "net.onnx"), method="depgraph_l2", sparsity=0.3)
    folder = sc.save(sc.apply(plan, str(tmp_path / "net.onnx")), None, tmp_path / "cut", plan=plan)
    assert not problems(folder)
    assert status(folder)["headers"] == status(folder)["finite values"] == "passed"
    graph = load_onnx(folder / "model.onnx")
    weights = graph.graph.initializer[0]
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights) * np.nan, weights.name))
    save_onnx(graph, folder / "model.onnx", overwrite=True)
    write_manifest(folder)
    assert set(problems(folder)) == {"finite values"}
    (folder / "model.onnx").write_bytes(b"no graph")
    assert set(problems(folder)) == {"manifest", "headers"}
