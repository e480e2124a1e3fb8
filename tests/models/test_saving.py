"""What is in a saved folder, what is refused, and that nothing is left behind."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hand_cut import cut_llama, ragged, tiny
from secateur.errors import NonFiniteError, OutputError, UsageError
from secateur.models.loading import load_model, quiet
from secateur.models.saving import save_model
from secateur.plans import Plan
from secateur.provenance import CalibrationInfo, Fingerprint, Provenance
from secateur.report.report import Metric, Report

TOKENS = torch.tensor([[3, 1, 4, 15, 9]])


@pytest.fixture
def plan() -> Plan:
    provenance = Provenance(
        method="flap",
        options={"sparsity": 0.2},
        model=Fingerprint(architecture="LlamaForCausalLM", shapes="s", weights="w", num_layers=3, name="org/tiny"),
        calibration=CalibrationInfo(source="builtin", samples=64, length=512, tokens=32768, seed=7, sha256="0"),
        seed=7,
    )
    return Plan(provenance=(provenance,), groups={"layers.0.mlp": 4}, keep={"layers.0.mlp": torch.tensor([0, 2])})


@pytest.fixture
def report() -> Report:
    metrics = [
        Metric("perplexity", "", {"dense": 25.0, "pruned": 30.0}, False, "built-in text, 40 windows of 512"),
        Metric("parameters", "", {"dense": 1000.0, "pruned": 800.0}),
    ]
    return Report("tiny", "flap", {"sparsity": 0.2}, "20 %", 0.2, metrics=metrics)


def test_plain_checkpoint_is_complete(tmp_path: Path, plan: Plan, report: Report, tiny_tokenizer) -> None:
    model = tiny("llama")
    model.generation_config = GenerationConfig(eos_token_id=2, max_new_tokens=17)
    folder = save_model(model, tiny_tokenizer, tmp_path / "out", plan=plan, report=report)
    assert folder == tmp_path / "out"
    assert {path.name for path in folder.iterdir()} >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "plan",
        "report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not (folder / "modeling_secateur.py").exists()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "secateur" not in config and "auto_map" not in config
    assert not Plan.load(folder / "plan").diff(plan)
    assert json.loads((folder / "report.json").read_text())["achieved"] == 0.2
    with quiet(), torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(stock(TOKENS).logits, model(TOKENS).logits)
    assert stock.generation_config.max_new_tokens == 17
    text = "the tokenizer gives the same ids"
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]


def test_model_card(tmp_path: Path, plan: Plan, report: Report) -> None:
    save_model(tiny("llama"), None, tmp_path / "plain", plan=plan, report=report)
    card = (tmp_path / "plain" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and front["base_model"] == "org/tiny"
    assert front["tags"] == ["secateur", "pruned", "flap"]
    assert "| Calibration | 64 × 512 tokens of `builtin`, seed 7 |" in card
    assert "| Removed | 20.0% (asked for: 20 %) |" in card
    assert "| perplexity | 25 | 30 | +20.0% |" in card
    assert "| parameters | 1,000 | 800 | -20.0% |" in card
    assert "trust_remote_code" not in card
    save_model(ragged("llama"), None, tmp_path / "ragged")
    card = (tmp_path / "ragged" / "README.md").read_text()
    assert 'from_pretrained("ragged", trust_remote_code=True)' in card and "flap" not in card


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_model_in_memory_stays_as_it_is(format: str, tmp_path: Path) -> None:
    model = ragged("llama")
    config, before = model.config, model.config.to_json_string(use_diff=False)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, None, tmp_path / "out", format=format)
    assert model.config is config and model.model.config is config
    assert model.config.to_json_string(use_diff=False) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_uniform_cut_is_plain_for_stock_transformers(tmp_path: Path) -> None:
    model = cut_llama(tiny("llama"), [[0, 1], [1, 2], [0, 2]], neurons=24, bias=False)
    model.config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24})
    save_model(model, None, tmp_path / "out")
    with quiet(), torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(stock(TOKENS).logits, model(TOKENS).logits)


def test_remote_class_saves_a_plain_model_plainly(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, 1:] = 0
    save_model(model, None, tmp_path / "packed", format="packed")
    with quiet():
        remote = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", trust_remote_code=True)
    save_model(remote, None, tmp_path / "dense")
    assert not (tmp_path / "dense" / "modeling_secateur.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    with quiet(), torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        assert torch.equal(stock(TOKENS).logits, model(TOKENS).logits)


def test_existing_folder_needs_overwrite(tmp_path: Path) -> None:
    model = tiny("llama")
    save_model(model, None, tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="exists and is not empty"):
        save_model(model, None, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").exists()
    save_model(model, None, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine.txt").exists()
    load_model(tmp_path / "out")


def test_a_kill_in_the_middle_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    save_model(tiny("llama"), None, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    # killed between the two renames: the old folder is aside, and the new one hasn't its name yet
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(OutputError, match="exists and is not empty"):
        save_model(tiny("llama", seed=1), None, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_full_disk_leaves_nothing(overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    if overwrite:
        save_model(model, None, tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OutputError, match=r"out: No space left on device; nothing was left behind$"):
        save_model(model, None, tmp_path / "out", overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


def test_disk_full_inside_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OutputError, match="No space left on device"):
        save_model(tiny("llama"), None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"^model\.layers\.1\.mlp\.down_proj\.weight: 1 of 1920 weights are NaN"):
        save_model(model, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'packed'"):
        save_model(tiny("llama"), None, tmp_path / "out", format="pakced")
