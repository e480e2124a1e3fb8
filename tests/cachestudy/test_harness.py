"""Tasks of lm-eval behind compressed prompts, on local data in the form of LongBench."""

from __future__ import annotations

import json

import pytest
import torch

import secateur as sc
from secateur.cache.compressed import CompressedCache
from secateur.cachestudy.results import columns
from secateur.errors import DataError, UsageError

# what lm-eval's longbench_qasper.yaml says, with a score that needs no further library
TASK = """
task: long_answers
dataset_path: json
dataset_kwargs:
  data_files: {data}
  cache_dir: {cache}
test_split: train
output_type: generate_until
doc_to_text: "Article: {{{{context}}}}\\n\\nQuestion: {{{{question}}}}\\n\\nAnswer:"
doc_to_target: '{{{{answers}}}}'
process_results: !function scoring.length
generation_kwargs: {{max_gen_toks: 8, do_sample: false, until: []}}
metric_list:
  - metric: score
    aggregation: mean
    higher_is_better: true
"""
SCORING = """
def length(doc, results):
    return {"score": float(sum(map(ord, results[0])) % 97)}
"""


@pytest.fixture
def task_file(tmp_path):
    items = [{"context": f"number {n} " * 12, "question": "which number?", "answers": [str(n)]} for n in range(3)]
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    (tmp_path / "scoring.py").write_text(SCORING)
    path = tmp_path / "long_answers.yaml"
    path.write_text(TASK.format(data=tmp_path / "items.jsonl", cache=tmp_path / "cache"))
    return path


def test_answers_are_written_behind_compressed_prompts(task_file, make_llama, tiny_tokenizer, tmp_path, monkeypatch):
    model, made = make_llama(), []
    with torch.no_grad():  # or what was read before would hardly matter
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 20
            layer.self_attn.o_proj.weight *= 20
    real = CompressedCache.__init__

    def counted(cache, methods, *arguments):
        real(cache, methods, *arguments)
        made.append((methods, cache))

    monkeypatch.setattr(CompressedCache, "__init__", counted)
    task = f"lm_eval:{task_file}?limit=2"
    arguments = {"presses": ["streaming_llm:sinks=1"], "ratios": [0.9], "windows": 0, "tasks": [task]}
    found = sc.compare_caches(model, tiny_tokenizer, **arguments, out=tmp_path / "out")
    used = [cache for _, cache in made if cache.get_seq_length()]
    # two prompts with either cache
    assert len(used) == 4 and len({cache.get_seq_length() for cache in used}) == 1
    dense, pressed = found.rows
    assert dense.held == 1.0 and pressed.held < 0.2
    expected = sc.evaluate({"model": model}, tiny_tokenizer, [task])["long_answers score"].values["model"]
    assert dense.scores == {"long_answers score": expected}
    assert pressed.scores["long_answers score"] != expected
    header, rows = columns(found)
    assert header == ["cache", "held", "ideal", "long_answers score"] and rows[1][0].startswith("streaming_llm:0.9")
    document = json.loads((tmp_path / "out" / "cache.json").read_text())
    assert document["rows"][0]["scores"] == {"long_answers score": expected}
    made.clear()
    again = sc.compare_caches(model, tiny_tokenizer, **arguments, out=tmp_path / "out", resume=True)
    assert again.rows == found.rows and not made


def test_what_cant_be_measured_is_said_before_anything_is_written(task_file, tiny_llama, tiny_tokenizer, tmp_path):
    def refused(task, error, message):
        arguments = {"presses": ["knorm"], "windows": 0, "tasks": [task], "out": tmp_path / "out"}
        with pytest.raises(error, match=message) as caught:
            sc.compare_caches(tiny_llama, tiny_tokenizer, **arguments)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    refused("hellaswag", UsageError, "tasks are lm_eval:TASK, whose answers are written behind the cache, got")
    text = task_file.read_text()
    task_file.write_text(text.replace("generate_until", "multiple_choice\ndoc_to_choice: [a, b]"))
    refused(f"lm_eval:{task_file}", UsageError, "are ranked by their likelihood")
    task_file.write_text(text)
    (tmp_path / "scoring.py").write_text("raise ImportError('Please install\\n what scores this')")
    refused(f"lm_eval:{task_file}", DataError, "long_answers.yaml can't be run: Please install what scores this")
    (tmp_path / "scoring.py").write_text(SCORING)
    (tmp_path / "items.jsonl").unlink()
    refused(f"lm_eval:{task_file}", DataError, r"lm_eval:long_answers\.yaml can't be run: ")
