"""What compressing a KV cache adds to reading the prompt, and what a process with the cache really takes.

    python benchmarks/cache_overhead.py --model smollm2-135m --text TEST.txt
    python benchmarks/cache_overhead.py --model smollm2-135m --text TEST.txt --memory

Overhead: in every round the prompt is read once, and then every method compresses its layers, in turns. Scores,
choosing, gathering and encoding are all in it. Memory: every cache is made in a process of its own, whose memory behind
the prompt is compared with what it had in front of it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import write_result

import secateur as sc
from secateur.cache.prompts import read_prompt
from secateur.methods.cachespec import parse_cache_spec
from secateur.progress import Progress

SPECS = (
    "random_kv:0.5",
    "knorm:0.5",
    "streaming_llm:0.5",
    "tova:0.5",
    "snapkv:0.5",
    "pyramidkv:0.5",
    "keydiff:0.5",
    "expected_attention:0.5",
    "lagkv:0.5",
    "adakv:0.5",
    "criticalkv:0.5",
    "chunkkv:0.5",
    "block_kv:0.5",
    "key_rerotation:0.5",
    "think:0.5",
    "mustafar:0.7",
    "snapkv:0.5+think:0.5",
    "snapkv:0.5+mustafar:0.5",
    "h2o:0.5",
)
HELD = {"think:0.5": 0.77, "mustafar:0.7": 0.48, "snapkv:0.5+mustafar:0.5": 0.36}
LIMIT = 8.0


def ids_of(tokenizer: Any, arguments: argparse.Namespace) -> torch.Tensor:
    text = Path(arguments.text).read_text(encoding="utf8")
    ids = tokenizer(text[: 12 * arguments.tokens], return_tensors="pt").input_ids[:, : arguments.tokens]
    if ids.shape[1] < arguments.tokens:
        raise SystemExit(f"the text has {ids.shape[1]} tokens, which is less than {arguments.tokens}")
    return ids


def setting_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """How it was made, for the result."""
    setting = {"model": arguments.name or arguments.model, "text": f"{Path(arguments.text).name}, its first tokens"}
    return {**setting, "tokens": arguments.tokens, "layers": arguments.layers or "all", "dtype": arguments.dtype}


def loaded(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model, perhaps its first layers alone: all of them cost the same, in reading and in compressing."""
    model, tokenizer = sc.load(arguments.model, dtype=arguments.dtype)
    if arguments.layers:
        model.model.layers = model.model.layers[: arguments.layers]  # type: ignore[union-attr]
        model.config.num_hidden_layers = arguments.layers
    return model, tokenizer


def overhead(arguments: argparse.Namespace) -> None:
    model, tokenizer = loaded(arguments)
    ids, rows = ids_of(tokenizer, arguments), []
    specs = arguments.specs.split(";") if arguments.specs else list(SPECS)
    specs += [f"kvzap:0.5,surrogate={arguments.surrogate}"] if arguments.surrogate else []
    seconds: dict[str, list[float]] = {spec: [] for spec in specs}
    prefill = []
    with Progress() as progress:
        done, total = 0, arguments.rounds * (1 + len(specs))
        for _ in range(arguments.rounds):
            start = time.process_time()
            read = read_prompt(model, ids)
            prefill.append(time.process_time() - start)
            progress("overhead", done := done + 1, total)
            for spec in specs:
                seconds[spec].append(compress_seconds(read, spec))
                progress("overhead", done := done + 1, total)
            del read
    name = arguments.name or Path(arguments.model).name
    for spec in specs:
        ratios = [100 * taken / whole for taken, whole in zip(seconds[spec], prefill, strict=True)]
        rows.append(
            {
                "cache": spec.partition(",surrogate=")[0],
                "overhead %": statistics.median(ratios),
                "lowest %": min(ratios),
                "highest %": max(ratios),
                "compressing s": statistics.median(seconds[spec]),
                "reading s": statistics.median(prefill),
            }
        )
        print(rows[-1], flush=True)
    over = [row["cache"] for row in rows if row["overhead %"] > LIMIT]
    said = f"Above {LIMIT:g} %: {', '.join(over)}." if over else f"All are at most {LIMIT:g} %."
    setting = setting_of(arguments) | {"rounds": arguments.rounds}
    write_result(f"cache-overhead-{name}", TITLE, setting, rows, f"{TEXT}\n{said}")


def compress_seconds(read: Any, spec: str) -> float:
    """Processor time of compressing all layers, without copying keys and values, which a real prompt does not do."""
    methods = parse_cache_spec(spec)
    start = time.process_time()
    read.compressed(methods)
    whole = time.process_time() - start
    start = time.process_time()
    read.compressed(parse_cache_spec("knorm:0"))
    return max(0.0, whole - (time.process_time() - start))


def memory(arguments: argparse.Namespace) -> None:
    rows = []
    for spec in ("dense", *HELD):
        command = [sys.executable, __file__, "--model", arguments.model, "--text", arguments.text, "--child", spec]
        command += [f"--{key}={getattr(arguments, key)}" for key in ("tokens", "dtype", "layers")]
        # freed blocks go back to the system at once, so that what is resident is what is held
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        got = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
        dense = rows[0] if rows else None
        rows.append(
            {
                "cache": spec,
                "process MB": got["process"] / 1e6,
                "walked MB": got["held"] / 1e6,
                "process, of dense": got["process"] / 1e6 / dense["process MB"] if dense else 1.0,
                "walked, of dense": got["held"] / got["dense"],
                "limit": HELD.get(spec, ""),
            }
        )
        print(rows[-1], flush=True)
    name = arguments.name or Path(arguments.model).name
    write_result(f"cache-memory-{name}", MEMORY_TITLE, setting_of(arguments), rows, MEMORY_TEXT)


def child(arguments: argparse.Namespace) -> None:
    """Make one cache, and say what the process takes more than in front of the prompt."""
    model, tokenizer = loaded(arguments)
    ids = ids_of(tokenizer, arguments)
    spec = "knorm:0" if arguments.child == "dense" else arguments.child

    def behind(tokens: torch.Tensor) -> Any:
        cache = sc.compressed_cache(spec, model)
        with torch.no_grad():
            model(tokens, cache=cache, logits_to_keep=1)
        return cache

    # what is set up once, by the model and by the method, is there before
    behind(ids[:, :512])
    before = resident()
    cache = behind(ids)
    after = resident()
    report = cache.report()
    print(json.dumps({"process": after - before, "held": report["bytes_held"], "dense": report["bytes_dense"]}))


def resident() -> int:
    """Bytes of this process alone (resident or swapped, without files) when all that can be given back has been."""
    gc.collect()
    # where there is no glibc, freed memory may still be counted
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return sum(1024 * int(sizes[name].split()[0]) for name in ("RssAnon", "VmSwap"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--name", help="of the model in the result, where it is read from a folder")
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=0, help="the first layers alone (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--specs", help="caches to measure, with semicolons between them (default: one of every method)"
    )
    parser.add_argument("--surrogate", help="folder of 'secateur cache fit', to measure kvzap too")
    parser.add_argument("--memory", action="store_true", help="memory of processes instead of time")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    (child if arguments.child else memory if arguments.memory else overhead)(arguments)


TITLE = "What compressing a KV cache adds to reading a prompt"
TEXT = """
Processor time of compressing the caches of all layers (scores, choosing, gathering, encoding), as a percentage of the
time of reading the prompt, on one thread; medians over rounds, in each of which the prompt is read once and every
method has its turn. Other work ran on the machine at the same time. Where a number of layers is given, these are the
first ones of the model: all of them cost the same, in reading and in compressing. `kvzip` isn't here: it scores by
letting the model read the prompt a second time, which is more than all of this, and what `kvzap` was made to avoid.
"""
MEMORY_TITLE = "What a process with a compressed KV cache takes"
MEMORY_TEXT = """
Anonymous memory of a process behind the prompt, without what it had in front of it (model, libraries, a short prompt's
warm-up), beside the bytes that a walk over the cache's tensors counts; every cache in a process of its own. Where a
number of layers is given, these are the first ones of the model.
"""

if __name__ == "__main__":
    main()
