"""The trainer in memory: losses by hand, masks to the bit, merged = trained, and a second sitting to the bit."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from families import LAYOUTS, make_tiny, tiny_ids
from runs import plan_for
from secateur import pieces
from secateur.engine.recovering import Teacher, layers_left, narrowed
from secateur.errors import DataError, MissingExtraError, NonFiniteError, OptionError, PlanMismatchError, UsageError
from secateur.healing.recovery import Curve, RecoveryOptions, parse_recovery, split_heal, trainer
from secateur.healing.recovery.forwards import cast_once
from secateur.healing.recovery.losses import Objective, cross_entropy, divergence, hidden_distance
from secateur.healing.recovery.precision import settled
from secateur.healing.recovery.states import FinalStates
from secateur.healing.recovery.trained import STRATEGIES
from secateur.healing.recovery.trainer import Windows, learning_rate, recover
from secateur.loop import Callback, Keeper, examples_of
from secateur.models.decoders import decoder_blocks, is_linear
from secateur.report.recovery import summary
from secateur.train.masks import masks_left, masks_of

FAST = {"steps": 3, "batch": 2, "rank": 2, "lr": 1e-2, "dtype": "float32"}


def matrices(model: Any) -> list[str]:
    name, blocks = decoder_blocks(model)
    return [f"{name}.{path}" for path, module in blocks.named_modules() if is_linear(module)]


def train(model: Any, masks: Any = None, *, measure: Any = None, keeper: Any = None, **options: Any) -> Curve:
    teacher = options.pop("teacher", None)
    return recover(
        model,
        Windows(tiny_ids(8), tiny_ids(2, seed=1)),
        RecoveryOptions(**{**FAST, **options}),
        teacher=teacher,
        layers=range(len(decoder_blocks(teacher or model)[1])),
        modules=matrices(model),
        masks=masks,
        measure=measure,
        keeper=keeper,
        pieces=blocks_of,
    )


def masked(family: str = "llama") -> tuple[Any, Any]:
    """A model with half of its weights zero, and its masks."""
    dense = make_tiny(family)
    plan = plan_for("magnitude", dense, tiny_ids(), sparsity=0.5)
    model = sc.apply(plan, dense)
    return model, masks_left([plan], model)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before: dict[str, torch.Tensor], model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


# losses


def test_cross_entropy_is_that_of_the_library():
    model, ids = make_tiny("llama"), tiny_ids(3)
    with torch.no_grad():
        torch.testing.assert_close(Objective({"ce": 1.0})(model, ids), model(input_ids=ids, labels=ids).loss)


def test_divergence_by_the_definition():
    mine, theirs = (
        torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1)
    )
    total = 0.0
    for b in range(2):
        for t in range(3):
            p, q = (F.softmax(x[b, t] / 2.0, dim=-1) for x in (theirs, mine))
            total += sum(float(p[v]) * (math.log(p[v]) - math.log(q[v])) for v in range(5))
    assert float(divergence(mine, theirs, 2.0)) == pytest.approx(4.0 * total / 6, rel=1e-6)
    assert float(divergence(mine, mine + 7.0)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entries", [1, 10, 1000])
def test_cross_entropy_has_the_gradient_of_the_library(dtype, entries, monkeypatch):
    monkeypatch.setitem(pieces._ENTRIES, "cpu", entries)
    values = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = torch.randint(5, (2, 4), generator=torch.Generator().manual_seed(1))
    ours, theirs = (values.clone().requires_grad_() for _ in range(2))
    found, expected = (
        cross_entropy(ours, ids),
        F.cross_entropy(theirs[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()),
    )
    torch.testing.assert_close(found, expected)
    (3.0 * found).backward()
    (3.0 * expected).backward()
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    torch.testing.assert_close(ours.grad, theirs.grad, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entries", [1, 10, 1000])
def test_divergence_has_the_gradient_of_the_library(dtype, entries, monkeypatch):
    monkeypatch.setitem(pieces._ENTRIES, "cpu", entries)
    values = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, theirs = (values[0].clone().requires_grad_() for _ in range(2))
    found = divergence(ours, values[1], 2.0)
    logs = ((logits.flatten(0, 1).float() / 2.0).log_softmax(dim=-1) for logits in (theirs, values[1]))
    expected = F.kl_div(*logs, log_target=True, reduction="batchmean") * 4.0
    torch.testing.assert_close(found, expected)
    (3.0 * found).backward()
    (3.0 * expected).backward()
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    torch.testing.assert_close(ours.grad, theirs.grad, **tolerance)


def test_hidden_states_are_compared_relative_to_the_teacher():
    ones, twos = torch.ones(1, 2, 4), torch.full((1, 2, 4), 2.0)
    # |2 - 1|^2 / |1|^2 = 1 and |1 - 2|^2 / |2|^2 = 1/4
    assert float(hidden_distance([twos, ones], [ones, twos])) == pytest.approx(0.625)


def plain(model: Any) -> Any:
    """A copy without the final norm, so that the last hidden states are those behind the last block."""
    model = copy.deepcopy(model)
    model.model.norm = torch.nn.Identity()
    return model


def blocks_of(model: Any) -> Any:
    return decoder_blocks(model)[1]


def test_terms_add_up_with_their_weights_and_layers_meet_those_they_came_from():
    dense, ids = make_tiny("llama"), tiny_ids(2)
    plan = plan_for("shortgpt", dense, ids, layers=1)
    student = sc.apply(plan, dense)
    kept = layers_left([plan], dense, 2)
    assert kept == plan.keep["layers"].tolist() and len(kept) == 2
    with torch.no_grad():
        mine, theirs = (m(input_ids=ids) for m in (student, dense))
        behind = [m.model(input_ids=ids, output_hidden_states=True).hidden_states for m in map(plain, (student, dense))]
        pairs = [(behind[0][i + 1], behind[1][k + 1]) for i, k in enumerate(kept)]
        expected = (
            2.0 * cross_entropy(mine.logits, ids)
            + divergence(mine.logits, theirs.logits, 3.0)
            + 0.1 * hidden_distance(*zip(*pairs, strict=True))
        )
        objective = Objective({"ce": 2.0, "kl": 1.0, "hidden": 0.1}, 3.0, dense, kept, blocks_of)
        torch.testing.assert_close(objective(student, ids), expected)
        # the student that is its own teacher has nothing to learn
        assert float(Objective({"kl": 1.0, "hidden": 1.0}, 1.0, dense, [0, 1, 2], blocks_of)(dense, ids)) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_student_of_the_first_blocks_has_their_hidden_states(family):
    dense, ids = make_tiny(family), tiny_ids(2)
    plan = plan_for("shortgpt", dense, ids, layers=1)
    student = sc.apply(dataclasses.replace(plan, keep={"layers": torch.tensor([0, 1])}), dense)
    with torch.no_grad():
        assert float(Objective({"hidden": 1.0}, 1.0, dense, [0, 1], blocks_of)(student, ids)) < 1e-9


@pytest.mark.parametrize("family", [*LAYOUTS, "gemma2", "granite"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_teacher_says_the_same_from_memory(family, precision):
    dense, ids = make_tiny(family), tiny_ids(2)
    states = FinalStates()
    forwards = []
    blocks_of(dense)[0].register_forward_hook(lambda *_: forwards.append(1))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != torch.float32):
        plain = dense(input_ids=ids, use_cache=False).logits
        first, again, other = (states.logits(dense, one) for one in (ids, ids.clone(), ids + 1))
        assert len(forwards) == 3
        torch.testing.assert_close(first, plain, rtol=0, atol=0)
        torch.testing.assert_close(again, plain, rtol=0, atol=0)
        assert not torch.equal(other, plain)
    # another precision is another answer
    with torch.no_grad():
        states.logits(dense, ids)
    assert len(forwards) == 3 + (precision != torch.float32)


def test_the_memory_of_a_teacher_has_a_bound_and_leaves_it_as_it_was():
    dense, ids = make_tiny("llama"), tiny_ids(2)
    width = dense.config.hidden_size
    states, forwards = FinalStates(most_bytes=ids.numel() * width * 4), []
    wrapped = dense.model.forward
    dense.model.forward = lambda *args, **more: forwards.append(1) or wrapped(*args, **more)
    before = dense.model.forward
    with torch.no_grad():
        for one in (ids, ids + 1, ids, ids + 1):
            torch.testing.assert_close(states.logits(dense, one), dense(input_ids=one).logits, rtol=0, atol=0)
    # the second batch had no room; every other forward is that of the comparison
    assert len(forwards) - 4 == 3
    assert dense.model.forward is before


def test_students_of_one_teacher_learn_the_same_from_its_memory():
    dense = make_tiny("llama")
    curves = []
    for states in (None, remembered := FinalStates(), remembered):
        torch.manual_seed(1)
        model, _ = masked()
        curves.append(
            recover(
                model,
                Windows(tiny_ids(8), tiny_ids(2, seed=1)),
                RecoveryOptions(**FAST, loss="kl"),
                teacher=dense,
                states=states,
                layers=range(3),
                modules=matrices(model),
            ).losses
        )
    assert curves[0] == curves[1] == curves[2]


def test_layers_without_a_plan_are_spread_evenly():
    assert layers_left([], make_tiny("llama"), 3) == [0, 1, 2]
    assert layers_left([], make_tiny("llama", num_hidden_layers=6), 3) == [1, 3, 5]


# schedule and data


def test_the_learning_rate_rises_and_falls():
    options = RecoveryOptions(steps=100, lr=1.0, warmup=0.1)
    rates = [learning_rate(options)(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 1e-3


def test_a_schedule_that_stays_at_its_peak():
    options = RecoveryOptions(schedule="wsd", steps=200, warmup=0.05, cooldown=0.1, lr=2e-5, floor=0.1)
    rates = [learning_rate(options)(step) for step in (0, 5, 10, 100, 180, 190, 200)]
    assert rates == pytest.approx([0, 1e-5, 2e-5, 2e-5, 2e-5, 1.1e-5, 2e-6])
    # whatever the stages
    part = RecoveryOptions(schedule="wsd", steps=30, done=170, total=200, warmup=0.05, cooldown=0.1, lr=2e-5, floor=0.1)
    assert [learning_rate(part)(step) for step in (180, 190, 200)] == pytest.approx([2e-5, 1.1e-5, 2e-6])
    with pytest.raises(OptionError, match="170 steps done and 31 more exceed a total of 200"):
        RecoveryOptions(steps=31, done=170, total=200)


def test_stages_of_a_training_are_one_training():
    whole = weights(trained := make_tiny("llama")) and train(trained, train="norms", steps=6, seed=3)
    parts = make_tiny("llama")
    losses = []
    for done, steps in ((0, 2), (2, 4)):
        losses += train(parts, train="norms", steps=steps, done=done, total=6, seed=3).losses
    # the optimiser begins anew, so that only the data and the random numbers are the same
    assert losses[:3] == pytest.approx(whole.losses[:3], abs=1e-6) and len(losses) == len(whole.losses)


def test_every_window_comes_once_before_any_comes_again():
    seen = torch.cat([examples_of(step, 3, 5, seed=0) for step in range(10)])
    for epoch in seen.split(5):
        assert sorted(epoch.tolist()) == [0, 1, 2, 3, 4]
    assert not torch.equal(seen[:5], seen[5:10])
    assert torch.equal(examples_of(7, 3, 5, seed=0), seen[21:24])
    assert not torch.equal(torch.cat([examples_of(step, 3, 5, seed=1) for step in range(10)]), seen)


# what is trained


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_merged_adapters_are_the_trained_ones_and_masks_hold(family):
    model, masks = masked(family)
    before, ids, seen = weights(model), tiny_ids(2, seed=5), []

    def measure(one: Any) -> float:
        one.eval()
        with torch.no_grad():
            seen.append(one(input_ids=ids).logits)
        return 1.0

    train(model, masks, measure=measure, dropout=0.0)
    with torch.no_grad():
        merged = model(input_ids=ids).logits
    assert (merged - seen[0]).abs().max() > 1e-2, "training must change something for this test to mean anything"
    torch.testing.assert_close(merged, seen[-1], rtol=1e-4, atol=1e-4)
    assert changed(before, model) == {f"{name}.weight" for name in matrices(model)}
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask), name
    # nothing of peft is left
    assert set(weights(model)) == set(before) and all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config") and not model.training


def test_adapters_without_masks_fill_zeros_and_begin_as_nothing():
    model, _ = masked()
    ids = tiny_ids(2)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    seen = []

    def measure(one: Any) -> float:
        with torch.no_grad():
            seen.append(one.eval()(input_ids=ids).logits)
        return 1.0

    train(model, {}, measure=measure)
    assert torch.equal(seen[0], plain)
    assert bool((model.model.layers[0].mlp.up_proj.weight != 0).all())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_everything_is_trained_but_what_is_masked(family):
    model, masks = masked(family)
    before = weights(model)
    train(model, masks, train="full", decay=0.1)
    assert changed(before, model) == set(before)
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask), name


def test_norms_and_biases_alone():
    model = make_tiny("llama")
    before = weights(model)
    chosen = STRATEGIES["norms"](model, RecoveryOptions(), {})
    # two in every block and one behind them: (2 L + 1) d
    assert sum(p.numel() for p in chosen.parameters.values()) == 7 * 32
    chosen.finish()
    train(model, train="norms")
    assert changed(before, model) == {name for name in before if "norm" in name}
    biased = make_tiny("llama-tied-bias")
    before = weights(biased)
    train(biased, train="norms")
    assert changed(before, biased) == {name for name in before if "norm" in name or name.endswith("bias")}


def test_what_watches_a_training_needs_whole_weights():
    model = make_tiny("llama")
    before = weights(model)
    with pytest.raises(UsageError, match="need whole weights: leave fsdp out"):
        recover(model, Windows(tiny_ids(8), tiny_ids(2)), RecoveryOptions(fsdp=True), callback=Callback())
    assert changed(before, model) == set()


def test_alone_there_is_nobody_to_share_with():
    one, two = make_tiny("llama"), make_tiny("llama")
    train(one, train="full")
    train(two, train="full", fsdp=True)
    assert changed(weights(one), two) == set()


def test_ranks_by_module_and_targets_by_name():
    model = make_tiny("llama")
    one, two = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    chosen = STRATEGIES["lora"](
        model, RecoveryOptions(rank=2, alpha=4, targets="q_proj"), {}, modules=matrices(model), ranks={one: 5}
    )
    sizes = {name: p.shape[0] for name, p in chosen.parameters.items() if "lora_A" in name}
    assert len(sizes) == 3
    assert [model.get_submodule(name).scaling["recovery"] for name in (one, two)] == [2.0, 2.0]
    assert sizes[f"{one}.lora_A.recovery.weight"] == 5 and sizes[f"{two}.lora_A.recovery.weight"] == 2
    chosen.finish()


def test_several_forwards_of_a_step_are_one_large_one():
    whole, parts = make_tiny("llama"), make_tiny("llama")
    one = train(whole, batch=4, dropout=0.0, train="full", lr=1e-3)
    two = train(parts, batch=4, micro=1, dropout=0.0, train="full", lr=1e-3)
    assert one.losses == pytest.approx(two.losses, rel=1e-5)
    for name, weight in whole.named_parameters():
        torch.testing.assert_close(parts.get_parameter(name), weight, rtol=1e-3, atol=1e-4)


def test_checkpointing_changes_nothing_and_bfloat16_little():
    curves = [train(make_tiny("llama"), **more) for more in ({}, {"checkpointing": True}, {"dtype": "bfloat16"})]
    assert curves[1].losses == curves[0].losses
    assert curves[2].losses != curves[0].losses
    assert curves[2].losses == pytest.approx(curves[0].losses, rel=0.05)


@pytest.mark.parametrize(
    ("options", "device", "speedup", "dtype"),
    [
        ("batch=2,length=256", "cpu", 2.0, "bfloat16"),
        # a step is what counts, however it is computed
        ("batch=2,length=256,micro=1", "cpu", 2.0, "bfloat16"),
        ("batch=2,length=255", "cpu", 2.0, "float32"),
        ("batch=2,length=256", "cpu", 1.1, "float32"),
        ("batch=1,length=8", "cuda", 2.0, "bfloat16"),
        ("batch=2,length=256,dtype=float32", "cpu", 2.0, "float32"),
        ("batch=1,length=8,dtype=bfloat16", "cpu", 0.5, "bfloat16"),
    ],
)
def test_the_dtype_of_forwards_is_what_pays(options, device, speedup, dtype, monkeypatch):
    monkeypatch.setattr("secateur.observe.precision.bfloat16_speedup", lambda _: speedup)
    assert settled(parse_recovery(f"lora:{options}"), torch.device(device)).dtype == dtype


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("more", [{}, {"train": "norms"}, {"micro": 1, "loss": "kl"}])
def test_frozen_weights_that_are_cast_once_teach_the_same(family, more, monkeypatch):
    def trained(remember) -> tuple[Curve, Any]:
        monkeypatch.setattr(trainer, "cast_once", remember)
        model = make_tiny(family)
        teacher = make_tiny(family, seed=1) if "loss" in more else None
        return train(model, dtype="bfloat16", teacher=teacher, measure=lambda one: 1.0, **more), model

    def counted(modules: Any) -> Any:
        found = list(modules)
        kept.extend(found)
        return cast_once(found)

    kept: list[Any] = []
    (plain, first), (once, second) = trained(lambda _: nullcontext()), trained(counted)
    assert once.losses == plain.losses and not changed(weights(first), second)
    assert kept and not any("forward" in vars(module) for module in kept)
    assert trained(lambda _: nullcontext())[0].losses == plain.losses


def test_a_weight_is_cast_again_only_where_it_has_changed(monkeypatch):
    layer, taught, x = nn.Linear(8, 4).requires_grad_(False), nn.Linear(8, 4), torch.randn(2, 8)
    wanted = F.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16())
    casts: list[torch.dtype] = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda one, *how, **more: casts.append(how) or to(one, *how, **more))
    with cast_once([layer, taught, nn.Conv1d(1, 1, 1)]):
        assert "forward" not in vars(taught)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=0)
        assert casts == []
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                torch.testing.assert_close(layer(x), wanted, rtol=0, atol=0)
        assert len(casts) == 1
        layer.weight.mul_(2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not torch.equal(layer(x), wanted)
        assert len(casts) == 2
    assert "forward" not in vars(layer)


def test_the_seed_decides():
    models = [make_tiny("llama") for _ in range(3)]
    curves = [train(model, dropout=0.2, seed=seed) for model, seed in zip(models, (0, 0, 1), strict=True)]
    assert curves[0].losses == curves[1].losses != curves[2].losses
    assert not changed(weights(models[0]), models[1])


def test_the_global_random_state_stays():
    model = make_tiny("llama")
    state = torch.get_rng_state()
    train(model, dropout=0.2)
    assert torch.equal(state, torch.get_rng_state())


class Interrupted(Exception):
    pass


class InMemory(Keeper):
    """Ends a sitting after so many steps, and lets the next go on."""

    def __init__(self, end: int) -> None:
        self.end, self.kept = end, None

    def restored(self):
        return self.kept

    def finished(self, curve, state, *, last):
        if curve.steps == self.end:
            copied = {name: tensor.clone() for name, tensor in state().items()}
            self.kept = Curve.from_json(curve.to_json()), copied
            self.end = -1
            raise Interrupted


@pytest.mark.parametrize("kind", ["lora", "full", "norms"])
@pytest.mark.parametrize("end", [1, 3, 4])
def test_a_second_sitting_ends_in_the_same_bits(kind, end):
    (whole, masks), (resumed, _) = masked(), masked()
    how = {"train": kind, "steps": 4, "dropout": 0.3, "decay": 0.01, "measure": lambda one: 2.0}
    curve = train(whole, masks, **how)
    keeper = InMemory(end)
    first = copy.deepcopy(resumed)
    with pytest.raises(Interrupted):
        train(first, masks, keeper=keeper, **how)
    again = train(resumed, masks, keeper=keeper, **how)
    assert not changed(weights(whole), resumed)
    assert (again.losses, again.measured) == (curve.losses, curve.measured)


# in whole


def test_a_cut_model_gets_better_on_text_it_was_not_trained_on(tiny_llama, tiny_tokenizer):
    dense, tokenizer = tiny_llama, tiny_tokenizer
    result = sc.prune(dense, tokenizer, method="magnitude_sp", sparsity=0.3)
    before = weights(result.model)
    healed = sc.heal(
        result.model, tokenizer, plan=result.plan, train="full", steps=20, seed=2,
        options={"length": 32, "lr": 1e-2, "held_out": 4},
    )  # fmt: skip
    assert not changed(before, result.model), "the model that was given stays as it is"
    curve = healed.curve
    assert [step for step, _ in curve.measured] == list(range(0, 21, 2))
    assert curve.measured[-1][1] < 0.8 * curve.measured[0][1]
    assert (curve.tokens_per_step, curve.tokens) == (128, 2560)
    [record] = healed.plans[0].provenance[0].recoveries
    assert (record.train, record.options["loss"], record.data.seed) == ("full", "ce", 2)
    assert (record.before, record.after) == (curve.measured[0][1], curve.measured[-1][1])
    # the cut model that its teacher's predictions train closes part of the gap between the two
    assert sc.heal(
        result.model, tokenizer, plan=result.plan, teacher=healed.model, loss="kl", train="full", steps=20,
        options={"length": 32, "lr": 1e-2, "held_out": 4},
    ).curve.closed > 0.3  # fmt: skip


def test_of_a_short_text_the_windows_that_were_held_out_are_told(tiny_llama, tiny_tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("Nothing here is long enough to learn from. " * 12, encoding="utf8")
    healed = sc.heal(tiny_llama, tiny_tokenizer, data=tmp_path / "short.txt", steps=1, options={"length": 32})
    record = healed.recovered.record
    assert 2 <= record.data.samples < 80
    assert record.options["held_out"] == max(1, record.data.samples // 5)


def test_prune_trains_towards_the_dense_model(tiny_llama, tiny_tokenizer):
    result = sc.prune(
        tiny_llama, tiny_tokenizer, method="wanda", sparsity=0.5, samples=2, length=32,
        heal="refit+lora:steps=2,batch=2,length=32,held_out=2", seed=4,
    )  # fmt: skip
    [source] = result.plan.provenance
    assert source.options["heal"] == "refit"
    assert source.recoveries[0].options["loss"] == "kl" and source.recoveries[0].options["seed"] == 4
    assert result.report.recoveries[0]["teacher"] == "LlamaForCausalLM"
    for name, mask in result.plan.masks.items():
        assert torch.equal(result.model.get_parameter(name) != 0, mask)


def test_a_teacher_predicts_the_tokens_that_are_left(tiny_llama, tiny_tokenizer):
    asked = {"sparsity": 0.2, "samples": 2, "length": 32}
    first = sc.prune(tiny_llama, tiny_tokenizer, method="vocab", **asked)
    second = sc.prune(first.model, first.tokenizer, method="vocab", **asked)
    plans = [first.plan, second.plan]
    kept = first.plan.keep["vocabulary"][second.plan.keep["vocabulary"]]
    teacher = narrowed(Teacher(tiny_llama, tiny_tokenizer), plans)
    ids = torch.randint(0, len(kept), (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(teacher.model(ids).logits, tiny_llama(kept[ids]).logits[..., kept])
    assert teacher.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    assert tiny_llama.config.vocab_size == 512 == tiny_llama.get_input_embeddings().num_embeddings
    layers = (m.get_parameter("model.layers.0.mlp.up_proj.weight") for m in (teacher.model, tiny_llama))
    assert len({id(layer) for layer in layers}) == 1
    # what is left predicts what the dense model does, so there is nothing to learn
    healed = sc.heal(
        second.model, second.tokenizer, plan=plans, teacher=tiny_llama, steps=2, options={"length": 32, "held_out": 2}
    )
    assert healed.recovered.record.options["loss"] == "kl" and healed.curve.losses[0] < 1e-6
    assert healed.curve.teacher == pytest.approx(healed.curve.measured[0][1], rel=1e-4)


def test_only_a_gap_can_be_closed(tiny_llama, tiny_tokenizer):
    told = sc.heal(
        tiny_llama, tiny_tokenizer, teacher=tiny_llama, steps=1, options={"length": 32, "held_out": 2}
    ).recovered.section()  # fmt: skip
    for teacher, closed in ((100.0, None), (10.0, None), (5.0, -1.0)):
        curve = Curve(64, measured=[(0, 10.0), (1, 20.0)], teacher=teacher)
        assert curve.closed == (closed and pytest.approx(closed))
        said = summary({**told, "teacher_perplexity": teacher, "closed": curve.closed})
        assert "for the dense teacher" in said and ("of the gap" in said) == (closed is not None), said
    assert Curve(64, measured=[(0, 10.0), (1, 20.0)]).closed is None


def test_a_model_in_half_precision_keeps_it(tiny_llama, tiny_tokenizer):
    # as they are loaded: rotary frequencies are float32 beside weights of any dtype
    for parameter in tiny_llama.parameters():
        parameter.data = parameter.data.bfloat16()
    for kind in ("lora", "full"):
        healed = sc.heal(
            tiny_llama, tiny_tokenizer, train=kind, steps=2, options={"length": 32, "held_out": 2}
        )  # fmt: skip
        assert {p.dtype for p in healed.model.parameters()} == {torch.bfloat16}
        after = dict(healed.model.named_buffers())
        for name, buffer in tiny_llama.named_buffers():
            assert after[name].dtype == torch.float32 and torch.equal(after[name], buffer), name


def test_masks_that_were_cut_afterwards_are_what_is_zero():
    dense = make_tiny("llama")
    sparse = plan_for("magnitude", dense, tiny_ids(), sparsity=0.5)
    half = sc.apply(sparse, dense)
    narrow = plan_for("magnitude_sp", half, tiny_ids(), sparsity=0.3)
    model = sc.apply(narrow, half)
    masks = masks_left([sparse, narrow], model)
    assert set(masks) == {f"{name}.weight" for name in matrices(model)}
    assert all(torch.equal(mask, model.get_parameter(name) != 0) for name, mask in masks.items())
    assert masks_left([narrow], model) == {} and masks_left([], model) == {}
    assert set(masks_left([], model, keep_zeros=True)) == set(masks)
    with pytest.raises(PlanMismatchError):
        masks_left([sparse], model)


def test_what_was_refitted_beside_units_that_left_is_no_mask():
    dense = make_tiny("llama")
    with torch.no_grad():
        # as weights are that were quantised once
        for name in matrices(dense):
            dense.get_parameter(f"{name}.weight")[:, ::7] = 0
    for method, options in (("flap", {"heal": "refit"}), ("osscar", {})):
        plan = plan_for(method, dense, tiny_ids(), sparsity=0.3, **options)
        assert plan.masks and plan.values
        model = sc.apply(plan, dense)
        assert masks_left([plan], model) == masks_of(plan, model) == {}
        # what a later plan masks is what it says, and not what else is zero
        sparse = plan_for("wanda", model, tiny_ids(), sparsity=0.5)
        masks = masks_left([plan, sparse], sc.apply(sparse, model))
        assert all(torch.equal(mask, sparse.masks[name]) for name, mask in masks.items())
        assert set(masks) == set(sparse.masks)


def test_zeros_that_no_plan_explains_are_told_of(tiny_llama, tiny_tokenizer):
    sparse = plan_for("magnitude", tiny_llama, tiny_ids(), sparsity=0.5)
    model = sc.apply(sparse, tiny_llama)
    options = {"length": 32, "held_out": 2}
    told = sc.heal(model, tiny_tokenizer, steps=2, options=options).recovered
    [note] = told.record.notes
    assert note.startswith("50% of the linear weights") and "keep_zeros=true" in note
    assert f"Note: {note}." in summary(told.section())
    for more in ({"plan": sparse}, {"options": {**options, "keep_zeros": True}}):
        healed = sc.heal(model, tiny_tokenizer, steps=2, **{"options": options, **more})
        assert healed.recovered.record.notes == () and "Note" not in summary(healed.recovered.section())


# mistakes


@pytest.mark.parametrize(
    ("text", "repair", "train", "given"),
    [
        (None, None, None, {}),
        ("refit", "refit", None, {}),
        ("lora", None, "lora", {}),
        ("norms:steps=10,lr=1e-4", None, "norms", {"steps": 10, "lr": 1e-4}),
        ("refit+full:loss=kl+hidden*0.1", "refit", "full", {"loss": "kl+hidden*0.1"}),
    ],
)
def test_what_heal_asks_for(text, repair, train, given):
    found, options = split_heal(text, seed=9)
    assert found == repair
    assert (options.train if options else None) == train
    for name, value in {**given, **({"seed": 9} if train else {})}.items():
        assert getattr(options, name) == value


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("loar:steps=3", UsageError, "names no training; did you mean 'lora'"),
        ("refit+lroa", UsageError, "names no training; did you mean 'lora'"),
        ("lora:steps", UsageError, "KEY=VALUE"),
        ("lora:steps=1,steps=2", UsageError, "each key once"),
        ("lora:stesp=1", OptionError, "heal has no option 'stesp'; did you mean 'steps'"),
        ("lora:steps=0", OptionError, r"steps must lie in \[1, inf\)"),
        ("lora:steps=many", OptionError, "steps must be of type int"),
        ("lora:loss=kll", OptionError, "loss joins ce, kl, hidden by .* did you mean 'kl'"),
        ("lora:loss=kl+kl", OptionError, "each once"),
        ("lora:loss=kl*0", OptionError, "weight of kl must be above 0"),
        ("lora:loss=kl*e", OptionError, "weight of kl must be a number"),
        ("lora:dtype=float16", OptionError, "dtype must be one of auto, float32, bfloat16"),
    ],
)
def test_texts_that_mean_nothing(text, error, message):
    with pytest.raises(error, match=message):
        split_heal(text)


def test_a_text_that_is_no_training_alone():
    with pytest.raises(UsageError, match="training is one of lora, full, norms"):
        parse_recovery("refit+lora")


def test_a_loss_that_is_not_a_number_leaves_the_model_alone():
    model = make_tiny("llama")
    before = weights(model)
    with pytest.raises(NonFiniteError, match=r"step \d is NaN or inf: try a lower learning rate \(lr\) than 1e\+30"):
        train(model, lr=1e30, clip=0.0, warmup=0.0)
    assert not changed(before, model) and set(weights(model)) == set(before)


def test_mistakes_in_a_sentence(tiny_llama, tiny_tokenizer, make_llama, make_tokenizer, tmp_path):
    def heal(message: str, error: type[Exception] = UsageError, **arguments: Any) -> None:
        options = {"length": 32, "held_out": 2, **arguments.pop("options", {})}
        with pytest.raises(error, match=message):
            sc.heal(tiny_llama, tiny_tokenizer, **{"steps": 1, "options": options, **arguments})

    heal("the loss kl compares with a dense model: name it with --teacher", loss="kl")
    heal("has a vocabulary of 300 tokens and the model one of 512", teacher=make_llama(vocab_size=300))
    heal("hidden states of the teacher .* leave hidden out", teacher=make_llama(hidden_size=64), loss="hidden")
    heal("no module of the blocks is called 'c_attn'.*down_proj, gate_proj", options={"targets": "c_attn"})
    heal("can't be shared by 1 rank in forwards of 3 windows", options={"micro": 3})
    heal("out= and resume= are for a checkpoint folder", out=tmp_path / "out")
    heal("is beyond the 256 positions", options={"length": 512})
    heal("calibration file .* does not exist", DataError, data=str(tmp_path / "missing.txt"))
    short = tmp_path / "short.txt"
    short.write_text("too short", encoding="utf8")
    heal("short.txt has .* tokens, fewer than one window of 32", DataError, data=str(short))
    short.write_text("just a bit longer, and yet no two windows of it " * 2, encoding="utf8")
    heal("gives one window of 32 tokens, and one more has to be held out", DataError, data=str(short))
    other = make_tokenizer(vocab_size=400)
    from secateur.engine.recovering import Teacher, check_teacher

    with pytest.raises(UsageError, match="has another vocabulary than the model"):
        check_teacher(Teacher(tiny_llama, other), tiny_llama, tiny_tokenizer, hidden=False)
    with pytest.raises(UsageError, match="heal=lora trains the cut model, which is more than a plan says"):
        sc.plan(tiny_llama, tiny_tokenizer, method="magnitude", heal="lora")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = make_tiny("llama")
    with pytest.raises(MissingExtraError, match=r"training adapters needs peft, .*pip install 'secateur\[train\]'"):
        train(model)
    assert all(p.requires_grad for p in model.parameters())


def test_an_accelerator_of_the_script_is_not_in_the_way():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        theirs = Accelerator(cpu=True, mixed_precision="bf16")
        curve = train(make_tiny("llama"))
        assert all(math.isfinite(loss) for loss in curve.losses) and theirs.mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
