"""Any checkpoint as safetensors: the weights stay bit for bit, and a folder is never in memory as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import secateur as sc
from families import make_tiny, tiny_ids
from gguf_files import write_gguf
from hand_cut import ragged, tiny
from runs import plan_for
from secateur.errors import ModelLoadError, OutputError, SecateurError, UsageError
from secateur.manifest import read_manifest

TOKENS = torch.tensor([[3, 1, 4, 15, 9]])


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded as a whole."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the whole model was loaded")

    monkeypatch.setattr("secateur.models.loading.load_model", fail)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return set(first) == set(second) and all(
        t.dtype == second[n].dtype and torch.equal(t, second[n]) for n, t in first.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_and_back(tmp_path: Path, tiny_tokenizer, streamed: None, dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    plan = plan_for("magnitude", model.float(), tiny_ids(), sparsity=0.5)
    folder = sc.save(model.to(dtype), tiny_tokenizer, tmp_path / "in", plan=plan)
    out = sc.convert(folder, tmp_path / "out", max_shard_size="20KB")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    # a tensor that is larger than a shard has one of its own
    assert all(path.stat().st_size < 25_000 for path in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in files}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert same(weights(out), weights(folder))
    assert sc.Plan.load(out / "plan").method == "magnitude"
    assert set(read_manifest(out) or {}) >= {"config.json", "plan/plan.json", "tokenizer.json", files[0].name}
    again = sc.convert(out, tmp_path / "again")
    assert [path.name for path in again.glob("*.safetensors")] == ["model.safetensors"]
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (again / "config.json").read_text() == (folder / "config.json").read_text()


@pytest.mark.parametrize("make", [lambda: tiny("llama"), lambda: ragged("llama"), lambda: ragged("gpt2")])
def test_packed_and_back(tmp_path: Path, make, streamed: None) -> None:
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter[:, ::2] = 0
    dense = sc.save(model, None, tmp_path / "dense")
    packed = sc.save(model, None, tmp_path / "packed", format="packed")
    made = sc.convert(dense, tmp_path / "made", format="packed")
    # the same bytes as those that are written from memory
    assert (made / "model.safetensors").read_bytes() == (packed / "model.safetensors").read_bytes()
    assert (made / "config.json").read_text() == (packed / "config.json").read_text()
    assert (made / "modeling_secateur.py").exists()
    sharded = sc.convert(packed, tmp_path / "sharded", format="packed", max_shard_size="5KB")
    assert same(weights(sharded), weights(packed)) and len(list(sharded.glob("*.safetensors"))) > 3
    back = sc.convert(sharded, tmp_path / "back")
    assert (back / "model.safetensors").read_bytes() == (dense / "model.safetensors").read_bytes()
    assert (back / "config.json").read_text() == (dense / "config.json").read_text()
    assert (back / "modeling_secateur.py").exists() == (dense / "modeling_secateur.py").exists()


@pytest.mark.parametrize("family", ["phi3", "opt", "falcon", "gpt_neox", "gemma3", "llama-tied-bias"])
def test_families(tmp_path: Path, family: str) -> None:
    model = make_tiny(family)
    folder = sc.save(sc.apply(plan_for("wanda", model, tiny_ids(), pattern="2:4"), model), None, tmp_path / "in")
    first, second = (sc.load(f)[0] for f in (folder, sc.convert(folder, tmp_path / "out", format="packed")))
    assert same(first.state_dict(), second.state_dict())


def test_pickles(tmp_path: Path) -> None:
    model = tiny("llama")
    folder = sc.save(model, None, tmp_path / "in")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="only pickled ones"):
        sc.convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = sc.convert(folder, tmp_path / "out", allow_pickle=True)
    assert same(weights(out), model.state_dict())
    assert not list(out.glob("*.bin"))


def test_gguf(tmp_path: Path, tiny_tokenizer) -> None:
    model = tiny("llama", vocab_size=len(tiny_tokenizer))
    write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer)
    out = sc.convert(tmp_path / "tiny.gguf", tmp_path / "out", max_shard_size="50KB")
    loaded, tokenizer = sc.load(out)
    assert tokenizer is not None
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"format": "pakced"}, UsageError, "did you mean 'packed'"),
        (
            {"max_shard_size": "5 files"},
            UsageError,
            "number with a unit such as 5GB or 500MB, got '5 files'",
        ),
        ({"max_shard_size": "0GB"}, UsageError, "got '0GB'"),
        ({"max_shard_size": "-1GB"}, UsageError, "got '-1GB'"),
    ],
)
def test_wrong_requests(tmp_path: Path, options: dict, error: type[SecateurError], sentence: str) -> None:
    folder = sc.save(tiny("llama"), None, tmp_path / "in")
    with pytest.raises(error, match=sentence):
        sc.convert(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_existing_output_and_damaged_input(tmp_path: Path) -> None:
    folder = sc.save(tiny("llama"), None, tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputError, match="exists and is not empty"):
        sc.convert(folder, tmp_path / "out")
    sc.convert(folder, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(ModelLoadError, match="corrupt or cut short"):
        sc.convert(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_command(cli, tmp_path: Path) -> None:
    folder = sc.save(tiny("llama"), None, tmp_path / "in")
    run = cli("convert", folder, "--out", tmp_path / "out", "--max-shard-size", "20KB")
    assert run.code == 0 and f"saved to {tmp_path}/out" in run.out
    run = cli("convert", folder, "--out", tmp_path / "json", "--format", "packed", "--json", "--quiet")
    document = json.loads(run.out)
    assert document["files"] == ["model.safetensors"] and run.err == ""
    assert document["bytes"] == (tmp_path / "json" / "model.safetensors").stat().st_size
    run = cli("convert", folder, "--out", tmp_path / "bad", "--max-shard-size", "large")
    assert run.code == 2 and run.err.count("\n") == 1


@pytest.mark.parametrize("command", ["inspect", "evaluate", "prune", "plan apply"])
def test_commands_read_pickles_on_request(cli, tmp_path: Path, command: str) -> None:
    model = tiny("llama")
    plan_for("magnitude", model, tiny_ids(), sparsity=0.5).save(tmp_path / "plan")
    folder = sc.save(model, None, tmp_path / "in")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    arguments = {
        "inspect": [folder],
        "evaluate": [folder, "--task", "size", "--length", 32],
        "prune": [folder, "--method", "magnitude", "--out", tmp_path / "out", "--no-report", "--length", 32],
        "plan apply": [tmp_path / "plan", folder, "--out", tmp_path / "out"],
    }[command]
    run = cli(*command.split(), *arguments, "--quiet")
    assert run.code == 1 and "--allow-pickle" in run.err and run.err.count("\n") == 1
    run = cli(*command.split(), *arguments, "--quiet", "--allow-pickle")
    assert run.code == 0, run.err


def test_a_url_of_this_machine_and_one_of_a_store(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    cut = sc.save(tiny("llama"), None, tmp_path / "in")
    folder = sc.convert(cut, f"file://{tmp_path}/there")
    assert folder == tmp_path / "there" and (folder / "model.safetensors").is_file()
    assert sc.convert(cut, "memory://converted/model") == "memory://converted/model"
    assert "model.safetensors" in {Path(p).name for p in fsspec.filesystem("memory").find("/converted/model")}
