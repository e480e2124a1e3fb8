"""Matrices that see what those before them in the same block have become."""

from dataclasses import replace

import pytest
import torch

import secateur as sc
from families import make_tiny
from refit_reference import DOUBLE, IDS, inputs_of, refitted
from runs import plan_for
from secateur.errors import OptionError
from secateur.healing.refit import STREAM_SHARE
from secateur.models.decoders import decoder_blocks, matrix_roles, typed_blocks
from secateur.observe.driver import BlockWalk
from secateur.plans import Plan

STAGES = {"q": 0, "k": 0, "v": 0, "qkv": 0, "o": 1, "gate": 2, "up": 2, "gate_up": 2, "down": 3}


def until(plan: Plan, model, layer: int, stage: int) -> Plan:
    """The part of a plan about what is decided before a stage of a block."""
    roles = {f"{module}.weight": role for module, role in matrix_roles(model).items()}

    def before(tensor: str) -> bool:
        at = int(tensor.removeprefix(model.base_model_prefix).split(".layers.")[-1].split(".")[0])
        return (at, STAGES[roles[tensor]]) < (layer, stage)

    return replace(plan, **{k: {n: v for n, v in getattr(plan, k).items() if before(n)} for k in ("masks", "values")})


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
@pytest.mark.parametrize("target", ["current", "stream"])
def test_every_matrix_is_fitted_to_what_the_cut_matrices_before_it_give(family, target):
    model = make_tiny(family).double()
    plan = plan_for("wanda", model, IDS, dtype=DOUBLE, sparsity=0.5, heal="refit", target=target, true_sequential=True)
    cut = sc.apply(plan, model)
    roles = matrix_roles(model)
    for module, role in roles.items():
        if ".1." not in module or (role == "down" and target == "stream"):
            continue
        x = inputs_of(sc.apply(until(plan, model, 1, STAGES[role]), model), [module])[module]
        w = model.get_submodule(module).weight.detach()
        keep = plan.masks[f"{module}.weight"]
        scores = w.abs() * x.norm(dim=0)
        rank = scores.argsort(dim=1).argsort(dim=1)
        assert (keep == (rank >= round(w.shape[1] * 0.5))).float().mean() > 0.99, module
        found = cut.get_submodule(module).weight
        torch.testing.assert_close(found, refitted(w, keep, x, x @ w.T), rtol=1e-4, atol=1e-5)


def test_the_end_of_a_block_makes_up_for_what_the_block_itself_has_lost():
    model = make_tiny("llama").double()
    options = {"dtype": DOUBLE, "sparsity": 0.5, "heal": "refit", "target": "stream", "true_sequential": True}
    plan = plan_for("wanda", model, IDS, **options)
    name = "model.layers.0.mlp.down_proj"
    # the first block has nothing before it that could have lost something
    behind = sc.apply(until(plan, model, 0, 3), model)
    x, w = inputs_of(behind, [name])[name], model.get_parameter(f"{name}.weight").detach()
    given = []
    for one in (model, behind):
        handle = one.model.layers[0].register_forward_hook(lambda m, args, out: given.append(out.flatten(0, 1)))
        with torch.no_grad():
            one(IDS)
        handle.remove()
    lost = given[0] - given[1]
    assert float(lost.square().mean()) > 0
    found = sc.apply(plan, model).get_parameter(f"{name}.weight")
    wanted = x @ w.T + STREAM_SHARE * lost
    torch.testing.assert_close(found, refitted(w, plan.masks[f"{name}.weight"], x, wanted), rtol=1e-6, atol=1e-8)


def test_it_gains_and_the_same_weights_leave_in_all():
    model = make_tiny("llama").double()
    plans = [plan_for("alps", model, IDS, dtype=DOUBLE, sparsity=0.6, true_sequential=t) for t in (False, True)]
    left = [sum(int(mask.sum()) for mask in plan.masks.values()) for plan in plans]
    assert left[0] == left[1]
    with torch.no_grad():
        dense = model(IDS).logits
        off = [float((dense - sc.apply(plan, model)(IDS).logits).square().mean()) for plan in plans]
    assert off[1] < off[0]


@pytest.mark.parametrize(
    ("family", "more"), [("llama", {}), ("gemma3", {}), ("olmo2", {}), ("opt", {"do_layer_norm_before": False})]
)
def test_forwards_in_bfloat16_cost_nothing_but_their_digits(family, more):
    model = make_tiny(family, **more)
    options = {"sparsity": 0.5, "heal": "refit", "target": "stream", "true_sequential": True}
    off = []
    with torch.no_grad():
        dense = model(IDS).logits
        for dtype in (torch.float32, torch.bfloat16):
            cut = sc.apply(plan_for("wanda", model, IDS, dtype=dtype, **options), model)
            off.append(float((dense - cut(IDS).logits).square().mean()))
    assert off[1] == pytest.approx(off[0], rel=0.05)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox", "falcon", "opt"])
def test_an_attention_that_is_decided_is_not_computed_again(family, monkeypatch):
    model = make_tiny(family)
    options = {"sparsity": 0.5, "heal": "refit", "target": "stream", "true_sequential": True}
    name = typed_blocks(model)[0].family.attention
    counted = []
    kind = type(decoder_blocks(model)[1][0].get_submodule(name))
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args, **kwargs: counted.append(1) or forward(*args, **kwargs))
    plan = plan_for("wanda", model, IDS, **options)
    once, counted[:] = len(counted), []
    monkeypatch.setattr(BlockWalk, "settle", lambda *args: None)
    again = plan_for("wanda", model, IDS, **options)
    # before the last matrix of a block it isn't, nor on the way to the next block; text comes in six batches
    layers = len(decoder_blocks(model)[1])
    assert len(counted) - once == 6 * (layers + layers - 1)
    assert plan.masks.keys() == again.masks.keys() and plan.values.keys() == again.values.keys()
    assert all(torch.equal(mask, again.masks[tensor]) for tensor, mask in plan.masks.items())
    assert all(torch.equal(value, again.values[tensor]) for tensor, value in plan.values.items())


def test_a_model_type_that_nobody_knows_is_decided_block_by_block():
    model = make_tiny("llama")
    model.config.model_type = "unheard_of"
    plan, plain = (plan_for("wanda", model, IDS, heal="refit", true_sequential=t) for t in (True, False))
    assert [note for note in plan.provenance[0].notes if note.startswith("true_sequential: ")]
    assert all(torch.equal(value, plain.values[name]) for name, value in plan.values.items())


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("magnitude", {}, "needs a method that decides on what cut blocks give"),
        ("wanda", {"scope": "global", "heal": "refit"}, "needs a method that decides on what cut blocks give"),
        ("wanda", {"heal": "refit", "target": "dense"}, "needs target=current or target=stream"),
    ],
)
def test_where_it_has_no_sense_it_is_refused(method, options, reason):
    with pytest.raises(OptionError, match=reason):
        plan_for(method, make_tiny("llama"), IDS, sparsity=0.5, true_sequential=True, **options)
