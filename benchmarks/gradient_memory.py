"""Peak memory of what needs gradients: LLM-Pruner beside a training step, LoRAPrune beside one with true gradients.

    python benchmarks/gradient_memory.py [--model MODEL]

Every row is a process of its own, and its peak the kernel's high-water mark of resident memory. What the same command
takes on a model of next to no size is taken off: that is the libraries. A training step is one backward of a model in
memory, with the gradients of all its weights, on the windows that LLM-Pruner looks at; LLM-Pruner and LoRAPrune read a
checkpoint, in float32. Without a model a random Llama is taken that has the proportions of one of 7 billion parameters.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import finished_rows, write_result
from processes import measured

WINDOWS, LENGTH = 10, 64
TITLE = "Memory of gradients"
PRUNING = (
    "prune",
    "--samples",
    str(WINDOWS),
    "--length",
    str(LENGTH),
    "--dtype",
    "float32",
    "--dry-run",
    "--quiet",
    "--no-estimate",
)
TRAINING = ("--set", "steps=4", "--set", "every=1", "--set", "batch=1", "--set", "checkpointing=true")
ROWS: dict[str, tuple[str, ...]] = {
    "training step": (),
    "llm_pruner": (*PRUNING, "--method", "llm_pruner"),
    "llm_pruner, param_mix": (*PRUNING, "--method", "llm_pruner", "--set", "criterion=param_mix"),
    "loraprune": (*PRUNING, "--method", "loraprune", "--sparsity", "0.5", *TRAINING),
    "loraprune, true gradients": (
        *(*PRUNING, "--method", "loraprune", "--sparsity", "0.5", *TRAINING),
        *("--set", "metric=grad"),
    ),
}
LIMITS = (
    ("llm_pruner", "training step", 1.3),
    ("llm_pruner, param_mix", "training step", 1.3),
    ("loraprune", "loraprune, true gradients", 0.6),
)


SIZES = {
    "random-llama": {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 8, "num_attention_heads": 8},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="name or folder; a random Llama when it is left out")
    parser.add_argument("--child", choices=("make", "training step"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        model, tiny = arguments.model or f"{folder}/random-llama", f"{folder}/tiny"
        name = f"gradient-memory-{Path(model).name}"

        def peak(what: str, of: str) -> int:
            return measured(command(what, of), log=Path(folder) / "log", environment=os.environ).peak_bytes

        # in processes of their own: the marks of others would begin at what this one has had
        for made in [tiny] if arguments.model else [tiny, model]:
            peak("make", made)
        rows = finished_rows(name)
        for what in ROWS:
            if not any(row["what"] == what for row in rows):
                whole, libraries = peak(what, model) / 1e6, peak(what, tiny) / 1e6
                row = {"what": what, "peak MB": round(whole), "libraries MB": round(libraries)}
                rows.append({**row, "difference MB": round(whole - libraries)})
                print(rows[-1], flush=True)
                write_result(name, TITLE, setting(model), rows, text(rows))


def command(what: str, model: str) -> list[str]:
    """The command line of a row."""
    if not ROWS.get(what):
        return [sys.executable, __file__, "--child", what, "--model", model]
    verb, *options = ROWS[what]
    return [sys.executable, "-m", "secateur", verb, model, *options]


def setting(model: str) -> dict[str, Any]:
    return {
        "model": Path(model).name,
        **({"sizes": SIZES[Path(model).name]} if Path(model).name in SIZES else {}),
        "text": f"built in, {WINDOWS} windows of {LENGTH} tokens",
        "training of loraprune": f"4 steps of 1 x {LENGTH} tokens, activations computed again",
        "dtype": "float32",
    }


def random_llama(folder: str) -> None:
    """Write a checkpoint of which the embeddings are a small part, as of a large model, with a tokenizer."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from secateur.observe.calibration import builtin_text

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=2048, **SIZES[Path(folder).name])).save_pretrained(folder)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([builtin_text("calibration")], vocab_size=2048, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(folder)


def child(what: str, model: str) -> None:
    """What runs in a process that isn't a command of secateur's."""
    if what == "make":
        random_llama(model)
        return
    import secateur as sc
    from secateur.observe.calibration import load_tokens

    loaded, tokenizer = sc.load(model)
    ids = load_tokens("builtin", tokenizer, samples=WINDOWS, length=LENGTH, seed=0).ids
    loaded(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())


def text(rows: list[dict[str, Any]]) -> str:
    """What the rows show, as far as they go."""
    taken = {row["what"]: row["difference MB"] for row in rows}
    lines = ["Peak memory of one process each: in all, of the same command on a tiny model, and the difference.", ""]
    for mine, other, limit in LIMITS:
        if mine not in taken or other not in taken:
            continue
        found = taken[mine] / taken[other]
        says = "within" if found <= limit else "above"
        lines.append(f"- `{mine}` takes {found:.2f} times what `{other}` does, {says} the {limit} that were wanted.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
