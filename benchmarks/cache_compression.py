"""How long a KV cache is compressed, from the end of a layer's attention to its store, beside reading that prompt.

    python benchmarks/cache_compression.py --model smollm2-135m --tokens 2048,4096,8192

Every prompt is really read with the cache, and the layers' own work of compressing (checking, scoring, choosing,
gathering, encoding) is taken out of that time; so nothing is copied that a prompt wouldn't copy, and both are of the
same minute of the machine. Caches take turns within every round. The result is written after every length, and a second
call goes on.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from cache_overhead import loaded
from common import finished_rows, write_result

import secateur as sc
from secateur.cache.kernels import SWITCH
from secateur.cache.layer import CompressedLayer
from secateur.observe.calibration import load_tokens

SPECS = ("mustafar:k=0.5,v=0.5", "mustafar:k=0.7,v=0.7", "think:0.5", "snapkv:0.5", "snapkv:0.5+mustafar:0.5")
KERNELS = ("mustafar",)
"""methods for which there are kernels, so that plain torch is measured beside them"""
LIMIT = 10.0
"""percent of reading 8k tokens that compressing them may take"""


@contextmanager
def compressing() -> Iterator[list[float]]:
    """Processor seconds of everything that layers compress within this context."""
    found: list[float] = []
    real = CompressedLayer.compress

    def timed(layer: CompressedLayer, *arguments: Any) -> None:
        start = time.process_time()
        real(layer, *arguments)
        found.append(time.process_time() - start)

    CompressedLayer.compress = timed  # type: ignore[method-assign]
    try:
        yield found
    finally:
        CompressedLayer.compress = real  # type: ignore[method-assign]


def read(model: Any, ids: torch.Tensor, spec: str, kernels: str) -> tuple[float, float]:
    """Processor seconds of reading a prompt, and of compressing its cache."""
    os.environ[SWITCH] = kernels
    cache = sc.compressed_cache(spec, model)
    with compressing() as found:
        start = time.process_time()
        model(ids, cache=cache, logits_to_keep=1)
        whole = time.process_time() - start
    return whole - sum(found), sum(found)


def rows_of(model: Any, ids: torch.Tensor, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per cache; its times are those of one layer."""
    ways = [(spec, "auto") for spec in SPECS]
    ways += [(spec, "torch") for spec in SPECS if any(name in spec for name in KERNELS)]
    taken: dict[tuple[str, str], list[tuple[float, float]]] = {way: [] for way in ways}
    for repeat in range(-1, arguments.rounds):
        for way in ways:
            seconds = read(model, ids, *way)
            if repeat >= 0:  # the first round warms up
                taken[way].append(seconds)
    rows, layers = [], model.config.num_hidden_layers
    for (spec, kernels), pairs in taken.items():
        percents = [100 * compressed / prefill for prefill, compressed in pairs]
        rows.append(
            {
                "tokens": ids.shape[1],
                "dtype": str(model.dtype).removeprefix("torch."),
                "cache": spec,
                "by": "plain torch" if kernels == "torch" else "kernels" if (spec, "torch") in taken else "",
                "reading ms": 1e3 * statistics.median(prefill for prefill, _ in pairs) / layers,
                "compressing ms": 1e3 * statistics.median(compressed for _, compressed in pairs) / layers,
                "% of reading": statistics.median(percents),
                "lowest %": min(percents),
                "highest %": max(percents),
            }
        )
        print(rows[-1], flush=True)
    return rows


def verdict(rows: list[dict[str, Any]]) -> str:
    """Which caches of the longest prompts are above the limit, in words."""
    longest = max(row["tokens"] for row in rows)
    over = [
        f"{row['cache']} ({row['dtype']})"
        for row in rows
        if row["tokens"] == longest and row["by"] != "plain torch" and row["% of reading"] >= LIMIT
    ]
    kept = f"Of {longest:,} tokens all are below {LIMIT:g} %."
    return f"Of {longest:,} tokens at or above {LIMIT:g} %: {', '.join(over)}." if over else kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--name", help="of the result, behind cache-compression- (default: the model's)")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--tokens", default="2048,4096,8192", help="lengths of the prompt")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--layers", type=int, default=2, help="the first layers alone; all of them cost the same")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    name = f"cache-compression-{arguments.name or arguments.model}"
    setting = {
        "model": arguments.model,
        "text": f"{arguments.text}, its first tokens",
        "layers": f"the first {arguments.layers}; times are those of one of them",
        "threads": 1,
        "rounds": f"{arguments.rounds}; one more warms up",
        "seed": 0,
    }
    rows: list[dict[str, Any]] = finished_rows(name)
    for dtype in arguments.dtypes.split(","):
        arguments.dtype = dtype
        model, tokenizer = loaded(arguments)
        for tokens in map(int, arguments.tokens.split(",")):
            if any(row["tokens"] == tokens and row["dtype"] == dtype for row in rows):
                continue
            ids = load_tokens(arguments.text, tokenizer, samples=1, length=tokens, seed=0, split="evaluation").ids
            rows += rows_of(model, ids, arguments)
            write_result(name, TITLE, setting, rows, f"{TEXT}\n{verdict(rows)}")


TITLE = "How long a KV cache is compressed beside reading the prompt"
TEXT = """
Processor time of one layer, on one thread: of reading the prompt, without compressing it, and of compressing it, from
the end of the attention to the compressed store (checking, scoring, choosing, gathering, encoding). Medians
over rounds; the percentages are medians of those within a round. All layers cost the same, so that few are enough; the
embedding and the head, of which only the last token is computed, are in the time of reading, and are next to nothing of
it. Elements are chosen and encoded by kernels, and beside them by the plain torch that does the same where there is no
compiler; everything else is torch. Other work ran on the machine at the same time.
"""

if __name__ == "__main__":
    main()
