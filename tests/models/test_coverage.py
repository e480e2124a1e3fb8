"""How much of the blocks a method reaches: counted, reported, and refused where it is less than half."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import secateur as sc
from families import FAMILY_CONFIGS, make_tiny
from secateur.cli.running import run as run_cli
from secateur.errors import UsageError
from secateur.models.opening import open_source
from secateur.models.sources import CheckpointSource
from secateur.provenance import Coverage, LeftAlone
from secateur.recipes import make_recipe

_SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MIXTURES: dict[str, dict[str, Any]] = {
    "MixtralConfig": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "OlmoeConfig": {"num_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoeConfig": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3MoeConfig": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "Qwen2MoeConfig": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "DeepseekV3Config": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, **_LATENT,
    },
    "MambaConfig": {},
}  # fmt: skip


def make(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**_SIZES, **MIXTURES[name]})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral") / "model"
    make("MixtralConfig").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MIXTURES)
def test_the_share_is_that_of_linear_weights_among_all_that_are_no_vectors(name):
    model = make(name)
    blocks = model.base_model.layers
    linear = sum(m.weight.numel() for m in blocks.modules() if isinstance(m, nn.Linear))
    weights = sum(p.numel() for p in blocks.parameters() if p.dim() > 1)

    coverage = sc.anatomy(model).coverage

    assert coverage is not None
    assert (coverage.reached, coverage.weights) == (linear, weights)
    assert sum(item.params for item in coverage.left_alone) == weights - linear
    named = [n for n, p in blocks.named_parameters() if p.dim() > 1]
    linear_names = [f"{n}.weight" for n, m in blocks.named_modules() if isinstance(m, nn.Linear)]
    assert sum(item.count for item in coverage.left_alone) == len(set(named) - set(linear_names))


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_nothing_is_left_alone_in_the_families_that_are_known(family):
    assert sc.anatomy(make_tiny(family)).coverage is None


def test_kinds_of_what_is_left_alone():
    kinds = {item.pattern: item.kind for name in ("MixtralConfig", "MambaConfig")
             for item in sc.anatomy(make(name)).left_alone}  # fmt: skip
    assert kinds == {
        "layers.*.mlp.experts.gate_up_proj": "fused expert tensors",
        "layers.*.mlp.experts.down_proj": "fused expert tensors",
        "layers.*.mlp.gate.weight": "matrices outside linear layers",
        "layers.*.mixer.conv1d.weight": "1-D convolutions",
        "layers.*.mixer.A_log": "matrices outside linear layers",
    }


def test_less_than_half_is_refused_before_any_text_is_read():
    said = (
        "wanda reaches 14 % of the block weights; left alone: 6 fused expert tensors "
        "(layers.*.mlp.experts.gate_up_proj, layers.*.mlp.experts.down_proj), "
    )
    # neither a tokenizer nor a text: what is refused first is the model
    with pytest.raises(UsageError, match=re.escape(said) + ".*--partial"):
        sc.plan(make("MixtralConfig"), None, method="wanda", sparsity=0.5)


def test_a_partial_plan_holds_what_was_left_alone(tmp_path):
    model = make("MixtralConfig")
    result = sc.prune(model, None, method="magnitude", sparsity=0.5, partial=True)

    result.plan.save(tmp_path / "plan")
    coverage = type(result.plan).load(tmp_path / "plan").coverage

    assert coverage == result.plan.coverage == sc.anatomy(model).coverage
    assert coverage is not None
    zeros = sum(int((p == 0).sum()) for p in result.model.base_model.layers.parameters() if p.dim() > 1)
    assert result.report.of_all == pytest.approx(zeros / coverage.weights)
    assert "50.0 % of what it reaches is gone, 7.1 % of all block weights" in result.report.reach
    from secateur.report.tables import plan_text

    assert "reaches 14 % of the block weights" in " ".join(plan_text(result.plan).split())


def test_more_than_half_passes_and_is_reported():
    result = sc.prune(make("MambaConfig"), None, method="magnitude", sparsity=0.5)
    assert result.plan.coverage is not None
    assert 0.5 <= result.plan.coverage.share < 1
    assert result.report.reach


def test_nothing_is_written_where_nothing_is_left_alone(tmp_path):
    plan = sc.plan(make_tiny("llama"), None, method="magnitude", sparsity=0.5)
    plan.save(tmp_path / "plan")
    assert plan.coverage is None
    assert "coverage" not in (tmp_path / "plan" / "plan.json").read_text()


def test_whole_blocks_take_their_experts_along():
    from secateur.methods import check_reach, make_method

    check_reach(make_method("shortgpt"), sc.anatomy(make("MixtralConfig")), partial=False)


@pytest.mark.parametrize("command", ["prune --dry-run", "estimate", "prune --out {out}"])
def test_commands_refuse_with_exit_code_2_and_leave_nothing_behind(mixtral, tmp_path, capsys, command):
    words = command.format(out=tmp_path / "out").split()
    status = run_cli([words[0], str(mixtral), "--method", "magnitude", "--sparsity", "0.5", *words[1:]])

    assert status == 2
    assert "magnitude reaches 14 % of the block weights; left alone: 6 fused expert" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_partial_run_gives_the_plan_of_the_model_in_memory(mixtral, tmp_path, capsys):
    out = tmp_path / "out"
    status = run_cli(
        ["prune", str(mixtral), "--method", "magnitude", "--sparsity", "0.5", "--partial", "--out", str(out),
         "--no-measure", "--no-report", "--quiet"]
    )  # fmt: skip
    assert status == 0
    assert "7.1 % of all block weights" in capsys.readouterr().out
    model, _ = sc.load(mixtral)
    from secateur.plans import Plan, find_plans

    streamed = Plan.load(find_plans(out)[0])
    assert streamed.coverage == sc.plan(model, None, method="magnitude", sparsity=0.5, partial=True).coverage


@pytest.mark.parametrize("name", ["GraniteMoeConfig", "MambaConfig"])
def test_a_checkpoint_read_block_by_block_is_counted_as_the_model_in_memory(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "model")
    source, _ = open_source(tmp_path / "model")
    source.close()
    assert isinstance(source, CheckpointSource)
    assert sc.anatomy(source.model).coverage == sc.anatomy(model).coverage


def test_inspect_counts_what_lies_in_no_matrix(mixtral, capsys):
    assert run_cli(["inspect", str(mixtral), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["coverage"]
    assert found["weights"] - found["reached"] == sum(item["params"] for item in found["left_alone"])
    assert run_cli(["inspect", str(mixtral)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "left alone: 6 fused expert tensors" in text


def test_recipes_have_the_key_and_old_settings_stay_the_same():
    step = {"method": "magnitude", "sparsity": 0.5}
    plain, partial = (make_recipe({"steps": [{**step, **more}]}, "here") for more in ({}, {"partial": True}))
    anatomy = sc.anatomy(make("MixtralConfig"))

    with pytest.raises(UsageError, match="--partial"):
        plain.check_reach(anatomy)
    partial.check_reach(anatomy)
    assert "partial" not in plain.model_dump()["steps"][0]
    assert partial.model_dump()["steps"][0]["partial"] is True


@pytest.mark.parametrize(("reached", "shown"), [(0, "0 %"), (1, "0.1 %"), (110, "11 %"), (999, "99.9 %")])
def test_a_share_is_never_rounded_to_all_or_nothing(reached, shown):
    rest = LeftAlone(pattern="layers.*.x", kind="stacked matrices", count=1, params=1000 - reached)
    assert f"reaches {shown} of" in Coverage(weights=1000, reached=reached, left_alone=(rest,)).sentence
