"""The one sentence and the example that ``--help`` shows for every command.

The examples are a session in one folder: later ones use what earlier ones wrote, and the tests run them in order.
"""

from __future__ import annotations

HELP: dict[str, tuple[str, str]] = {
    "methods": ("List the methods and what each of them cuts.", "secateur methods --object weights"),
    "describe": (
        "Explain a method: source, equations, options with unit, default and range.",
        "secateur describe flap",
    ),
    "allocators": (
        "List the allocators, which say where the sparsity goes, or explain one.",
        "secateur allocators owl",
    ),
    "inspect": (
        "Show what can be cut in a model, what a unit costs, and what is frozen and why.",
        "secateur inspect smollm2-135m",
    ),
    "estimate": (
        "Say what pruning will take (memory, disk, time) from the config alone, and what would make it fit.",
        "secateur estimate smollm2-135m --method sparsegpt --samples 128 --memory 16GB",
    ),
    "prune": (
        "Prune a model, measure it beside the dense one, and save it.",
        "secateur prune smollm2-135m --method flap --sparsity 0.2 --evaluate perplexity:builtin --out pruned",
    ),
    "heal": (
        "Train a pruned model for a while, so that it makes up for what was removed.",
        "secateur heal pruned --teacher smollm2-135m --steps 10 --batch 2 --length 64 --out healed",
    ),
    "train": (
        "Train a network sparse, or dense, as a recipe says: data, network, optimizer, masks, evaluation.",
        "secateur train train.yaml --out trained",
    ),
    "lottery": (
        "Train, prune and rewind a network level by level, and hold its tickets against controls.",
        "secateur lottery lottery.yaml --workers 1 --out tickets",
    ),
    "verify": (
        "Check that a checkpoint is whole and is what its plan says.",
        "secateur verify pruned --base smollm2-135m",
    ),
    "convert": (
        "Write a model as safetensors, or for other runtimes: as GGUF, DeciLM or ONNX.",
        "secateur convert pruned --to gguf --dtype q8_0 --out pruned.gguf",
    ),
    "plan show": ("Show what a plan keeps and where it came from.", "secateur plan show pruned"),
    "plan apply": (
        "Cut a model by an existing plan and save it.",
        "secateur plan apply pruned smollm2-135m --out again",
    ),
    "plan diff": ("Show where two plans differ.", "secateur plan diff pruned again"),
    "plan merge": (
        "Join two plans for different parts of one model.",
        "secateur plan merge pruned/plan sparse/plan --out merged",
    ),
    "evaluate": (
        "Measure models side by side; the first is the baseline.",
        "secateur evaluate smollm2-135m pruned --task perplexity:builtin --task size",
    ),
    "latency-table": (
        "Measure what a request takes by the widths of a model's blocks, for budgets of latency.",
        "secateur latency-table smollm2-135m --workload batch=1,prompt=16,new=2 --out latency.csv",
    ),
    "cache fit": (
        "Fit the surrogate by which kvzap scores tokens, to a text like those that will be read.",
        "secateur cache fit smollm2-135m --samples 2 --length 64 --rows 32 --out surrogate",
    ),
    "sweep": (
        "Prune a model at many settings, and show which of them are worth having.",
        "secateur sweep sweep.yaml --workers 1 --out sweep",
    ),
    "curve": (
        "Show how quality falls with sparsity, where its knee is, and which sparsity to take.",
        "secateur curve smollm2-135m --method magnitude --sparsities 0.2:0.8 --points 3 --windows 4 --out curve",
    ),
    "stability": (
        "Train two copies of a network in different orders, and show whether the line between them rises.",
        "secateur stability net.py:network --train net.py:train --evaluate net.py:accuracy --at 0,10 --out stable",
    ),
    "compare": (
        "Hold methods against each other at equal budgets, and say which is best and how sure that is.",
        "secateur compare smollm2-135m --methods wanda_sp,random_sp --samples 4 --length 64 --windows 4 --out compared",
    ),
    "cache compare": (
        "Hold compressions of the KV cache against each other at equal bytes.",
        "secateur cache compare smollm2-135m --presses streaming_llm,mustafar --prefix 96 --after 16 --windows 2 "
        "--needle kv:length=240,depths=2 --out caches",
    ),
    "cache recommend": (
        "Find a compression of the KV cache with which a context fits into so much memory.",
        "secateur cache recommend smollm2-135m --context 8192 --memory 64MiB",
    ),
}


def help_text(command: str) -> str:
    """Sentence and example, with the mark that keeps the line breaks of the example."""
    sentence, example = HELP[command]
    return f"{sentence}\n\n\b\nExample:\n  {example}"
