"""Checkpoints of cut models, loaded where secateur is not installed, and natively where it is."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from hand_cut import cut_llama, ragged, slice_linear, tiny
from secateur.models.layout import is_stock, layout_of, native_config, plain
from secateur.models.loading import load_model, quiet
from secateur.models.modeling_secateur import adopt, dense_config
from secateur.models.saving import save_model

TOKENS = torch.tensor([[3, 1, 4, 15, 9, 26, 5, 35]])

# runs with `python -I`: no PYTHONPATH, no current folder, so only installed packages
OUTSIDE = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
sys.modules["secateur"] = None
tokens, found = torch.tensor(json.loads(sys.argv[2])), {}
for folder in Path(sys.argv[1]).iterdir():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(tokens).logits
        cached = model.generate(tokens, max_new_tokens=6, do_sample=False)
        uncached = model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=False)
        model.save_pretrained(folder / "again")
        second = AutoModelForCausalLM.from_pretrained(folder / "again", trust_remote_code=True)(tokens).logits
    found[folder.name] = {
        "class": type(model).__name__,
        "logits": logits.tolist(),
        "cached": cached.tolist(),
        "uncached": uncached.tolist(),
        "second": second.tolist(),
    }
print(json.dumps(found))
"""


def checkerboard(model: PreTrainedModel) -> PreTrainedModel:
    """Half of every matrix set to zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter[:, ::2] = 0
    return model


def five_heads() -> PreTrainedModel:
    """A uniform Llama with 5 heads and hidden size 48, which its config class refuses to load."""
    model = tiny("llama", num_attention_heads=6, num_key_value_heads=6)
    for layer in model.model.layers:
        attention = layer.self_attn
        for module in (attention.q_proj, attention.k_proj, attention.v_proj):
            slice_linear(module, rows=slice(40))
        slice_linear(attention.o_proj, columns=slice(40))
    model.config.num_attention_heads = model.config.num_key_value_heads = 5
    return model


def renamed() -> PreTrainedModel:
    """GPT-NeoX, whose head has another name in published checkpoints; its first layer loses neurons."""
    model = tiny("gpt_neox")
    mlp = model.gpt_neox.layers[0].mlp
    slice_linear(mlp.dense_h_to_4h, rows=slice(24))
    slice_linear(mlp.dense_4h_to_h, columns=slice(24))
    config = dense_config(model.config)
    config.per_layer_config = {0: {"intermediate_size": 24}}
    adopt(model, config)
    return model


MODELS = {
    "gpt-neox": renamed,
    "llama": lambda: ragged("llama"),
    "phi3": lambda: ragged("phi3"),
    "gpt2": lambda: ragged("gpt2"),
    "llama-packed": lambda: checkerboard(ragged("llama")),
    "gpt2-packed": lambda: checkerboard(ragged("gpt2")),
    "plain-packed": lambda: checkerboard(tiny("llama")),
    "bias-only": lambda: cut_llama(tiny("llama"), [[0, 1, 2]] * 3, neurons=40),
    "five-heads": five_heads,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for name, build in MODELS.items():
        save_model(build(), None, folder / name, format="packed" if name.endswith("packed") else "dense")
    return folder


@pytest.fixture(scope="module")
def outside(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without secateur makes of the folders; one process, since each start costs seconds."""
    copied = tmp_path_factory.mktemp("outside")
    shutil.copytree(saved, copied / "models")
    environment = {"HF_HOME": str(copied / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-I", "-c", OUTSIDE, str(copied / "models"), json.dumps(TOKENS.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", MODELS)
def test_loads_without_secateur(name: str, outside: dict[str, Any]) -> None:
    model, found = MODELS[name](), outside[name]
    assert found["class"] == f"Pruned{type(model).__name__}"
    torch.testing.assert_close(torch.tensor(found["logits"]), logits_of(model), atol=1e-5, rtol=0)
    generated = model.generate(TOKENS, max_new_tokens=6, do_sample=False)
    assert found["cached"] == found["uncached"] == generated.tolist()
    assert found["second"] == found["logits"]


@pytest.mark.parametrize("name", MODELS)
def test_loads_natively(name: str, saved: Path, tmp_path: Path) -> None:
    model = MODELS[name]()
    loaded, tokenizer = load_model(saved / name)
    assert tokenizer is None
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-6, rtol=0)
    assert layout_of(loaded) == layout_of(model)
    # and it is as good as new: it can be saved again
    format = "packed" if name.endswith("packed") else "dense"
    save_model(loaded, None, tmp_path / "again", format=format)
    assert (tmp_path / "again" / "config.json").read_text() == (saved / name / "config.json").read_text()


@pytest.mark.parametrize("name", MODELS)
def test_stock_transformers_refuses_without_remote_code(name: str, saved: Path) -> None:
    with quiet(), pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(saved / name)


def test_cache_has_different_head_counts() -> None:
    model = ragged("llama")
    with torch.no_grad():
        cache = model(TOKENS, use_cache=True).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == [2, 1, 3]


def test_layout_lists_only_differences() -> None:
    layout = layout_of(ragged("llama"))
    assert layout["base"] == "LlamaForCausalLM"
    assert layout["modules"]["layers.1.self_attn.o_proj"] == {"shape": [48, 16], "bias": True}
    # the third layer keeps all its heads, so only its new bias is news
    assert "layers.2.self_attn.q_proj" not in layout["modules"]
    assert layout["modules"]["layers.2.self_attn.o_proj"] == {"shape": [48, 48], "bias": True}
    assert layout["parameters"] == {}
    assert layout_of(ragged("phi3"))["attributes"]["layers.1.self_attn"] == {"num_key_value_heads": 1}
    assert layout_of(ragged("gpt2"))["attributes"]["h.1.attn"] == {"num_heads": 1, "split_size": 8}
    assert is_stock(layout_of(tiny("llama")))


def test_norm_sizes_are_part_of_the_layout(tmp_path: Path) -> None:
    model = tiny("olmo2", num_key_value_heads=6)
    for layer in model.model.layers:  # one head fewer, which its query and key norms feel
        attention = layer.self_attn
        for module in (attention.q_proj, attention.k_proj, attention.v_proj):
            slice_linear(module, rows=slice(40))
        slice_linear(attention.o_proj, columns=slice(40))
        for name in ("q_norm", "k_norm"):
            norm = getattr(attention, name)
            norm.weight = torch.nn.Parameter(norm.weight.data[:40])
    assert layout_of(model)["parameters"]["layers.0.self_attn.q_norm.weight"] == 40
    save_model(model, None, tmp_path / "out")
    loaded, _ = load_model(tmp_path / "out")
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-6, rtol=0)


def test_plain() -> None:
    assert plain(tiny("llama"))
    assert not plain(ragged("llama"))
    uniform = cut_llama(tiny("llama"), [[0, 1]] * 3, neurons=24, bias=False)
    uniform.config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24})
    assert plain(uniform)
    # 48 is not a multiple of 5: the config class of Llama refuses that, whatever head_dim says
    refused = tiny("llama")
    refused.config.num_attention_heads = 5
    assert not plain(refused)


def test_global_sizes_come_back(saved: Path) -> None:
    assert load_model(saved / "bias-only")[0].config.intermediate_size == 40
    assert load_model(saved / "five-heads")[0].config.num_attention_heads == 5
    assert not load_model(saved / "five-heads")[0].config.is_heterogeneous


def test_serving_engines_can_build_it_on_the_meta_device(saved: Path) -> None:
    """What vLLM's Transformers backend does: sizes per layer off the config, and AutoModel.from_config."""
    model = ragged("llama")
    config = AutoConfig.from_pretrained(saved / "llama", trust_remote_code=True)
    layers = [config.per_layer_config[i] for i in range(config.num_hidden_layers)]
    assert [layer.num_key_value_heads for layer in layers] == [2, 1, 3]
    assert [layer.num_attention_heads for layer in layers] == [4, 2, 6]
    assert {layer.intermediate_size for layer in layers} == {24}
    assert {layer.head_dim for layer in layers} == {8}
    assert config.architectures == ["PrunedLlamaForCausalLM"]
    with quiet(), torch.device("meta"):
        base = AutoModel.from_config(config, trust_remote_code=True)
    shapes = {name: parameter.shape for name, parameter in base.named_parameters()}
    assert all(parameter.is_meta for parameter in base.parameters())
    assert shapes == {name: parameter.shape for name, parameter in model.model.named_parameters()}
    assert type(base)._can_set_attn_implementation()


def test_layers_follow_the_config_of_the_model() -> None:
    model = ragged("phi3")
    attention = model.model.layers[1].self_attn
    assert (attention.config.num_attention_heads, attention.config.num_key_value_heads) == (2, 1)
    before = logits_of(model)
    model.set_attn_implementation("eager")
    assert attention.config._attn_implementation == "eager"
    torch.testing.assert_close(logits_of(model), before, atol=1e-5, rtol=0)
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("sdpa")
    assert twin.model.layers[1].self_attn.config._attn_implementation == "sdpa"
    assert attention.config._attn_implementation == "eager"


def test_native_config_keeps_only_what_differs(saved: Path) -> None:
    model = ragged("llama")
    config = native_config(AutoConfig.from_pretrained(saved / "llama"))
    assert not hasattr(config, "secateur") and not hasattr(config, "auto_map")
    assert config.to_dict()["per_layer_config"] == model.config.to_dict()["per_layer_config"]


def test_tied_embeddings_and_dtype(tmp_path: Path) -> None:
    keep = [[0, 2], [0, 2], [0, 2]]
    model = cut_llama(tiny("llama", tie_word_embeddings=True), keep, neurons=24).to(torch.bfloat16)
    model.config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24})
    save_model(model, None, tmp_path / "out", format="packed")
    loaded, _ = load_model(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
