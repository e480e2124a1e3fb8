"""Oracles of slicegpt: all directions are no change, fewer are the dense model with projected hidden states."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import secateur as sc
from families import FAMILY_CONFIGS, make_tiny, tiny_ids
from runs import plan_for
from secateur.errors import BudgetError, PlanError, PlanMismatchError, UnsupportedModelError, UsageError
from secateur.methods import make_method
from secateur.models import rotation
from secateur.models.decoders import decoder_anatomy, decoder_blocks, is_linear
from secateur.models.layout import rotated_parts
from secateur.models.modeling_secateur import PlainNorm
from secateur.models.rotation import EMBEDDING, is_centred, is_parallel, signals
from secateur.report.build import removed_fraction

IDS = tiny_ids()
REFUSED = {"gemma2", "gemma3", "olmo2", "gpt2", "falcon", "falcon-mqa", "falcon-mha", "falcon-alibi"}
ROTATED = [family for family in FAMILY_CONFIGS if family not in REFUSED]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch):
    """Norms of Llama compute in float32 whatever the model is in."""

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = wide.pow(2).mean(-1, keepdim=True)
        return self.weight * (wide * torch.rsqrt(mean + self.variance_epsilon)).to(x.dtype)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture(autouse=True)
def tables_in_parts(monkeypatch):
    """The tables of 96 words take as many parts as large ones, the last one smaller."""
    monkeypatch.setattr(rotation, "WORDS", 36)


def exact(family: str, **changes):
    return make_tiny(family, **changes).double()


def sliced(model, **options):
    return plan_for("slicegpt", model, IDS, dtype=torch.float64, **{"round_to": 1, "sparsity": 0.25, **options})


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def orthogonal(size: int, seed: int = 0):
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double())[0]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_norm_without_a_scale_commutes_with_rotations():
    x, q, norm = random(3, 5, 16), orthogonal(16), PlainNorm(16, 1e-5)
    torch.testing.assert_close(norm(x @ q) @ q.T, norm(x), **EXACT)
    # and with the loss of directions that carry nothing, as long as it divides by the dense size
    q = q[:, :10]
    flat = x @ q @ q.T
    torch.testing.assert_close(norm(flat @ q) @ q.T, norm(flat), **EXACT)


def test_what_a_basis_loses_is_the_sum_of_the_eigenvalues_it_leaves_out():
    x = random(200, 12) * torch.logspace(0, -2, 12, dtype=torch.float64)
    gram = x.T @ x
    for orientation in ("pca", "random"):
        method = make_method("slicegpt", {"orientation": orientation, "damping": 0.0})
        basis = method.basis(gram, 7, 0)
        lost = (x - x @ basis @ basis.T).pow(2).sum()
        torch.testing.assert_close(lost, torch.linalg.eigvalsh(gram)[:5].sum())
        torch.testing.assert_close(basis.T @ basis, torch.eye(7).double())
    # what is added to the diagonal changes no direction
    damped = make_method("slicegpt", {"orientation": "pca"}).basis(gram, 7, 0)
    plain = make_method("slicegpt", {"orientation": "pca", "damping": 0.0}).basis(gram, 7, 0)
    torch.testing.assert_close(damped @ damped.T, plain @ plain.T)


@pytest.mark.parametrize("family", ROTATED)
def test_all_directions_are_no_change(family):
    model = exact(family)
    if family == "opt":
        model.model.decoder.embed_positions.weight.data += 1
    plan = sliced(model)
    whole = {name: orthogonal(32, seed=i) for i, name in enumerate(signals(model))}
    assert whole.keys() == plan.rotations.keys()
    turned = sc.apply(dataclasses.replace(plan, rotations=whole), model)
    close = EXACT if family in ("llama", "llama-tied-bias", "opt", "gpt_neox") else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(logits(turned), logits(model), **close)


@contextmanager
def projected(model, rotations) -> Iterator[None]:
    """A second, naive way: the dense blocks written down, with projections where the bases are."""
    _, blocks = decoder_blocks(model)
    parallel, centred = is_parallel(model), is_centred(model)

    def project(x, signal):
        x = x - x.mean(-1, keepdim=True) if centred else x
        basis = rotations.get(signal)
        return x if basis is None else x @ basis.double() @ basis.double().T

    def forward_of(layer, block):
        attention = block.attention if parallel else block.self_attn

        def forward(x, *args, **kwargs):
            x = project(x, EMBEDDING) if layer == 0 else x
            names = ("input_layernorm", "post_attention_layernorm")
            if hasattr(block, "self_attn_layer_norm"):
                names = ("self_attn_layer_norm", "final_layer_norm")
            first, second = (getattr(block, norm) for norm in names)
            mlp = block.mlp if hasattr(block, "mlp") else lambda h: block.fc2(block.activation_fn(block.fc1(h)))
            attended = attention(first(x), *args, **kwargs)[0]
            h = x if parallel else project(x + attended, f"layers.{layer}.attention")
            y = h + mlp(second(h)) + (attended if parallel else 0)
            signals_seen[f"layers.{layer}.attention"] = x + attended
            signals_seen[f"layers.{layer}.mlp"] = y
            return y if layer + 1 == len(blocks) else project(y, f"layers.{layer}.mlp")

        return forward

    signals_seen: dict[str, torch.Tensor] = {}
    for layer, block in enumerate(blocks):
        block.forward = forward_of(layer, block)
    try:
        yield signals_seen  # type: ignore[misc]
    finally:
        for block in blocks:
            del block.forward


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "qwen3", "phi3", "opt", "gpt_neox"])
def test_a_sliced_model_is_the_dense_one_with_projected_hidden_states(family):
    model = exact(family)
    plan = sliced(model)
    cut = sc.apply(plan, model)
    with projected(model, plan.rotations) as seen, torch.no_grad():
        reference = model(IDS).logits
    close = EXACT if family in ("llama", "llama-tied-bias", "opt", "gpt_neox") else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(logits(cut), reference, **close)
    assert float((reference - logits(model)).abs().max()) > 1e-2
    # every basis spans the principal directions of what the model gives that is sliced up to there
    for name, basis in plan.rotations.items():
        if name != EMBEDDING:
            x = seen[name].reshape(-1, 32)
            x = x - x.mean(-1, keepdim=True) if is_centred(model) else x
            vectors = torch.linalg.eigh(x.T @ x).eigenvectors[:, -24:]
            torch.testing.assert_close(basis @ basis.T, vectors @ vectors.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama-tied-bias", "qwen3"])
def test_a_head_can_be_sliced_too(family, tmp_path):
    model = exact(family)
    plan = sliced(model, slice_head=True)
    cut = sc.apply(plan, model)
    with projected(model, plan.rotations), torch.no_grad():
        last = plan.rotations["layers.2.mlp"].double()
        # what enters the final norm is what the last block gives
        seen: list[torch.Tensor] = []
        handle = model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(IDS)
        handle.remove()
        reference = model.lm_head(model.model.norm(seen[0] @ last @ last.T))
    assert cut.lm_head.weight.shape == (96, 24)
    close = EXACT if family.startswith("llama") else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(logits(cut), reference, **close)
    cut = cut.float()
    folder = sc.save(cut, None, tmp_path / "cut", plan=plan)
    stock = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    for other in (sc.load(folder)[0], stock):
        torch.testing.assert_close(logits(other), logits(cut), rtol=1e-5, atol=1e-5)
    linear = [sum(m.weight.numel() for m in decoder_blocks(one)[1].modules() if is_linear(m)) for one in (model, cut)]
    assert removed_fraction(plan, decoder_anatomy(model)) == pytest.approx(1 - linear[1] / linear[0])
    with pytest.raises(UnsupportedModelError, match="the final norm shifts what the head reads"):
        sliced(exact("gpt_neox"), slice_head=True)


def test_directions_are_turned_among_themselves_without_effect():
    model = exact("llama")
    plans = [sliced(model, orientation=how) for how in ("pca", "random")]
    torch.testing.assert_close(*[logits(sc.apply(plan, model)) for plan in plans], **EXACT)
    assert not torch.allclose(plans[0].rotations[EMBEDDING], plans[1].rotations[EMBEDDING])


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_hidden_states_with_few_directions_are_sliced_without_loss(family):
    model = exact(family)
    within = orthogonal(32)[:, :20]
    within = within - within.mean(0) if is_centred(model) else within
    project = within @ torch.linalg.pinv(within)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight @ project)
        for name, module in model.named_modules():
            if name.endswith(("o_proj", "down_proj", "attention.dense", "dense_4h_to_h")):
                module.weight.copy_(project @ module.weight)
                if module.bias is not None:
                    module.bias.copy_(project @ module.bias)
    plan = sliced(model, sparsity=12 / 32)
    assert plan.rotations[EMBEDDING].shape == (32, 20)
    torch.testing.assert_close(logits(sc.apply(plan, model)), logits(model), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_every_family_is_saved_reloaded_and_writes_with_its_cache_or_is_refused(family, tmp_path):
    model = make_tiny(family)
    if family in REFUSED:
        with pytest.raises(UnsupportedModelError, match="must stay in one basis"):
            plan_for("slicegpt", model, IDS)
        return
    plan = plan_for("slicegpt", model, IDS, sparsity=0.25)
    cut = sc.apply(plan, model)
    folder = sc.save(cut, None, tmp_path / "cut", plan=plan)
    again, _ = sc.load(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    for other in (again, stock):
        torch.testing.assert_close(logits(other), logits(cut), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        prompt = IDS[:2, :8]
        written = stock.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        steps = cut(written).logits[:, 7:-1]
        # min_new_tokens bans the end token
        steps[..., 2] = float("-inf")
    assert torch.equal(written[:, 8:], steps.argmax(-1))
    # what is counted in the report is what has left
    linear = [sum(m.weight.numel() for m in decoder_blocks(one)[1].modules() if is_linear(m)) for one in (model, cut)]
    assert removed_fraction(plan, decoder_anatomy(model)) == pytest.approx(1 - linear[1] / linear[0])
    assert not cut.config.tie_word_embeddings and cut.get_output_embeddings().weight.shape == (96, 32)
    # transformers prefers its own class, which must not fill the rest with random numbers
    with pytest.raises(Exception, match=r"shape|size|-1|per-layer"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_widths_are_rounded_down_and_shortcuts_are_counted(tiny_llama, tiny_tokenizer):
    result = sc.prune(tiny_llama, tiny_tokenizer, method="slicegpt", sparsity=0.3, samples=4, length=32)
    # 0.7 * 32 = 22.4 directions, of which 16 are a multiple of eight
    assert {tuple(basis.shape) for basis in result.plan.rotations.values()} == {(32, 16)}
    blocks = result.model.model.layers
    assert blocks[0].self_attn.q_proj.weight.shape == (32, 16) and blocks[0].mlp.down_proj.weight.shape == (16, 64)
    assert blocks[0].attention_shortcut.weight.shape == blocks[0].mlp_shortcut.weight.shape == (16, 16)
    assert blocks[1].mlp_shortcut.weight.shape == (32, 16) and blocks[1].mlp.down_proj.weight.shape == (32, 64)
    assert result.report.requested == "30.0 % of the hidden size"
    # q, k, v, o, gate, up, down at half their width, but for the last down, and four products
    dense = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    left = dense / 2 + 32 * 64 / 2 + 3 * 16 * 16 + 16 * 32
    assert result.report.achieved == pytest.approx(1 - left / dense)
    assert rotated_parts(result.model)["width"] == 16


def test_no_direction_is_lost_to_the_rounding_of_floats():
    for size in (576, 768, 1024, 2560, 5120):
        for percent in range(100):
            method = make_method("slicegpt", {"sparsity": percent / 100})
            assert method.width(size, lambda _: 0.0) == (100 - percent) * size // 100 // 8 * 8


def test_a_budget_of_parameters_counts_the_shortcuts(tiny_llama, tiny_tokenizer):
    asked = {"method": "slicegpt", "options": {"budget": "params", "round_to": 1}, "samples": 4, "length": 32}
    result = sc.prune(tiny_llama, tiny_tokenizer, sparsity=0.2, **asked)
    width = rotated_parts(result.model)["width"]
    assert result.report.requested == "20.0 % of the parameters" and 0.2 <= result.report.achieved < 0.25

    def left(width: int) -> int:
        return 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64) * width / 32 + 32 * 64 * (1 - width / 32) + 3 * width**2

    dense = left(32) - 3 * 32**2
    assert left(width) + 32 * width <= 0.8 * dense < left(width + 1) + 32 * (width + 1)
    with pytest.raises(BudgetError, match=r"with sparsity 0\.995 and round_to 1 nothing is left"):
        sc.plan(tiny_llama, tiny_tokenizer, sparsity=0.995, **asked)


def run(folder: Path, out: Path, *steps, options=None, **more):
    calibration = {"samples": 8, "length": 64}
    steps = [{"method": "slicegpt", "sparsity": 0.25, "options": options or {}}, *steps]
    recipe = {"model": str(folder), "out": str(out), "calibration": calibration, "steps": steps, "dtype": "float32"}
    return sc.run(recipe, **more)


@pytest.mark.parametrize(("options", "bases"), [({}, 4), ({"slice_head": True}, 5)])
def test_a_streamed_run_gives_what_memory_gives_and_the_plan_gives_it_again(
    tiny_checkpoint, tmp_path, cli, options, bases
):
    out = tmp_path / "out"
    run(tiny_checkpoint, out, options=options)
    dense, tokenizer = sc.load(tiny_checkpoint)
    asked = {"sparsity": 0.25, "samples": 8, "length": 64, "dtype": "float32"}
    made = sc.prune(dense, tokenizer, method="slicegpt", options=options, **asked)
    cut, _ = sc.load(out)
    states = cut.state_dict(), made.model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(finding.ok for finding in sc.verify(out, tiny_checkpoint))
    again = tmp_path / "again"
    assert cli("plan", "apply", out, tiny_checkpoint, "--out", again).code == 0
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()
    assert f"24 of 32 directions kept, in {bases} bases" in cli("plan", "show", out).out
    loaded = sc.Plan.load(out / "plan")
    assert all(torch.equal(loaded.rotations[name], basis) for name, basis in made.plan.rotations.items())


def test_blocks_give_way_one_by_one(monkeypatch):
    model = exact("llama")
    plan = sliced(model)
    dense = {name: weakref.ref(tensor) for name, tensor in model.named_parameters()}
    block, seen = rotation.Rotation.block, []

    def look(self, layer, tensors):
        queries = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)]
        # a width that has changed, and nothing that holds on to the weight from before
        seen.append([model.get_parameter(name).shape[1] if dense[name]() is None else "dense" for name in queries])
        return block(self, layer, tensors)

    monkeypatch.setattr(rotation.Rotation, "block", look)
    sc.apply(plan, model, inplace=True)
    assert seen == [["dense", "dense", "dense"], [24, "dense", "dense"], [24, 24, "dense"]]


def test_what_is_rotated_can_be_cut_further(tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    steps = [{"method": "magnitude_sp", "sparsity": 0.3}, {"method": "vocab", "sparsity": 0.3}, {"method": "wanda"}]
    run(tiny_checkpoint, out, *steps)
    assert all(finding.ok for finding in sc.verify(out, tiny_checkpoint))
    cut, tokenizer = sc.load(out)
    assert len(tokenizer) == cut.config.vocab_size == 359
    assert torch.isfinite(logits(cut, tiny_ids() % 300)).all()


def test_other_runtimes_say_what_they_lack(tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    run(tiny_checkpoint, out)
    for to in ("gguf", "deci"):
        with pytest.raises(UnsupportedModelError, match="a product between its residual connections"):
            sc.convert(out, tmp_path / to, to=to)


def test_what_cannot_be_rotated_is_refused(tiny_llama, tiny_tokenizer):
    asked = {"method": "slicegpt", "samples": 4, "length": 32}
    with pytest.raises(BudgetError, match="nothing is left of a hidden size of 32"):
        sc.plan(tiny_llama, tiny_tokenizer, sparsity=0.9, **asked)
    made = sc.prune(tiny_llama, tiny_tokenizer, **asked)
    for method in ("angular", "blockpruner"):
        with pytest.raises(UnsupportedModelError, match=r"must stay: hidden states change their basis in them"):
            sc.plan(made.model, tiny_tokenizer, method=method, sparsity=0.5, samples=4, length=32)
    with pytest.raises(UnsupportedModelError, match="has been rotated already"):
        sc.plan(made.model, tiny_tokenizer, **asked)
    with pytest.raises(UsageError, match="has no masked form"):
        sc.apply(made.plan, tiny_llama, mask=True)
    few = dict(list(made.plan.rotations.items())[:2])
    with pytest.raises(PlanMismatchError, match="bases are not those of this model"):
        sc.apply(dataclasses.replace(made.plan, rotations=few), tiny_llama)
    skewed = {**made.plan.rotations, EMBEDDING: torch.ones(32, 24)}
    with pytest.raises(PlanError, match="columns that are not orthonormal"):
        dataclasses.replace(made.plan, rotations=skewed)
    other = sc.plan(tiny_llama, tiny_tokenizer, method="magnitude_sp", sparsity=0.2)
    with pytest.raises(PlanError, match="can't cut anything else"):
        made.plan.merge(other)
    with pytest.raises(UsageError, match="in other bases than those of the teacher"):
        sc.prune(tiny_llama, tiny_tokenizer, heal="lora:steps=1,loss=hidden", **asked)
    with pytest.raises(UnsupportedModelError, match="norms follow the residual sums"):
        plan_for("slicegpt", make_tiny("opt", do_layer_norm_before=False), IDS)
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight.zero_()
    with pytest.raises(sc.errors.DataError, match="behind embedding are all zero"):
        sc.plan(tiny_llama, tiny_tokenizer, **asked)
