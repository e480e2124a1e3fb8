"""Speed: what is run, in which order, and the arithmetic; never how fast the machine is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from secateur import timing
from secateur.errors import UsageError
from secateur.evaluation import evaluate_models, make_task, speed
from secateur.evaluation.speed import Speed, memory_bandwidth, weight_bytes_per_step

CPU = torch.device("cpu")
# before any test has put something in its place
REALLY = timing.ran_and_waited


def test_settings_are_read(tiny_llama: Any) -> None:
    assert make_task("speed") == Speed(batch=1, prompt=256, new=32, repeats=5)
    assert make_task("speed:batch=2,new=3") == Speed(batch=2, prompt=256, new=3, repeats=5)
    assert make_task("speed:new=3").name == "speed:batch=1,prompt=256,new=3,repeats=5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed:batc=2", "speed has no setting 'batc'; did you mean 'batch'"),
        ("speed:batch=0", "batch must be a whole number of at least 1, got '0'"),
        ("speed:new=many", "new must be a whole number of at least 1, got 'many'"),
    ],
)
def test_bad_settings_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_task(text)


def test_prompt_and_new_tokens_must_fit_the_model(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    # --length is no part of a request
    with pytest.raises(UsageError, match="new=32,repeats=5 takes 288 positions, and the model has 256"):
        evaluate_models(tiny_llama, tiny_tokenizer, ["speed"])
    with pytest.raises(UsageError, match="request:batch=1,prompt=250,new=7,repeats=5 takes 257 positions"):
        evaluate_models(tiny_llama, tiny_tokenizer, ["request:prompt=250,new=7"])


def test_models_take_turns_and_the_median_of_the_repeats_counts(
    make_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"a": make_llama(), "b": make_llama(seed=1)}
    order: list[str] = []
    # prefill seconds of a: 9 (warm-up), 1, 2, 5 → median 2; decode takes ten times as long, products four times
    seconds = {"a": iter([9.0, 1.0, 2.0, 5.0]), "b": iter([9.0, 4.0, 4.0, 1.0])}

    def fake(self: Speed, model: Any, seed: int) -> tuple[float, float, float]:
        name = next(n for n, m in models.items() if m is model)
        order.append(name)
        spent = next(seconds[name])
        return spent, 10 * spent, 4 * spent

    monkeypatch.setattr(Speed, "_time", fake)
    monkeypatch.setattr(speed, "memory_bandwidth", lambda device: 1e6)
    table = evaluate_models(models, tiny_tokenizer, ["speed:batch=2,prompt=30,new=10,repeats=3"])
    assert order == ["a", "b"] * 4
    assert table["prefill"].values == {"a": 2 * 30 / 2, "b": 2 * 30 / 4}
    assert table["decode"].values == {"a": 2 * 10 / 20, "b": 2 * 10 / 40}
    # of 8 tokens
    assert table["decode, products alone"].values == {"a": 2 * 8 / 8, "b": 2 * 8 / 16}
    assert table["decode bound"].values["a"] == 2 * 1e6 / weight_bytes_per_step(models["a"])
    assert "batch 2, median of 3 interleaved repeats, cpu float32" in table["decode"].protocol
    assert table["decode"].protocol.endswith(timing.PAIRED)
    assert table["prefill"].repeats == {"a": [60.0, 30.0, 12.0], "b": [15.0, 15.0, 60.0]}


def test_the_real_loop_reads_the_prompt_once_and_then_single_tokens(
    tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    hook = tiny_llama.model.embed_tokens.register_forward_hook(lambda m, args, out: shapes.append(args[0].shape))
    monkeypatch.setattr(speed, "memory_bandwidth", lambda device: 1e9)
    state = torch.random.get_rng_state()
    table = evaluate_models(tiny_llama, tiny_tokenizer, ["speed:batch=2,prompt=12,new=3,repeats=1"])
    hook.remove()
    # once to see what is multiplied
    assert shapes == [(2, 1), (2, 12), (2, 1), (2, 1), (2, 1)] * 2
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(metric.values["dense"] > 0 for metric in table)


def test_all_positions_of_a_model_can_be_used(tiny_tokenizer: Any) -> None:
    # a table of positions has no row for one more
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=512, n_positions=16))
    table = evaluate_models(model, tiny_tokenizer, ["speed:prompt=12,new=4,repeats=1"])
    assert all(metric.values["dense"] > 0 for metric in table) and len(table) == 4


def outputs(model: torch.nn.Module, names: list[str], work: Callable[[], object]) -> list[tuple[str, torch.Tensor]]:
    """What the modules named give while ``work`` runs, in the order of their calls."""
    found: list[tuple[str, torch.Tensor]] = []

    def note(name: str) -> Any:
        return lambda module, args, output: found.append((name, output))

    hooks = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    with torch.inference_mode():
        work()
    for hook in hooks:
        hook.remove()
    return found


def test_products_are_the_calls_of_modules_with_matrices_in_order() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=32, n_positions=8)).eval()
    of_a_block = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    names = [f"transformer.h.{i}.{name}" for i in range(2) for name in of_a_block] + ["lm_head"]
    ids = torch.tensor([[3], [4]])
    with torch.inference_mode():
        calls = speed.products(gpt2, lambda: gpt2(ids))
    assert len(calls) == len(names)
    whole = outputs(gpt2, names, lambda: gpt2(ids))
    alone = outputs(gpt2, names, lambda: [call() for call in calls])
    assert [name for name, _ in whole] == [name for name, _ in alone] == names
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(whole, alone, strict=True))
    assert not any(module._forward_pre_hooks for module in gpt2.modules())


def test_products_are_also_those_of_experts_whose_matrices_are_one_tensor() -> None:
    config = MixtralConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    with torch.inference_mode():
        calls = speed.products(model, lambda: model(torch.tensor([[3]])))
    # q, k, v, o, the router, the experts together and the head
    assert len(calls) == 7


def test_an_input_embedding_is_not_read_unless_it_is_tied(make_llama: Any) -> None:
    table = 512 * 32 * 4
    untied, tied = make_llama(), make_llama(tie_word_embeddings=True)
    size = sum(p.numel() * 4 for p in untied.parameters())
    assert weight_bytes_per_step(untied) == size - table
    assert weight_bytes_per_step(tied) == size - table  # the table is there once, and the head reads it
    assert weight_bytes_per_step(untied.bfloat16()) == (size - table) // 2


def test_bandwidth_counts_bytes_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(timing, "now", lambda device: float(next(clock)))
    assert memory_bandwidth(CPU, size_bytes=1000, repeats=3) == 2000.0


def test_a_protocol_says_where_other_processes_had_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([(0, 0), (800, 200), (0, 0), (990, 10), (0, 0), (0, 0)])
    monkeypatch.setattr(timing, "ran_and_waited", lambda: next(counts))
    found = []
    for _ in range(3):
        with timing.watched() as machine:
            pass
        found.append((machine.waited, bool(machine.about)))
    assert found == [(0.2, True), (0.01, False), (0.0, False)]


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="only Linux counts how long threads wait")
def test_a_busy_neighbour_on_the_same_processor_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ran_and_waited", REALLY)
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
            try:
                with timing.watched() as machine:
                    end = time.monotonic() + 1
                    while time.monotonic() < end:
                        pass
            finally:
                neighbour.kill()
    finally:
        os.sched_setaffinity(0, mine)
    assert machine.about == ", while other processes had the processors for part of the time"
