"""How fast a compressed KV cache decodes: attention over one layer, and a whole model, beside the dense cache.

    python benchmarks/cache_decode.py --model smollm2-135m

Attention is measured on random keys and values of the shapes of two models. Dense and compressed take turns within
every round, on several copies that together are larger than the processor's caches, so that memory is what is read;
medians of rounds, and medians of ratios within a round, are reported. The roofline is what bytes alone allow.
``--study attention`` or ``model`` takes a part; the result is written after every row, and a second call goes on.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import finished_rows, write_result
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

import secateur as sc
from secateur.cache.attention import Visible, mixed_attention, reference_attention
from secateur.cache.kernels import cpu
from secateur.cache.layer import CompressedLayer
from secateur.cache.rows import DenseRows
from secateur.cache.store import Store
from secateur.cache.tiles import BitmapRows
from secateur.methods.cache.mustafar import Mustafar
from secateur.timing import take_turns

# query heads, key-value heads, head dimension
SHAPES = {"smollm2-135m": (9, 3, 64), "llama-3-8b": (32, 8, 128)}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BY = ("token", "channel")
WINDOW = 32
COPIES_BYTES = 128 * 2**20
"""of dense copies that are taken in turns; more than processors hold near themselves"""


class Copy:
    """One dense cache of random numbers, and the same compressed."""

    def __init__(
        self, shape: tuple[int, int, int], tokens: int, dtype: torch.dtype, sparsity: float, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        heads, kv_heads, width = shape
        dense = (torch.randn(1, kv_heads, tokens, width, generator=generator).to(dtype) for _ in range(2))
        self.keys, self.values = dense
        self.query = torch.randn(1, heads, 1, width, generator=generator).to(dtype)
        older, method = (tokens - WINDOW) // 64 * 64, Mustafar(sparsity=sparsity)
        lengths = torch.full((1, kv_heads), older)
        rows = [side[:, :, :older].flatten(0, 2) for side in (self.keys, self.values)]
        pruned = [x.masked_fill(~method.element_mask(x, "keys"), 0) for x in rows]
        self.store = Store(lengths, *(BitmapRows.encode(x, lengths, by) for x, by in zip(pruned, BY, strict=True)))
        self.whole = Store(lengths, *(DenseRows(x.clone()) for x in rows))
        self.tail = self.keys[:, :, older:].clone(), self.values[:, :, older:].clone()
        self.positions = torch.arange(older, tokens).expand(1, kv_heads, tokens - older)
        self.visible, self.scaling = Visible(None, 1, tokens), width**-0.5

    def sdpa(self) -> Tensor:
        return F.scaled_dot_product_attention(self.query, self.keys, self.values, enable_gqa=True)

    def grouped(self) -> Tensor:
        """The query heads of a group as if they were tokens, which torch is faster at."""
        query = self.query.view(1, self.keys.shape[1], -1, self.query.shape[-1])
        return F.scaled_dot_product_attention(query, self.keys, self.values)

    def over(self, store: Store, attention: Callable[..., Tensor]) -> Tensor:
        return attention(self.query, store, self.tail, self.positions, self.visible, self.scaling)

    def bytes_of(self, store: Store | None) -> int:
        held = [self.keys, self.values] if store is None else [*store.tensors().values(), *self.tail]
        return sum(x.numel() * x.element_size() for x in held)


def attention_row(name: str, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Dense sdpa, the same with grouped queries, and the kernel over bitmaps and over dense rows."""
    heads, kv_heads, width = SHAPES[name]
    size = 2 * kv_heads * width * arguments.tokens * DTYPES[dtype].itemsize
    count = max(2, COPIES_BYTES // size)
    copies = [Copy(SHAPES[name], arguments.tokens, DTYPES[dtype], arguments.sparsity, seed) for seed in range(count)]
    turn = iter(range(10**9))

    def on_a_copy(work: Callable[[Copy], object]) -> None:
        work(copies[next(turn) % count])

    works = {
        "sdpa": Copy.sdpa,
        "grouped sdpa": Copy.grouped,
        "kernel": lambda c: c.over(c.store, mixed_attention),
        "kernel, dense rows": lambda c: c.over(c.whole, mixed_attention),
        # reads every byte of a dense cache and does next to nothing with it
        "reading": lambda c: [x.view(torch.int32).amax() for x in (c.keys, c.values)],
    }
    slow = {"reference": lambda c: c.over(c.store, reference_attention)}
    found = timed({n: partial(on_a_copy, w) for n, w in works.items()}, arguments.repeats)
    found |= timed({n: partial(on_a_copy, w) for n, w in slow.items()}, 3)
    bytes_dense, bytes_held = copies[0].bytes_of(None), copies[0].bytes_of(copies[0].store)
    milliseconds = {n: 1e3 * statistics.median(times) for n, times in found.items()}
    return {
        "what": f"attention, {name}",
        "heads": f"{heads}/{kv_heads} of {width}",
        "dtype": dtype,
        "sdpa ms": milliseconds["sdpa"],
        "grouped sdpa ms": milliseconds["grouped sdpa"],
        "kernel dense ms": milliseconds["kernel, dense rows"],
        "reference ms": milliseconds["reference"],
        "kernel ms": milliseconds["kernel"],
        "x sdpa": ratio(found["sdpa"], found["kernel"]),
        "x grouped sdpa": ratio(found["grouped sdpa"], found["kernel"]),
        "x kernel dense": ratio(found["kernel, dense rows"], found["kernel"]),
        "x by bytes": bytes_dense / bytes_held,
        "x reading dense": ratio(found["reading"], found["kernel"]),
        "GB/s read": bytes_dense / statistics.median(found["reading"]) / 1e9,
        "GB/s kernel": bytes_held / statistics.median(found["kernel"]) / 1e9,
    }


def timed(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    return take_turns(works, repeats, dict.fromkeys(works, torch.device("cpu")))


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median over the rounds, in which both met the machine alike."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def filled(model: Any, spec: str | None, tokens: int) -> Any:
    """A cache behind a text of ``tokens`` tokens, filled with random numbers: what they are doesn't change how long a
    step takes, and reading a prompt would take minutes."""
    cache = DynamicCache(config=model.config) if spec is None else sc.compressed_cache(spec, model)
    config, generator = model.config, torch.Generator().manual_seed(0)
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    for layer in cache.layers:
        keys, values = (torch.randn(shape, generator=generator).to(model.dtype) for _ in range(2))
        if not isinstance(layer, CompressedLayer):
            layer.update(keys, values)
            continue
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        layer.seen = layer.prompt = tokens
        layer.padding = [0]
        layer._start_elements(layer.steps.elements)
        layer._prune_elements(layer.steps.elements)
    return cache


def model_row(dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps of decoding: the dense cache and the compressed one in turns."""
    model, _ = sc.load(arguments.model)
    model = model.to(DTYPES[dtype])
    token = torch.tensor([[42]])
    spec = f"mustafar:{arguments.sparsity}"
    caches = {"dense": filled(model, None, arguments.context), "compressed": filled(model, spec, arguments.context)}
    report = caches["compressed"].report()
    works = {name: partial(model, token, cache=cache) for name, cache in caches.items()}
    found = timed({**works, "no context": partial(model, token, use_cache=False)}, arguments.steps)
    milliseconds = {name: 1e3 * statistics.median(times) for name, times in found.items()}
    return {
        "what": f"decoding, {arguments.model}",
        "dtype": dtype,
        "dense ms": milliseconds["dense"],
        "compressed ms": milliseconds["compressed"],
        "no context ms": milliseconds["no context"],
        "x dense": ratio(found["dense"], found["compressed"]),
        "x by bytes": report["bytes_dense"] / report["bytes_held"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the cache of one layer")
    parser.add_argument("--context", type=int, default=8000, help="tokens behind which the model decodes")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--study", default="all", choices=("attention", "model", "all"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    built = cpu.library().built_for().decode()
    setting = {
        "sparsity": f"{arguments.sparsity} of the elements of keys and values, with the paper's rounding",
        "tokens": f"{arguments.tokens} in one layer, {arguments.context} behind which the model decodes",
        "repeats": f"{arguments.repeats} rounds of attention, {arguments.steps} steps of the model; one more warms up",
        "kernel": f"compiled for {built}",
        "seed": 0,
    }
    rows: list[dict[str, Any]] = finished_rows(NAME)
    wanted = [(attention_row, f"attention, {name}", name, d) for name in SHAPES for d in DTYPES]
    wanted += [(model_row, f"decoding, {arguments.model}", None, d) for d in DTYPES]
    for measure, what, name, dtype in wanted:
        done = any(
            row["what"] == what and row["dtype"] == dtype and row["threads"] == arguments.threads for row in rows
        )
        if done or arguments.study not in ("all", "attention" if name else "model"):
            continue
        row = measure(name, dtype, arguments) if name else measure(dtype, arguments)
        rows.append({"threads": arguments.threads, **row})
        print(rows[-1], flush=True)
        write_result(NAME, TITLE, setting, rows, TEXT)
    write_result(NAME, TITLE, setting, rows, TEXT)


NAME = "cache-decode"
TITLE = "Decoding with a compressed KV cache"
TEXT = """
Milliseconds (medians) and ratios (medians of the ratios within a round, in which all took their turn): more than 1
means that the compressed cache is faster.

**Attention** of one new token over the cache of one layer, bitmaps of Mustafar and a dense window. `sdpa` is torch's
scaled_dot_product_attention with `enable_gqa=True`, which is what transformers calls; `grouped sdpa` is the same
function given the query heads of a group as if they were tokens, a faster way to ask torch for the same, which
transformers doesn't take; `kernel dense` is our own kernel over dense rows; `reference` expands the cache in plain
torch and then attends. `x by bytes` is the roofline: how much less is held. `x reading dense` compares with one pass
over the bytes of the dense cache, which no dense attention can beat (below 1: the kernel computes for longer than
memory takes to deliver a dense cache, so that arithmetic and not memory is what it waits for).

**Decoding** is one step of the model behind its context. The dense cache is transformers' DynamicCache, which copies
itself at every step to append a token; a compressed cache only copies its short dense window, and part of the gain is
that. `no context` is a step of the model without any cache: what is left is weights. The caches hold random numbers.
"""

if __name__ == "__main__":
    main()
