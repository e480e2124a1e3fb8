"""Vocabularies cut to English: what goes, and what is left of the perplexity of the same text.

    python benchmarks/vocabulary.py smollm2-135m --calibration english.txt --evaluation wikitext2_test.txt essays.txt

Tokens are counted in the calibration text. Every model reads the same windows of the evaluation texts in its own
tokens; losses are per token of the dense tokenizer. Rows that are there already are not made again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from common import finished_rows, write_result

import secateur as sc
from secateur.evaluation.perplexity import reread
from secateur.models.fingerprint import display_name
from secateur.observe.calibration import load_tokens

TEXT = """
`parameters` is the fraction of all parameters that leave with the tokens. Perplexities are of the same text in the
tokens of each model, per token of the dense tokenizer, so that they can be compared; `more tokens` is how much longer
the text of all windows is in the tokens that are left. `windows` are those of calibration and of evaluation. `seconds`
count tokens, decide and cut, tokenizer included.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", nargs="+", required=True)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.15, 0.25, 0.35, 0.5])
    parser.add_argument("--samples", type=int, default=4000, help="calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--note", default="", help="what the table shows, for the page")
    arguments = parser.parse_args()
    name = f"vocabulary-{Path(arguments.model).name}"
    title = f"Vocabulary of {Path(arguments.model).name} cut to English"
    rows = finished_rows(name)
    model, tokenizer = sc.load(arguments.model)
    texts = {f"perplexity, {Path(text).stem}": text for text in arguments.evaluation}
    asked = {"samples": arguments.windows, "length": 512, "split": "evaluation", "allow_fewer": True}
    windows = {column: load_tokens(text, tokenizer, **asked) for column, text in texts.items()}

    def perplexities(one: Any, own: Any) -> dict[str, float]:
        tasks = [f"perplexity:{text}" for text in texts.values()]
        table = sc.evaluate({"one": one}, tokenizer, tasks, windows=arguments.windows, tokenizers={"one": own})
        return {column: metric.values["one"] for column, metric in zip(texts, table, strict=True)}

    setting = {
        "model": display_name(model),
        "tokens of the vocabulary": model.config.vocab_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "method": "vocab, defaults",
        "calibration": f"{Path(arguments.calibration).name}, windows of 512 tokens",
        "evaluation": f"windows of 512 tokens of {', '.join(Path(t).name for t in texts.values())}",
        "seeds": "nothing is random",
    }
    # rows of a shorter protocol are not those of a longer one
    asked_windows = f"{arguments.samples}, {arguments.windows}"
    for sparsity in [0.0, *arguments.sparsities]:
        if any((row["sparsity"], row["windows"]) == (sparsity, asked_windows) for row in rows):
            continue
        started = time.perf_counter()
        cut, own, used = model, tokenizer, 0.0
        if sparsity:
            made = sc.prune(
                model, tokenizer, method="vocab", sparsity=sparsity, calibration=arguments.calibration,
                samples=arguments.samples, length=512,
            )  # fmt: skip
            cut, own, used = made.model, made.tokenizer, time.perf_counter() - started
        left = sum(p.numel() for p in cut.parameters())
        longer = [sum(map(len, reread(found, tokenizer, own))) / found.ids.numel() - 1 for found in windows.values()]
        row = {"sparsity": sparsity, "windows": asked_windows, "tokens": cut.config.vocab_size}
        row["parameters"] = f"{1 - left / setting['parameters']:.1%}"
        found = perplexities(cut, own)
        dense = next((r for r in rows if r["sparsity"] == 0 and r["windows"] == asked_windows), found)
        for column, more in zip(found, longer, strict=True):
            text = column.partition(", ")[2]
            row |= {column: found[column], f"change, {text}": f"{found[column] / dense[column] - 1:+.2%}"}
            row[f"more tokens, {text}"] = f"{more:.2%}"
        rows.append({**row, "seconds": used})
        rows.sort(key=lambda row: (row["windows"], row["sparsity"]))
        print(row, flush=True)
        write_result(name, title, setting, rows, TEXT + arguments.note)
    write_result(name, title, setting, rows, TEXT + arguments.note)


if __name__ == "__main__":
    main()
