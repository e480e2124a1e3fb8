"""Facts that are hidden in a prompt, and asked for behind its compressed cache: where the question stands matters.

    python benchmarks/cache_needles.py --model smollm2-135m --work FOLDER

The tasks are made offline. Every compression is measured twice, with the question behind the compressed context and
with the question at the end of what is compressed. What is done is kept in the folder, and a second call goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import write_result

import secateur as sc
from secateur.progress import Progress

PRESSES = "random_kv,streaming_llm,tova,snapkv,expected_attention,keydiff,mustafar"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--name", help="of the model in the result, where it is read from a folder")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps what is done")
    parser.add_argument("--presses", default=PRESSES)
    parser.add_argument("--ratios", default="0.5,0.75")
    parser.add_argument("--tasks", default="niah:length=4096,depths=5 kv:length=4096,depths=5")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = sc.load(arguments.model)
    assert tokenizer is not None
    found: dict[str, Any] = {}
    with Progress() as progress:
        for question in ("later", "end"):
            out = arguments.work / question
            found[question] = sc.compare_caches(
                model,
                tokenizer,
                presses=arguments.presses.split(","),
                ratios=[float(one) for one in arguments.ratios.split(",")],
                windows=0,
                needles=arguments.tasks.split(),
                question=question,
                out=out,
                resume=(out / "cache.jsonl").is_file(),
                progress=progress,
            )
    rows = [
        {
            "cache": later.spec,
            "bytes held %": 100 * later.held,
            "p(answer), asked later": later.likelihood,
            "p(answer), asked at the end": end.likelihood,
            "written % later": 100 * later.found,
            "written % at the end": 100 * end.found,
        }
        for later, end in zip(found["later"].rows, found["end"].rows, strict=True)
    ]
    name = arguments.name or Path(arguments.model).name
    setting = {"model": name, "tasks": arguments.tasks, "seed": 0, "dtype": "float32"}
    write_result(f"cache-needles-{name}", TITLE, setting, rows, TEXT)


TITLE = "Needles behind a compressed cache"
TEXT = """
Facts hidden at several depths of a prompt and asked for behind its compressed cache: the mean probability of a token of
the answer, and how often greedy decoding writes it. `later`: the context alone is compressed, and the question is read
behind it. `at the end`: the question is compressed with its context. The beginning of the sentence that the answer ends
is read behind both.

What the papers claim, and what shows on SmolLM2-135M at 4,096 tokens, of which its dense cache finds every second fact:

- Where the question is compressed with its context, SnapKV and TOVA keep what it asks for: with a quarter of the tokens
  an answer is 2 and 1.7 times as probable as behind StreamingLLM, which keeps sinks and what is recent.
- Where the question comes later, SnapKV falls to the level of StreamingLLM: it kept what the end of the context looked
  at. KeyDiff doesn't look at any question and loses nothing by that; neither does expected attention, which is hardly
  better than StreamingLLM here. TOVA, which asks the last token alone, stays at twice that.
- Half of the elements of all tokens (Mustafar) leave more of the answer than half of the tokens do by any score.
"""

if __name__ == "__main__":
    main()
