"""lm-eval tasks on models in memory, offline."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from secateur.errors import DataError, MissingExtraError, UsageError
from secateur.evaluation import evaluate_models, make_task
from secateur.evaluation.lm_eval_task import LmEval

ITEMS = [
    {"question": f"which number is {n}?", "choices": [f" {n}", f" {n + 1}", " none of them"], "answer": n % 3}
    for n in range(8)
]

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {data}
  cache_dir: {cache}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3.0
"""


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    data = tmp_path / "items.jsonl"
    data.write_text("\n".join(json.dumps(item) for item in ITEMS))
    path = tmp_path / "tiny_choice.yaml"
    path.write_text(TASK.format(data=data, cache=tmp_path / "cache"))
    return path


def expected_accuracy(model: Any, tokenizer: Any, items: list[dict[str, Any]]) -> float:
    """By hand: the choice of the largest log-likelihood is right."""
    right = 0
    for item in items:
        sums = []
        for choice in item["choices"]:
            context = tokenizer(item["question"], add_special_tokens=False)["input_ids"]
            whole = tokenizer(item["question"] + choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(float(logs[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        right += sums.index(max(sums)) == item["answer"]
    return right / len(items)


def test_a_local_task_is_scored_as_by_hand(
    task_file: Path, make_llama: Any, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {"dense": make_llama(), "other": make_llama(seed=1)}
    models["other"].train()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    table = evaluate_models(models, tiny_tokenizer, [f"lm_eval:{task_file}"])
    assert [metric.name for metric in table] == ["tiny_choice acc", "tiny_choice acc_norm"]
    models["other"].train(False)
    for name, model in models.items():
        by_hand = expected_accuracy(model, tiny_tokenizer, ITEMS)
        assert math.isclose(table["tiny_choice acc"].values[name], by_hand)
    metric = table["tiny_choice acc"]
    assert metric.higher_is_better is True
    assert "task version 3.0, 0-shot, 8 of 8 items, multiple choice" in metric.protocol
    # what the value is the mean of, item by item
    for name, items in metric.parts.items():
        assert len(items) == 8 and set(items) <= {0.0, 1.0} and sum(items) / 8 == metric.values[name]
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert capsys.readouterr().out == ""


def test_generated_answers_are_scored_item_by_item(task_file: Path, make_llama: Any, tiny_tokenizer: Any) -> None:
    path = task_file.with_name("tiny_answer.yaml")
    text = task_file.read_text().replace("tiny_choice", "tiny_answer").replace("multiple_choice", "generate_until")
    text = text.replace('doc_to_choice: "{{choices}}"\n', "generation_kwargs: {until: [zz], max_gen_toks: 3}\n")
    text = text.replace("doc_to_target: answer", 'doc_to_target: "{{answer}}"')
    text = text.replace("metric: acc\n", "metric: exact_match\n").replace("acc_norm", "exact_match")
    path.write_text(text[: text.rindex("  - metric")] + text[text.index("metadata:") :])
    (metric,) = evaluate_models(make_llama(), tiny_tokenizer, [f"lm_eval:{path}?limit=4"])
    assert metric.name == "tiny_answer exact_match" and metric.protocol.endswith("4 of 8 items, generate until")
    assert metric.parts == {"dense": [0.0] * 4} and metric.values == {"dense": 0.0}


def test_limit_takes_the_first_items(task_file: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    table = evaluate_models(
        tiny_llama, tiny_tokenizer, [f"lm_eval:{task_file}?limit=5"], progress=lambda *step: seen.append(step)
    )
    assert table["tiny_choice acc"].values["dense"] == expected_accuracy(tiny_llama, tiny_tokenizer, ITEMS[:5])
    assert "5 of 8 items" in table["tiny_choice acc"].protocol
    assert seen == [("lm_eval:tiny_choice.yaml", 1, 1)]


def test_a_task_whose_data_are_missing_gives_one_sentence(
    task_file: Path, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    (task_file.parent / "items.jsonl").unlink()
    with pytest.raises(DataError, match=r"lm_eval:tiny_choice\.yaml can't be run: ") as caught:
        evaluate_models(tiny_llama, tiny_tokenizer, [f"lm_eval:{task_file}"])
    assert "\n" not in str(caught.value)


def test_settings_are_read_from_the_query() -> None:
    task = make_task("lm_eval:hellaswag?limit=100&fewshot=0&batch=4")
    assert task == LmEval("hellaswag", limit=100, fewshot=0, batch=4)
    assert task.name == "lm_eval:hellaswag"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lm_eval", "lm_eval needs a task"),
        ("lm_eval:hellaswag?limt=3", "lm_eval has no setting 'limt'; did you mean 'limit'"),
        ("lm_eval:hellaswag?limit=0", "limit must be a whole number, got '0'"),
        ("lm_eval:hellaswag?limit=half", "limit must be a whole number, got 'half'"),
        ("lm_eval:nowhere.yaml", "lm_eval task file nowhere.yaml does not exist"),
    ],
)
def test_bad_tasks_are_refused_before_anything_runs(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_task(text)


class FewTasks:
    """Stands in for lm-eval's own index, which takes seconds to build."""

    all_tasks = ("hellaswag", "winogrande")


def test_an_unknown_task_suggests_the_nearest(
    tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", FewTasks)
    with pytest.raises(UsageError, match="lm-eval has no task 'helaswag'; did you mean 'hellaswag'"):
        evaluate_models(tiny_llama, tiny_tokenizer, ["lm_eval:helaswag"])


def test_a_missing_lm_eval_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"secateur\[eval\]"):
        make_task("lm_eval:hellaswag")
