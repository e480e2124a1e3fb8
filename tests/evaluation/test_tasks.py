"""Names of models and tasks, and the table."""

from __future__ import annotations

import json
from typing import Any

import pytest

from secateur.errors import UsageError
from secateur.evaluation import Evaluation, Table, evaluate_models, make_task
from secateur.evaluation.tasks import name_models
from secateur.report import Metric

TABLE = Table(
    [
        Metric("perplexity:builtin", "", {"dense": 20.0, "pruned": 25.0}, False, "some windows"),
        Metric("prefill", "tokens/s", {"dense": 0.0, "pruned": 3.0}, True),
    ],
    ["dense", "pruned"],
)


def test_models_are_named_by_their_place() -> None:
    one, two, three = (object() for _ in range(3))
    assert name_models([one, two]) == {"dense": one, "pruned": two}  # type: ignore[list-item]
    assert list(name_models((one, two, three))) == ["dense", "pruned-1", "pruned-2"]  # type: ignore[arg-type]
    assert name_models({"a": one}) == {"a": one}  # type: ignore[dict-item]
    assert name_models(one) == {"dense": one}  # type: ignore[arg-type]


@pytest.mark.parametrize("models", [[], {}])
def test_no_model_is_refused(models: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="there is no model to evaluate"):
        evaluate_models(models, tiny_tokenizer)


@pytest.mark.parametrize(
    ("text", "near"),
    [("perplxity:builtin", "perplexity"), ("sped", "speed"), ("lmeval:hellaswag", "lm_eval")],
)
def test_an_unknown_task_suggests_the_nearest(text: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"unknown task '{text}'; did you mean '{near}'"):
        make_task(text)


def test_a_bad_task_stops_before_any_is_measured(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    steps: list[object] = []
    with pytest.raises(UsageError, match="unknown task 'quality'"):
        evaluate_models(tiny_llama, tiny_tokenizer, ["size", "quality"], progress=lambda *step: steps.append(step))
    assert steps == []


@pytest.mark.parametrize("text", ["perplexity", "perplexity:builtin", "speed", "size"])
def test_every_task_keeps_the_contract(text: str) -> None:
    assert isinstance(make_task(text), Evaluation)


def test_metrics_are_found_by_name() -> None:
    assert TABLE["perplexity:builtin"] is TABLE["perplexity"] is TABLE.metrics[0]
    assert len(TABLE) == 2
    with pytest.raises(KeyError, match="did you mean 'prefill'"):
        TABLE["prefil"]


def test_a_short_name_must_be_unique() -> None:
    table = Table([Metric("perplexity:a", "", {}), Metric("perplexity:b", "", {})], [])
    with pytest.raises(KeyError):
        table["perplexity"]


def test_the_table_becomes_json() -> None:
    document = json.loads(json.dumps(TABLE.to_dict()))
    assert document["models"] == ["dense", "pruned"]
    first, second = document["metrics"]
    assert first["values"] == {"dense": 20.0, "pruned": 25.0}
    assert first["change"] == {"pruned": 0.25}
    assert first["protocol"] == "some windows"
    assert second["change"] == {"pruned": None}


def test_the_table_prints_as_plain_text() -> None:
    text = str(TABLE)
    assert "\x1b" not in text
    row = next(line for line in text.splitlines() if "perplexity:builtin" in line)
    assert "20" in row and "25" in row and "+25" in row
    assert "dense" in text and "pruned" in text
