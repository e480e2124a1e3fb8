"""Prune a checkpoint with llm-compressor; `against_llmcompressor.py` runs this in llm-compressor's own environment.

    PEER/bin/python benchmarks/llmcompressor_peer.py MODEL --method wanda --ids IDS.npy --out DIR

Its published way: load in the checkpoint's dtype, `oneshot` with one modifier, `save_pretrained`. Everything that is
not named here has llm-compressor's default, so that its sequential pipeline runs: block by block, twice each.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--method", required=True, choices=("wanda", "sparsegpt"))
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--ids", required=True, help=".npy file, int64 [windows, tokens]")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    ids = numpy.load(arguments.ids)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        # a data set with input_ids is taken as tokenised; without an attention mask, which would be all ones, both
        # tools run the model in the same way
        dataset=Dataset.from_dict({"input_ids": ids}),
        recipe=_modifier(arguments.method, arguments.sparsity),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        batch_size=arguments.batch_size,
        # windows of equal length: the order changes nothing, and the default would draw another one in every run
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(arguments.out, save_compressed=True)
    tokenizer.save_pretrained(arguments.out)


def _modifier(method: str, sparsity: float) -> Any:
    what = {"sparsity": sparsity, "mask_structure": "0:0", "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    if method == "wanda":
        return WandaPruningModifier(**what)
    # the defaults of both tools, written out
    return SparseGPTModifier(**what, block_size=128, dampening_frac=0.01)


if __name__ == "__main__":
    main()
