"""The DeciLM layout, read back the way vLLM's and SGLang's ``nemotron_nas`` read it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaForCausalLM

import secateur as sc
from families import make_tiny, tiny_ids
from hand_cut import ragged, tiny, without_sub_layers
from runs import plan_for
from secateur.errors import OutputError, UnsupportedModelError
from secateur.manifest import read_manifest
from secateur.models.sources import Source
from secateur.runtimes.deci import write_deci
from sublayers import plan_without

IDS = torch.tensor([[3, 41, 5, 92, 65, 35, 8, 83]])


def as_vllm_builds_it(folder: Path, *, widths_from_multipliers: bool = False) -> LlamaForCausalLM:
    """A Llama whose layers are made from ``block_configs``, and the weights loaded into it, none left over."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.model_type == "nemotron-nas" and config.architectures == ["DeciLMForCausalLM"]
    assert len(config.block_configs) == config.num_hidden_layers
    model = LlamaForCausalLM(config)
    for layer, block in zip(model.model.layers, config.block_configs, strict=True):
        attention, ffn = block.attention, block.ffn
        if not attention.no_op:
            kv_heads = config.num_attention_heads // attention.n_heads_in_group
            _resize(layer.self_attn, ("k_proj", "v_proj"), rows=kv_heads * config.head_dim)
            layer.self_attn.num_key_value_groups = attention.n_heads_in_group
        if ffn.no_op:
            layer.mlp = layer.post_attention_layernorm = None
            continue
        assert hasattr(ffn, "ffn_mult") is widths_from_multipliers
        width = _rounded(ffn.ffn_mult, config.hidden_size) if widths_from_multipliers else ffn.intermediate_size
        _resize(layer.mlp, ("gate_proj", "up_proj"), rows=width)
        _resize(layer.mlp, ("down_proj",), columns=width)
    weights = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model.eval()


def _rounded(ffn_mult: float, hidden: int) -> int:
    width = int(2 * ffn_mult * hidden / 3)
    return width if width % 256 == 0 else width + 256 - width % 256


def _resize(module: nn.Module, names: tuple[str, ...], *, rows: int | None = None, columns: int | None = None) -> None:
    for name in names:
        old = getattr(module, name)
        setattr(module, name, nn.Linear(columns or old.in_features, rows or old.out_features, old.bias is not None))


def agree(model, other) -> None:
    with torch.no_grad():
        torch.testing.assert_close(other(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "qwen2"])
@pytest.mark.parametrize("bias", [True, False])
def test_widths_that_differ_per_layer(family: str, bias: bool, tmp_path: Path, tiny_tokenizer) -> None:
    model = make_tiny(family)
    options = {"sparsity": 0.3, "structure": "AL-MM", "remove_heads": 0, "bias": bias}
    pruned = sc.apply(plan_for("flap", model, tiny_ids(), **options), model)
    # chat models name a second end of text here alone
    pruned.generation_config.eos_token_id = [2, 7]
    out = sc.convert(sc.save(pruned, tiny_tokenizer, tmp_path / "pruned"), tmp_path / "out", to="deci")
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 7]
    made = as_vllm_builds_it(out)
    widths = [layer.mlp.down_proj.in_features for layer in made.model.layers]
    assert widths == [layer.mlp.down_proj.in_features for layer in pruned.model.layers] and len(set(widths)) > 1
    agree(pruned, made)
    assert AutoTokenizer.from_pretrained(out).vocab_size == tiny_tokenizer.vocab_size
    assert "configuration_decilm.py" in read_manifest(out)


def test_multiples_of_256_are_multipliers_which_all_readers_take(tmp_path: Path) -> None:
    model = tiny("llama", intermediate_size=768)
    for layer, width in zip(model.model.layers, (256, 768, 512), strict=True):
        for name in ("gate_proj", "up_proj"):
            getattr(layer.mlp, name).weight = nn.Parameter(getattr(layer.mlp, name).weight[:width].detach())
        layer.mlp.down_proj.weight = nn.Parameter(layer.mlp.down_proj.weight[:, :width].detach())
    write_deci(Source(model), None, tmp_path, "auto")
    made = as_vllm_builds_it(tmp_path, widths_from_multipliers=True)
    assert [layer.mlp.down_proj.in_features for layer in made.model.layers] == [256, 768, 512]
    agree(model, made)


def test_missing_sub_layers_are_no_ops(tmp_path: Path) -> None:
    model, _ = without_sub_layers()
    write_deci(Source(model), None, tmp_path, "auto")
    blocks = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).block_configs
    assert [block.attention.no_op for block in blocks] == [False, True, False, True, False, True]
    assert [block.ffn.no_op for block in blocks] == [False, False, True, True, False, True]
    parts = {"self_attn": "attention", "input_layernorm": "attention", "mlp": "ffn", "post_attention_layernorm": "ffn"}
    for name in load_file(tmp_path / "model.safetensors"):
        if name.startswith("model.layers."):
            _, _, layer, part, *_ = name.split(".")
            assert not getattr(blocks[int(layer)], parts[part]).no_op, name


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias"])
def test_sub_layers_that_a_plan_removes_are_no_ops(family: str, tmp_path: Path) -> None:
    model = make_tiny(family)
    cut = sc.apply(plan_without(model, ["layers.1.attention", "layers.2.mlp"]), model)
    out = sc.convert(sc.save(cut, None, tmp_path / "cut"), tmp_path / "out", to="deci")
    blocks = AutoConfig.from_pretrained(out, trust_remote_code=True).block_configs
    assert [block.attention.no_op for block in blocks] == [False, True, False]
    assert [block.ffn.no_op for block in blocks] == [False, False, True]
    stored, kept = load_file(out / "model.safetensors"), dict(cut.named_parameters())
    assert all(torch.equal(stored[name], kept[name]) for name in stored)
    assert {name for name in kept if "layernorm" not in name} - {"lm_head.weight"} <= set(stored)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ragged("llama"), r"would need numbers of query heads per layer \(here 2 to 6\) in their DeciLM model"),
        (lambda: tiny("qwen3"), r"would need another block than that of a Llama \(llama, mistral, qwen2\)"),
        (lambda: make_tiny("mistral"), "would need sliding windows"),
    ],
    ids=["heads", "family", "window"],
)
def test_what_the_layout_lacks_is_said(make, sentence: str, tmp_path: Path) -> None:
    saved = sc.save(make(), None, tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=sentence):
        sc.convert(saved, tmp_path / "out", to="deci")
    assert not (tmp_path / "out").exists()


def test_existing_output(cli, tmp_path: Path) -> None:
    saved = sc.save(tiny("llama"), None, tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputError, match="exists and is not empty"):
        sc.convert(saved, tmp_path / "out", to="deci")
    run = cli("convert", saved, "--to", "deci", "--out", tmp_path / "out", "--overwrite")
    assert run.code == 0 and f"vllm serve {tmp_path / 'out'} --trust-remote-code" in run.out
    assert not (tmp_path / "out" / "mine").exists()
