"""Perplexity against the formula, its windows, its protocol, its errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import pieces
from secateur.errors import DataError, NonFiniteError, UsageError
from secateur.evaluation import evaluate_models, perplexity
from secateur.evaluation.perplexity import window_losses
from secateur.observe.calibration import load_tokens


def by_hand(model: Any, windows: torch.Tensor) -> float:
    total, count = 0.0, 0
    for window in windows:
        with torch.no_grad():
            chances = model(window[None]).logits[0].double().softmax(-1)
        for position in range(1, len(window)):
            total -= math.log(float(chances[position - 1, window[position]]))
            count += 1
    return math.exp(total / count)


def test_the_value_is_the_formula(make_llama: Any, tiny_tokenizer: Any) -> None:
    models = {"dense": make_llama(), "other": make_llama(seed=3)}
    models["other"].train()
    table = evaluate_models(models, tiny_tokenizer, ["perplexity:builtin"], length=24, windows=5)
    assert models["other"].training
    windows = load_tokens("builtin", tiny_tokenizer, samples=5, length=24, split="evaluation").ids
    for name, model in models.items():
        expected = by_hand(model.eval(), windows)
        assert math.isclose(table["perplexity"].values[name], expected, rel_tol=1e-5)


def test_the_losses_of_the_windows_are_kept(make_llama: Any, tiny_tokenizer: Any) -> None:
    models = {"dense": make_llama(), "other": make_llama(seed=3)}
    metric = evaluate_models(models, tiny_tokenizer, ["perplexity:builtin"], length=24, windows=5)["perplexity"]
    ids = load_tokens("builtin", tiny_tokenizer, samples=5, length=24, split="evaluation").ids
    for name, model in models.items():
        assert metric.parts[name] == window_losses(model, ids).tolist()
        assert metric.values[name] == math.exp(sum(metric.parts[name]) / 5)
    assert metric.exponential


def test_uniform_logits_give_the_size_of_the_vocabulary(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    torch.nn.init.zeros_(tiny_llama.lm_head.weight)
    table = evaluate_models(tiny_llama, tiny_tokenizer, "perplexity:builtin", length=16, windows=3)
    assert math.isclose(table["perplexity"].values["dense"], 512, rel_tol=1e-6)


def test_batches_and_chunks_do_not_change_the_losses(
    tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = load_tokens("builtin", tiny_tokenizer, samples=7, length=40).ids
    whole = window_losses(tiny_llama, ids)
    seen: list[int] = []
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 80)
    monkeypatch.setitem(pieces._ENTRIES, "cpu", 7 * 512)
    torch.testing.assert_close(window_losses(tiny_llama, ids, seen.append), whole)
    assert seen == [2, 4, 6, 7]
    monkeypatch.setattr(perplexity, "BATCH_LOGIT_BYTES", 1)
    seen.clear()
    torch.testing.assert_close(window_losses(tiny_llama, ids, seen.append), whole)
    assert seen == [1, 2, 3, 4, 5, 6, 7]


def test_the_loss_is_float32_for_a_bfloat16_model(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    ids = load_tokens("builtin", tiny_tokenizer, samples=2, length=40).ids
    model = tiny_llama.bfloat16()
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    torch.testing.assert_close(window_losses(model, ids), expected.double(), rtol=1e-5, atol=0)


def test_the_protocol_states_everything(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    path = tmp_path / "some.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, again and again\n" * 30)
    table = evaluate_models(tiny_llama, tiny_tokenizer, [f"perplexity:{path}"], length=64, windows=5)
    assert table.metrics[0].name == "perplexity:some.txt"
    assert table.metrics[0].protocol == (
        "some.txt; file as it is; 5 consecutive windows of 64 tokens (stride 64); 320 tokens; 63 predictions a window"
    )
    assert table.metrics[0].higher_is_better is False


def test_a_short_text_is_used_whole_and_said(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    path = tmp_path / "some.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, again and again\n" * 10)
    available = len(tiny_tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]) // 64
    table = evaluate_models(tiny_llama, tiny_tokenizer, [f"perplexity:{path}"], length=64, windows=999)
    assert f"{available} of 999 asked consecutive windows" in table["perplexity"].protocol
    path.write_text("too short")
    with pytest.raises(DataError, match=r"evaluation text some\.txt has .* fewer than one window of 64"):
        evaluate_models(tiny_llama, tiny_tokenizer, [f"perplexity:{path}"], length=64, windows=1)


def test_self_is_sampled_from_the_first_model(make_llama: Any, tiny_tokenizer: Any) -> None:
    models = [make_llama(), make_llama(seed=5)]
    table = evaluate_models(models, tiny_tokenizer, ["perplexity:self"], length=16, windows=4)
    windows = load_tokens("self", tiny_tokenizer, samples=4, length=16, split="evaluation", model=models[0]).ids
    assert math.isclose(table["perplexity"].values["pruned"], by_hand(models[1], windows), rel_tol=1e-5)


def test_nan_names_the_model_and_the_window(make_llama: Any, tiny_tokenizer: Any) -> None:
    broken = make_llama()
    ids = load_tokens("builtin", tiny_tokenizer, samples=6, length=16, split="evaluation").ids
    token = next(int(t) for t in ids[2] if not (ids[:2] == t).any())  # first met in the third window
    broken.model.embed_tokens.weight.data[token] = float("nan")
    with pytest.raises(NonFiniteError, match="loss of model pruned is NaN or inf in window 3 of builtin"):
        evaluate_models([make_llama(), broken], tiny_tokenizer, ["perplexity:builtin"], length=16, windows=6)


def test_a_perplexity_beyond_float64_is_an_error(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    tiny_llama.lm_head.weight.data.mul_(1e6)
    with pytest.raises(NonFiniteError, match="perplexity of model dense is beyond 1e308"):
        evaluate_models(tiny_llama, tiny_tokenizer, ["perplexity"], length=16, windows=2)


def test_windows_beyond_the_positions_are_refused(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="length 300 is beyond the 256 positions"):
        evaluate_models(tiny_llama, tiny_tokenizer, ["perplexity:builtin"], length=300, windows=2)
