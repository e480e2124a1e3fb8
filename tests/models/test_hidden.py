"""Hidden channels leave everywhere at once, and what is left is a plain, narrower decoder."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur as sc
from families import FAMILY_CONFIGS, make_tiny, tiny_ids
from runs import plan_for
from secateur.errors import BudgetError, UnsupportedModelError
from secateur.structure import HIDDEN

IDS = tiny_ids()
FROZEN = {name for name in FAMILY_CONFIGS if sc.anatomy(make_tiny(name))[HIDDEN].frozen}
CUT = [name for name in FAMILY_CONFIGS if name not in FROZEN]
SIDES = ("o_proj", "down_proj")


def with_dead_channels(family: str, dead: torch.Tensor):
    """A tiny model in which nothing is ever written to some channels."""
    model = make_tiny(family)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, dead] = 0
        for name, parameter in model.named_parameters():
            if any(f".{side}." in name for side in SIDES):
                parameter[dead] = 0
    return model


@pytest.mark.parametrize("family", CUT)
def test_channels_that_hold_nothing_leave_and_the_rest_goes_on_as_before(family, tmp_path):
    width = make_tiny(family).config.hidden_size
    dead = torch.arange(3, width, 4)
    model = with_dead_channels(family, dead)
    plan = plan_for("minitron_hidden", model, IDS, sparsity=len(dead) / width)
    assert torch.equal(plan.removed(HIDDEN), dead)
    cut = sc.apply(plan, model)
    assert cut.config.hidden_size == width - len(dead)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, cut))
    assert before - after == len(dead) * sc.anatomy(model)[HIDDEN].cost.params
    cut.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock) is type(model) and torch.equal(stock(IDS).logits, cut(IDS).logits)
    # the norms now take the mean over fewer channels, which is the only difference
    ratio = width / (width - len(dead))
    with torch.no_grad():
        for name, norm in stock.named_modules():
            if hasattr(norm, "variance_epsilon") and not name.endswith(("q_norm", "k_norm")):
                norm.weight *= math.sqrt(ratio)
                norm.variance_epsilon *= ratio
        torch.testing.assert_close(stock(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_biases_of_as_many_neurons_as_there_are_channels_stay():
    model = make_tiny("llama-tied-bias", intermediate_size=32)
    cut = sc.apply(plan_for("minitron_hidden", model, IDS, sparsity=0.25), model)
    mlp = cut.model.layers[0].mlp
    assert (len(mlp.gate_proj.bias), len(mlp.up_proj.bias), len(mlp.down_proj.bias)) == (32, 32, 24)
    assert cut(IDS).logits.isfinite().all()


def test_families_whose_width_says_more_refuse():
    assert {"gemma2", "gemma3", "gpt2", "gpt_neox", "opt", "falcon"} <= FROZEN and set(CUT) >= {
        "llama",
        "qwen3",
        "phi3",
    }
    with pytest.raises(UnsupportedModelError, match=r"hidden channels of Gemma3\w+ must stay: embeddings are scaled"):
        plan_for("minitron_hidden", make_tiny("gemma3"), IDS)


def test_how_many_stay_is_rounded_to_the_heads_or_as_asked():
    model = make_tiny("llama")
    width, heads = model.config.hidden_size, model.config.num_attention_heads
    plain, every = (plan_for("minitron_hidden", model, IDS, sparsity=0.3, round_to=step) for step in (0, 1))
    wanted = width - int(0.3 * width)
    assert len(every.keep[HIDDEN]) == wanted and len(plain.keep[HIDDEN]) == round(wanted / heads) * heads
    with pytest.raises(BudgetError, match=rf"no hidden channel would leave: .* {width} is the nearest multiple"):
        plan_for("minitron_hidden", model, IDS, sparsity=0.3, round_to=width)


def test_the_masked_model_has_zeros_where_the_cut_one_has_nothing():
    model = make_tiny("llama")
    plan = plan_for("minitron_hidden", model, IDS, sparsity=0.25)
    masked, kept = sc.apply(plan, model, mask=True), plan.keep[HIDDEN]
    cut = dict(sc.apply(plan, model).named_parameters())
    for part in sc.anatomy(model)[HIDDEN].slices:
        dense = masked.get_parameter(part.tensor)
        assert torch.equal(dense.index_select(part.dim, kept), cut[part.tensor])
        assert not dense.index_select(part.dim, plan.removed(HIDDEN)).any()


def test_a_run_writes_a_plain_checkpoint_that_verifies(make_llama, tiny_tokenizer, tmp_path):
    make_llama(num_hidden_layers=2).save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    steps = [{"method": "minitron_hidden", "sparsity": 0.25}, {"method": "wanda", "sparsity": 0.5}]
    data = {"samples": 4, "length": 32}
    job = {"model": str(tmp_path / "dense"), "out": str(tmp_path / "out"), "calibration": data, "steps": steps}
    sc.run({**job, "dtype": "float32"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    dense = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["hidden_size"] == 0.75 * dense["hidden_size"] and "auto_map" not in config
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    findings = sc.verify(tmp_path / "out", base=tmp_path / "dense")
    assert all(finding.ok for finding in findings)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    # three quarters of every matrix are left, of which half is masked
    assert report["achieved"] == pytest.approx(1 - 0.75 / 2, abs=0.01)
