"""Oracles of loraprune: identities of its gradient, the published schedule, and masked = cut = merged."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import secateur as sc
from families import make_tiny, tiny_ids
from runs import plan_for
from secateur.engine.training import _kept_after
from secateur.errors import BudgetError, DataError, NonFiniteError, OptionError, UsageError
from secateur.healing.recovery import RecoveryOptions
from secateur.healing.recovery.shrinking import Shrinking
from secateur.healing.recovery.trainer import Windows, recover
from secateur.loop import Callback
from secateur.methods import Adapted, make_method
from secateur.methods.structure.loraprune import cubic, step_of
from secateur.models.decoders import decoder_anatomy

IDS = tiny_ids()
# no dropout, so that two forwards are one
FAST = {"steps": 6, "batch": 2, "every": 1, "rank": 2, "lr": 1e-2, "dropout": 0.0}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapter(outputs=5, inputs=7, rank=3, **own):
    A, B = random(rank, inputs), random(outputs, rank, seed=1)
    gA, gB = random(rank, inputs, seed=2), random(outputs, rank, seed=3)
    given = {"weight": random(outputs, inputs, seed=4), "down": A, "up": B, "down_gradient": gA, "up_gradient": gB}
    return Adapted("w", **{**given, "scaling": 2.0, **own})


def test_the_gradient_is_what_a_step_of_unit_rate_changes():
    a = adapter()
    change = a.up @ a.down - (a.up - a.up_gradient) @ (a.down - a.down_gradient)
    torch.testing.assert_close(step_of(a.down, a.up, a.down_gradient, a.up_gradient), change)


def test_the_first_step_knows_but_the_gradient_of_b():
    a = adapter(up=torch.zeros(5, 3, dtype=torch.float64), down_gradient=torch.zeros(3, 7, dtype=torch.float64))
    expected = ((a.up_gradient @ a.down) * a.weight).abs()
    torch.testing.assert_close(make_method("loraprune").entries(a), expected)
    torch.testing.assert_close(make_method("loraprune", {"power": 2}).entries(a), expected.square())


def test_with_orthonormal_a_of_full_rank_it_is_the_true_gradient():
    A = torch.linalg.qr(random(7, 7))[0]
    W, x, c = random(5, 7, seed=1).requires_grad_(), random(6, 7, seed=2), random(6, 5, seed=3)
    B, A, s = torch.zeros(5, 7, dtype=torch.float64, requires_grad=True), A.requires_grad_(), 2.0
    ((x @ (W + s * B @ A).T) * c).sum().backward()
    assert not A.grad.any()
    torch.testing.assert_close(step_of(A.detach(), B.detach(), A.grad, B.grad), s * W.grad)
    told = adapter(weight=W.detach(), down=A.detach(), up=B.detach(), down_gradient=A.grad, up_gradient=B.grad)
    by_lora = make_method("loraprune").entries(told)
    by_gradient = make_method("loraprune", {"metric": "grad"}).entries(
        adapter(weight=W.detach(), down=A.detach(), up=B.detach(), gradient=W.grad)
    )
    torch.testing.assert_close(by_lora, s * by_gradient)


def test_other_metrics():
    a = adapter()
    whole = a.weight + 2.0 * a.up @ a.down
    torch.testing.assert_close(make_method("loraprune", {"metric": "magnitude"}).entries(a), whole.abs())
    drawn = [make_method("loraprune", {"metric": "random", "seed": s}).entries(a) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_the_published_schedule():
    rates = [0.5 * cubic(t, 100, 0.1, 0.1, 0.0) for t in (10, 50, 80, 90, 91)]
    assert rates == [0.0, 0.4375, 0.4990234375, 0.5, 0.5]
    rising = [cubic(t, 100, 0.1, 0.2, 0.3) for t in range(101)]
    assert rising == sorted(rising) and (rising[0], rising[-1]) == (0.3, 1.0)
    official = make_method("loraprune", {"steps": 1000, "exact": False})
    events = [t for t in range(1, 1001) if official.removed_at(t) is not None]
    assert (events[0], events[-1]) == (110, 890)
    exact = make_method("loraprune", {"steps": 1000})
    assert [t for t in range(1, 1001) if exact.removed_at(t) == 1] == [900]
    # what remains of 32 heads and 1536 neurons is rounded down, so that the official one ends short of a half
    last = 0.5 * official.removed_at(890)
    assert (int(32 * last), int(1536 * last)) == (15, 767)


class Watched(Callback):
    """A Shrinking that notes what it is asked to decide on, and what is left after every step."""

    def __init__(self, groups, method, decide):
        self.told, self.left = [], []

        def deciding(step, scores):
            self.told.append({name: s.clone() for name, s in scores.items()})
            return decide(step, scores)

        self.inner = Shrinking(
            groups, method.entries, deciding, beta=method.beta, normalised=method.normalised,
            gradients=method.needs_gradient,
        )  # fmt: skip

    def begin(self, model):
        self.inner.begin(model)

    def end(self):
        self.inner.end()

    def on_pre_optimizer_step(self, step):
        self.inner.on_pre_optimizer_step(step)
        self.left.append(self.inner.kept)


def trained(model, decide=lambda step, scores: None, *, measure=None, callback=None, **options):
    method = make_method("loraprune", {**FAST, **options})
    anatomy = decoder_anatomy(model)
    callback = callback or Watched(anatomy.of_kind("kv_head", "neuron"), method, decide)
    curve = recover(
        model,
        Windows(IDS, IDS[:0]),
        method.recovery("float32"),
        modules=[m.module for m in anatomy.matrices],
        callback=callback,
        measure=measure,
    )
    return callback, curve


def asked_of(model, method):
    """What of a run an allocation looks at, and the groups that may be cut."""
    anatomy: Any = decoder_anatomy(model)
    return SimpleNamespace(anatomy=anatomy), anatomy.of_kind(*method.kinds)


def test_scores_are_a_moving_mean_of_normalised_sums():
    model = make_tiny("llama")
    watched = Watched(decoder_anatomy(model).of_kind("neuron"), make_method("loraprune"), lambda step, scores: None)
    watched.inner._entries = lambda a: torch.arange(1.0, a.weight.shape[0] + 1)[:, None].expand_as(a.weight)
    trained(model, callback=watched)
    # every entry of a row counts as much, and so does one projection as the other; columns of down are all alike
    rows = torch.arange(1, 41, dtype=torch.float64)
    expected = 2 * rows / rows.norm() + torch.ones(40) / 40**0.5
    for k, told in enumerate(watched.told, start=1):
        torch.testing.assert_close(told["layers.1.mlp"], (1 - 0.9**k) * expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_head_scores_by_all_its_rows_of_every_projection(family):
    model = make_tiny(family)
    watched = Watched(decoder_anatomy(model).of_kind("kv_head"), make_method("loraprune"), lambda step, scores: None)
    watched.inner._entries = lambda a: a.weight.square()
    attention = model.model.layers[1].self_attn
    # two key-value heads of 8 channels with two queries each; phi3 has q, k and v in one weight
    if family == "phi3":
        q, k, v = attention.qkv_proj.weight.detach().split([32, 16, 16])
    else:
        q, k, v = (getattr(attention, f"{name}_proj").weight.detach() for name in "qkv")
    parts = [one.reshape(2, -1) for one in (q, k, v, attention.o_proj.weight.detach().T)]
    sums = [part.double().square().sum(dim=1) for part in parts]
    expected = sum(one / one.norm() for one in sums)
    trained(model, callback=watched, steps=1)
    torch.testing.assert_close(watched.told[0]["layers.1.attention"], 0.1 * expected, rtol=1e-5, atol=0)


def test_what_has_left_ranks_below_all_that_is_there_whatever_it_scores():
    model = make_tiny("llama")
    groups = decoder_anatomy(model).of_kind("neuron")
    watched = Watched(
        groups,
        make_method("loraprune"),
        lambda step, scores: {name: torch.arange(1, len(s)) for name, s in scores.items()} if step == 2 else None,
    )
    # the first neuron scores highest all the time
    watched.inner._entries = lambda a: 1.0 / torch.arange(1.0, a.weight.shape[0] + 1)[:, None].expand_as(a.weight)
    trained(model, callback=watched)
    ranks = [told["layers.1.mlp"].argsort().tolist().index(0) for told in watched.told]
    assert ranks == [39, 39, 0, 0, 0, 0]


def test_a_factor_on_one_projection_changes_nothing_and_nan_leaves_scores_as_they_were():
    def watched(entries):
        model = make_tiny("llama")
        found = Watched(decoder_anatomy(model).of_kind("neuron"), make_method("loraprune"), lambda step, scores: None)
        found.inner._entries = entries
        return trained(model, callback=found)[0].told

    plain = make_method("loraprune").entries
    usual = watched(plain)
    scaled = watched(lambda a: plain(a) * (10.0 if "up_proj" in a.name else 1.0))
    for mine, theirs in zip(usual, scaled, strict=True):
        torch.testing.assert_close(mine["layers.0.mlp"], theirs["layers.0.mlp"], rtol=1e-6, atol=1e-9)
    calls = [0]

    def broken(a):
        calls[0] += 1
        # in the second step, in a single module
        return plain(a) * (float("nan") if calls[0] == 9 + 4 else 1.0)

    found = watched(broken)
    assert all(torch.equal(found[1][name], found[0][name]) for name in found[0])
    assert not torch.equal(found[2]["layers.0.mlp"], found[1]["layers.0.mlp"])


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_the_masked_model_that_was_trained_is_the_one_that_is_cut_and_merged(family):
    model = make_tiny(family)
    method = make_method("loraprune", {**FAST, "sparsity": 0.4})
    plan = plan_for("loraprune", model, IDS, **FAST, sparsity=0.4)
    seen = []

    def measure(one):
        with torch.no_grad():
            seen.append(one.eval()(IDS).logits)
        return 1.0

    run, groups = asked_of(model, method)
    again = make_tiny(family)
    watched, _ = trained(again, partial(_kept_after, method, run, groups), measure=measure)
    for name, kept in watched.inner.kept.items():
        assert torch.equal(kept, plan.keep[name]) and len(kept)
    with torch.no_grad():
        cut = sc.apply(plan, model)(IDS).logits
    torch.testing.assert_close(cut, seen[-1], rtol=1e-4, atol=1e-4)
    assert (seen[-1] - seen[0]).abs().max() > 1e-2
    # nothing of the training is left in the model, hooks least of all
    assert not any(m._forward_pre_hooks for m in again.modules())


def test_masks_grow_and_what_has_left_never_returns():
    model = make_tiny("llama", num_hidden_layers=5)
    method = make_method("loraprune", {**FAST, "steps": 12, "sparsity": 0.3})

    run, groups = asked_of(model, method)
    watched, _ = trained(model, partial(_kept_after, method, run, groups), steps=12)
    sizes = [sum(len(kept) for kept in left.values()) for left in watched.left]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 4
    for before, after in zip(watched.left, watched.left[1:], strict=False):
        assert all(set(after[name].tolist()) <= set(before[name].tolist()) for name in after)
    # the last layer, of five the first stays because a tenth of them is none
    assert len(watched.left[-1]["layers.4.mlp"]) == 40 and len(watched.left[-1]["layers.0.mlp"]) < 40


def test_layers_at_both_ends_stay_whole():
    allocator = make_method("loraprune").allocator(1.0)
    assert [i for i in range(30) if not allocator.heads.holds(i, 30)] == [0, 1, 2, 29]
    assert [i for i in range(29) if not allocator.neurons.holds(i, 29)] == [0, 1, 28]


def test_counts_of_the_official_code_end_short_of_the_budget():
    model = make_tiny("llama")
    official = plan_for("loraprune", model, IDS, **FAST, ratio=0.5, exact=False, last=0)
    exact = plan_for("loraprune", model, IDS, **FAST, ratio=0.5, last=0)
    assert {len(kept) for name, kept in official.keep.items() if "mlp" in name} == {21}
    assert {len(kept) for name, kept in exact.keep.items() if "mlp" in name} == {20}


def test_a_ratio_counts_where_no_sparsity_is_asked_for():
    alone, beside = (
        plan_for("loraprune", make_tiny("llama"), IDS, **{**FAST, "sparsity": s}, ratio=0.5) for s in (0, 0.2)
    )
    assert any(len(alone.removed(name)) for name in alone.keep)
    assert all(torch.equal(alone.keep[name], beside.keep[name]) for name in beside.keep)
    # one that asks for nothing trains nothing either
    idle = plan_for("loraprune", make_tiny("llama"), IDS, **{**FAST, "sparsity": 0})
    assert not idle.keep and not idle.values


def test_true_gradients_are_not_clipped_with_the_others_and_train_nothing():
    runs = {}
    for metric in ("magnitude", "grad"):
        model = make_tiny("llama")
        _, curve = trained(model, metric=metric, clip=0.01)
        runs[metric] = (curve.losses, model.model.embed_tokens.weight.detach().clone())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
    # the same adapters on the same way: nothing was pruned
    assert runs["magnitude"][0] == runs["grad"][0]
    assert torch.equal(runs["magnitude"][1], runs["grad"][1])


def test_gradients_of_adapters_are_those_that_were_clipped():
    class Looking(Callback):
        norms: tuple[float, ...] = ()

        def begin(self, model):
            self.model = model

        def on_pre_optimizer_step(self, step):
            squares = [p.grad.double().square().sum() for p in self.model.parameters() if p.grad is not None]
            self.norms += (float(sum(squares)) ** 0.5,)

    callback, _ = trained(make_tiny("llama"), callback=Looking(), clip=0.01)
    assert callback.norms == pytest.approx([0.01] * 6, rel=1e-3)


def test_frozen_weights_have_no_gradients():
    class Looking(Callback):
        seen = 0

        def begin(self, model):
            self.model = model

        def on_pre_optimizer_step(self, step):
            for name, p in self.model.named_parameters():
                assert (p.grad is not None) == ("lora_" in name), name
            self.seen += 1

    callback, _ = trained(make_tiny("llama"), callback=Looking())
    assert callback.seen == 6


# bad input


def test_a_training_whose_last_step_breaks_the_weights_says_so():
    class Breaking(Callback):
        def begin(self, model):
            self.model = model

        def on_pre_optimizer_step(self, step):
            if step == 6:
                for name, p in self.model.named_parameters():
                    if "layers.1.mlp.up_proj.lora_B" in name:
                        p.grad.fill_(float("nan"))

    with pytest.raises(NonFiniteError, match=r"layers.1.mlp.up_proj: the trained weights hold NaN or inf"):
        trained(make_tiny("llama"), callback=Breaking())


def test_bad_input_is_refused_before_anything_is_trained():
    model = make_tiny("llama")
    with pytest.raises(OptionError, match="must leave some between"):
        make_method("loraprune", {"warmup": 0.6, "cooldown": 0.4})
    with pytest.raises(UsageError, match=r"k_proj, o_proj, up_proj, v_proj would have none: add them to targets"):
        plan_for("loraprune", model, IDS, **FAST, targets="q_proj+gate_proj+down_proj")
    with pytest.raises(UsageError, match="no module of the blocks is called 'q_prj'"):
        plan_for("loraprune", model, IDS, **FAST, targets="q_prj")
    with pytest.raises(BudgetError, match="comes to less than one unit of every group"):
        plan_for("loraprune", model, IDS, **FAST, sparsity=0.001)
    with pytest.raises(BudgetError, match="in 6 steps nothing would leave"):
        plan_for("loraprune", model, IDS, **{**FAST, "every": 50}, exact=False)
    with pytest.raises(BudgetError, match="at most"):
        plan_for("loraprune", model, IDS, **FAST, sparsity=0.9)
    with pytest.raises(UsageError, match="can't be shared by 1 rank in forwards of 2 windows"):
        plan_for("loraprune", model, IDS, **{**FAST, "batch": 3}, micro=2)
    with pytest.raises(DataError, match="there is nothing to train on"):
        recover(model, Windows(IDS[:0], IDS[:0]), RecoveryOptions())
