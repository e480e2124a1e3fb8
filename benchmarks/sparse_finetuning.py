"""A language model that is pruned while it is fine-tuned, in transformers' Trainer, against pruning it at once.

    python benchmarks/sparse_finetuning.py --train wiki.train.txt --test wiki.test.txt

GMP brings the weights of the blocks to the sparsity within the steps of a Trainer; its rivals are one-shot magnitude at
the same sparsity of the same weights, alone and trained as long with its masks, and the dense model trained as long.
Rows are kept as they come, so a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import finished_rows, perplexity_of, write_result
from torch import Tensor
from transformers import Trainer, TrainingArguments

import secateur as sc
from secateur.observe.calibration import load_tokens
from secateur.train import SparsifierCallback

TITLE = "Sparse fine-tuning"
TEXT = """
Perplexity of {windows} windows of {length} tokens of a text that was not trained on. All rows but the dense ones have a
sparsity of {sparsity:.0%} in every matrix of the blocks; the embedding, which is the head too, stays.

- `dense`: the model as it is, and trained for {steps} steps of {batch} windows of {length} tokens of another part of
  the text, with AdamW at {lr:g} that falls linearly.
- `one shot`: magnitude, each matrix alone (`magnitude`), and the same trained as long with those masks.
- `GMP`: the same training, in which the sparsity grows from 0 by the cubic ramp, every {every} steps, until step {end}.

`train seconds` are wall time on a machine that did other work at the same time.
"""


def trained(model: Any, ids: Tensor, arguments: argparse.Namespace, callbacks: list[Any]) -> float:
    """Train in place; returns the seconds."""
    rows = [{"input_ids": window, "labels": window} for window in ids]
    with tempfile.TemporaryDirectory() as folder:
        told = TrainingArguments(
            folder,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch,
            learning_rate=arguments.lr,
            seed=arguments.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        started = time.perf_counter()
        Trainer(model, told, train_dataset=rows, callbacks=callbacks).train()
    model.eval()
    return time.perf_counter() - started


def variants(arguments: argparse.Namespace) -> dict[str, Callable[[Any, Any, Tensor], tuple[Any, float]]]:
    """Name → what makes a copy of the dense model into the one that is measured, and how long it was trained."""
    sparsity, end = arguments.sparsity, arguments.steps * 2 // 3

    def gmp(model: Any, tokenizer: Any, ids: Tensor) -> tuple[Any, float]:
        callback = SparsifierCallback(method="gmp", sparsity=sparsity, end=end, every=arguments.every)
        return model, trained(model, ids, arguments, [callback])

    def masked(model: Any, tokenizer: Any, ids: Tensor) -> tuple[Any, float]:
        plan = sc.plan(model, tokenizer, method="magnitude", sparsity=sparsity)
        model = sc.apply(plan, model)
        # nothing is left for the schedule to remove
        callback = SparsifierCallback(method="gmp", sparsity=sparsity, end=1, every=1, ramp="constant", masks=plan)
        return model, trained(model, ids, arguments, [callback])

    def one_shot(model: Any, tokenizer: Any, ids: Tensor) -> tuple[Any, float]:
        return sc.prune(model, tokenizer, method="magnitude", sparsity=sparsity).model, 0.0

    return {
        "dense": lambda model, tokenizer, ids: (model, 0.0),
        "one shot": one_shot,
        "GMP": gmp,
        "one shot, then trained": masked,
        "dense, trained": lambda model, tokenizer, ids: (model, trained(model, ids, arguments, [])),
    }


def zeros(model: Any) -> float:
    """Fraction of the weights of the blocks' matrices that is zero."""
    matrices = [m.tensor for m in sc.anatomy(model).matrices]
    weights = [model.get_parameter(name) for name in matrices]
    return 1.0 - sum(int(torch.count_nonzero(w)) for w in weights) / sum(w.numel() for w in weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", type=Path, required=True, help="text to train on")
    parser.add_argument("--test", type=Path, required=True, help="text to measure on")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="windows of a step (default 8)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window (default 256)")
    parser.add_argument("--windows", type=int, default=40, help="windows that are measured (default 40)")
    parser.add_argument("--every", type=int, default=5, help="steps from one update to the next (default 5)")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = f"sparse-finetuning-{arguments.model}"
    dense, tokenizer = sc.load(arguments.model, dtype="float32")
    samples = arguments.steps * arguments.batch
    ids = load_tokens(arguments.train, tokenizer, samples=samples, length=arguments.length, allow_fewer=True).ids
    # the models carry the name of a folder of this machine otherwise
    setting = {key: value for key, value in vars(arguments).items() if key not in ("train", "test")}
    setting |= {"trained on": arguments.train.name, "measured on": arguments.test.name}
    rows = finished_rows(name)
    for variant, make in variants(arguments).items():
        if any(row["model"] == variant for row in rows):
            continue
        model, seconds = make(copy.deepcopy(dense), tokenizer, ids)
        measured = perplexity_of(
            model, tokenizer, str(arguments.test), windows=arguments.windows, length=arguments.length
        )
        rows.append({"model": variant, "sparsity": zeros(model), "perplexity": measured, "train seconds": seconds})
        print(rows[-1], flush=True)
        text = TEXT.format(**{**vars(arguments), "end": arguments.steps * 2 // 3})
        if left := [f"`{v}`" for v in variants(arguments) if all(row["model"] != v for row in rows)]:
            text += f"\nNot run yet: {', '.join(left)}.\n"
        write_result(name, TITLE, setting, rows, text)


if __name__ == "__main__":
    main()
