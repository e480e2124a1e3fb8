"""Items of lm-eval from local files: answers that are chosen by their likelihood, and words that the model writes.

arc_easy        question, choices {text, label} and answerKey; the likeliest answer
lambada_openai  context and continuation, the last word of a text; written greedily
ioi             prompt and answer, the one of two names that is meant; written greedily
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

LIMIT = 100
_BATCH = 10

_COMMON = """
dataset_path: json
dataset_kwargs:
  data_files: {data}
  cache_dir: {cache}
test_split: train
metadata:
  version: 1.0
"""
_CHOSEN = """
task: {name}
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices.text}}}}"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
# the first word of what was written, without the punctuation behind it
_WRITTEN = """
task: {name}
output_type: generate_until
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
doc_to_text: "{{{{%s}}}}"
doc_to_target: "{{{{%s}}}}"
filter_list:
  - name: word
    filter:
      - function: regex
        regex_pattern: "([\\\\w'’-]+)"
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
_TASKS = {
    "arc_easy": _CHOSEN,
    "lambada_openai": _WRITTEN % ("context", "continuation"),
    "ioi": _WRITTEN % ("prompt", "answer"),
}


def tasks(files: Sequence[str], work: Path) -> list[str]:
    """Tasks of the first items of the files, as ``evaluate`` takes them; their settings are written into ``work``."""
    found = []
    for file in files:
        data = Path(file).resolve()
        name = name_of(file)
        if name not in _TASKS or not data.is_file():
            raise SystemExit(f"--items takes files of {', '.join(_TASKS)} (.jsonl or .jsonl.gz), got {file}")
        work.mkdir(parents=True, exist_ok=True)
        path = work / f"{name}.yaml"
        text = (_TASKS[name] + _COMMON).format(name=name, data=data, cache=work / "data")
        path.write_text(text, encoding="utf8")
        found.append(f"lm_eval:{path}?limit={LIMIT}&batch={_BATCH}")
    return found


def name_of(file: str) -> str:
    """The task of a file, and the column of what it gives."""
    return Path(file).name.partition(".")[0]


def columns(metrics: Iterable[str]) -> list[tuple[str, str]]:
    """(metric, column) of those that are of tasks of these, such as (``arc_easy acc``, ``arc_easy``)."""
    return [(metric, metric.partition(" ")[0]) for metric in metrics if metric.partition(" ")[0] in _TASKS]
