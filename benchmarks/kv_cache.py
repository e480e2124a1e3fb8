"""What a compressed KV cache costs in perplexity, and what it holds.

    python benchmarks/kv_cache.py --model smollm2-135m --evaluation TEST.txt --windows 64

Every window of the text is a prefix, which is read dense and then compressed, and a continuation, whose perplexity is
measured on what is left of the prefix, in one forward. The prefix is read once for all settings. ``--study`` takes a
part: ``tokens`` (evictions), ``channels`` (ThinK beside other scores of channels), ``elements`` (Mustafar) or
``together``. The result is written after every row; a second call goes on from there.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import finished_rows, write_result
from torch import Tensor

import secateur as sc
from secateur.cache.prompts import ReadPrompt, read_prompt
from secateur.evaluation.continuation import continuation_losses
from secateur.methods import CacheMethod, Prompt
from secateur.methods.cache.mustafar import Mustafar
from secateur.methods.cache.think import ThinK
from secateur.methods.cachespec import parse_cache_spec
from secateur.progress import Progress

EVICTIONS = (
    "random_kv",
    "streaming_llm",
    "streaming_llm,sinks=0",
    "knorm",
    "keydiff",
    "lagkv",
    "tova",
    "h2o",
    "snapkv",
    "pyramidkv",
    "expected_attention",
    "chunkkv",
    "criticalkv",
    "adakv",
    "adakv,of=expected_attention",
    "key_rerotation",
)


@dataclass(frozen=True, kw_only=True)
class KeyNormChannels(ThinK):
    """Channels by the norm of keys alone."""

    def channel_score(self, prompt: Prompt) -> Tensor:
        return prompt.keys.float().square().mean(dim=2)


@dataclass(frozen=True, kw_only=True)
class VarianceChannels(ThinK):
    """Channels by the variance of keys."""

    def channel_score(self, prompt: Prompt) -> Tensor:
        return prompt.keys.float().var(dim=2)


@dataclass(frozen=True, kw_only=True)
class RandomChannels(ThinK):
    """Channels by chance."""

    def channel_score(self, prompt: Prompt) -> Tensor:
        generator = torch.Generator().manual_seed(prompt.layer)
        drawn = torch.rand(prompt.keys.shape[1], prompt.keys.shape[3], generator=generator)
        return drawn.expand(prompt.keys.shape[0], -1, -1)


@dataclass(frozen=True, kw_only=True)
class RandomElements(Mustafar):
    """Elements by chance."""

    def largest(self, side: str, width: int) -> None:
        return None  # by size alone a kernel would choose

    def element_mask(self, x: Tensor, side: str) -> Tensor:
        drawn = torch.rand(x.shape, generator=torch.Generator().manual_seed(x.shape[-2]))
        return self._of(x.shape[-1], self.sparsity).mask(drawn)


def settings(study: str, sparsities: list[float]) -> Iterator[tuple[str, tuple[CacheMethod, ...]]]:
    """(name, methods) of every row."""

    def spec(text: str) -> tuple[str, tuple[CacheMethod, ...]]:
        return text, parse_cache_spec(text)

    if study in ("tokens", "all"):
        for r in sparsities:
            for name in EVICTIONS:
                method, comma, rest = name.partition(",")
                yield spec(f"{method}:{r}{comma}{rest}")
    if study in ("channels", "all"):
        arms = {"think": ThinK, "key norm": KeyNormChannels, "variance": VarianceChannels, "random": RandomChannels}
        for r in (0.25, 0.4, 0.5, 0.6, 0.75):
            for name, arm in arms.items():
                label = f"think:{r}" if arm is ThinK else f"channels by {name}:{r}"
                yield label, (arm(sparsity=r),)
        for r in (0.3, 0.5):
            yield spec(f"think:{r},target=value")
    if study in ("elements", "all"):
        for s in (0.5, 0.7):
            for sides in (f"k={s},v=0", f"k=0,v={s}", f"k=0,v={s},direction=channel,block=32", f"k={s},v={s}"):
                yield spec(f"mustafar:{sides}" if "block" in sides else f"mustafar:{sides},block=1")
            yield f"elements by chance:{s}", (RandomElements(sparsity=s, block=1),)
        yield spec("think:0.7")
    if study in ("together", "all"):
        for text in ("snapkv:0.5+think:0.4", "snapkv:0.5+mustafar:0.5", "adakv:0.5+mustafar:0.5"):
            yield spec(text)


@dataclass
class Window:
    """A prefix that was read, and what follows it, [tokens] int64."""

    prefix: ReadPrompt
    after: Tensor


def measured(model: Any, window: Window, methods: tuple[CacheMethod, ...]) -> tuple[Tensor, dict[str, Any]]:
    """Loss of every token of the continuation in nats, and the report of the cache behind the prefix."""
    cache = window.prefix.compressed(methods)
    report = cache.report()
    return continuation_losses(model, cache, window.after), report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--prefix", type=int, default=1024, help="tokens that are compressed")
    parser.add_argument("--after", type=int, default=256, help="tokens that are measured")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--sparsities", default="0.25,0.5,0.75,0.9", help="of evictions")
    parser.add_argument("--study", default="all", choices=("tokens", "channels", "elements", "together", "all"))
    arguments = parser.parse_args()
    name = f"kv-cache-{Path(arguments.model).name}"
    rows = finished_rows(name)
    sparsities = [float(piece) for piece in arguments.sparsities.split(",")]
    wanted = [("dense", parse_cache_spec("knorm:0")), *settings(arguments.study, sparsities)]
    missing = [(label, methods) for label, methods in wanted if all(row["cache"] != label for row in rows)]
    setting = {
        "model": arguments.model,
        "evaluation": f"{Path(arguments.evaluation).name}, first {arguments.windows} windows",
        "protocol": f"{arguments.prefix} tokens compressed, the next {arguments.after} measured without the first",
        "dtype": "float32",
    }
    windows: list[Window] = []
    if missing:
        model, tokenizer = sc.load(arguments.model)
        windows = prefixes(model, tokenizer, arguments)
    for label, methods in missing:
        found = [measured(model, window, methods) for window in windows]
        reports = [report for _, report in found]
        loss = float(torch.cat([losses for losses, _ in found]).mean())
        dense = math.log(rows[0]["perplexity"]) if rows else loss
        held, whole = (sum(report[f"bytes_{kind}"] for report in reports) for kind in ("held", "dense"))
        rows.append(
            {
                "cache": label,
                "perplexity": math.exp(loss),
                "increase %": 100 * math.expm1(loss - dense),
                "bytes held %": 100 * held / whole,
                "ideal %": 100 * sum(report["bytes_ideal"] for report in reports) / whole,
            }
        )
        print(rows[-1], flush=True)
        write_result(name, TITLE, setting, rows, text(rows))
    write_result(name, TITLE, setting, rows, text(rows))


def prefixes(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> list[Window]:
    """Every window, its prefix read."""
    ids = tokenizer(Path(arguments.evaluation).read_text(encoding="utf8"), return_tensors="pt").input_ids
    length = arguments.prefix + arguments.after
    if ids.shape[1] < arguments.windows * length:
        raise SystemExit(f"the text has {ids.shape[1]} tokens, which is less than {arguments.windows} x {length}")
    windows = []
    with Progress() as progress:
        for start in range(0, arguments.windows * length, length):
            window = ids[0, start : start + length]
            read = read_prompt(model, window[None, : arguments.prefix])
            windows.append(Window(read, window[arguments.prefix :]))
            progress("prefixes", len(windows), arguments.windows)
    return windows


def text(rows: list[dict[str, Any]]) -> str:
    """What the table shows, as far as it goes."""
    increase = {row["cache"]: f"{row['increase %']:.1f} %" for row in rows}
    lines = [TEXT]
    for said, names in FINDINGS:
        if all(name in increase for name in names):
            lines.append("- " + said.format(*(increase[name] for name in names)))
    return "\n".join(lines)


TITLE = "Perplexity behind a compressed prefix"
TEXT = """
Perplexity of what follows a prefix whose KV cache was compressed at its end, and what the cache behind the prefix
holds, as a fraction of the dense one: measured, with indices and bitmaps, and the kept numbers alone (ideal). The
prefix is plain text, so that nothing in it is a question. `key_rerotation` is around `streaming_llm`, wrappers without
`of` around `snapkv`. The increase in perplexity:
"""
FINDINGS = (
    (
        "Half of the tokens: {} by SnapKV, {} with heads that share their budget, {} by chance.",
        ("snapkv:0.5", "adakv:0.5", "random_kv:0.5"),
    ),
    (
        "Without its first tokens, StreamingLLM loses {} instead of {}.",
        ("streaming_llm:0.5,sinks=0", "streaming_llm:0.5"),
    ),
    (
        "Heads that share their budget: {} by expected attention, which alone gives {}.",
        ("adakv:0.5,of=expected_attention", "expected_attention:0.5"),
    ),
    (
        "40 % of the channels of keys: {} by ThinK, {} by the norm of keys alone, {} by chance.",
        ("think:0.4", "channels by key norm:0.4", "channels by random:0.4"),
    ),
    (
        "Half of the elements of keys and values: {} by Mustafar, {} by chance.",
        ("mustafar:k=0.5,v=0.5,block=1", "elements by chance:0.5"),
    ),
    (
        "Values compared token by token {}, channel by channel {}.",
        ("mustafar:k=0,v=0.5,block=1", "mustafar:k=0,v=0.5,direction=channel,block=32"),
    ),
    (
        "Keys without 70 % of their elements lose {}, without half of their channels {}; on LongBench with Llama-3-8B"
        " the paper of Mustafar reports the opposite order.",
        ("mustafar:k=0.7,v=0,block=1", "think:0.5"),
    ),
)

if __name__ == "__main__":
    main()
