"""Is a pruned model the same model in llama.cpp, and is it faster there too?

python benchmarks/runtimes.py --calibration wikitext2_valid.txt --evaluation wikitext2_test.txt
python benchmarks/runtimes.py --calibration builtin --evaluation builtin --quick

A dense model, one cut to the same sizes in every layer, one cut to sizes that differ, and one without some of its
blocks, each in transformers and, as GGUF, in llama.cpp (the package llama-cpp-py-sync). Times want a quiet machine;
--no-times leaves them out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from common import finished_rows, write_result
from llamacpp import LlamaCpp
from torch import Tensor

import secateur as sc
from secateur.evaluation.perplexity import window_losses
from secateur.evaluation.speed import products
from secateur.observe.calibration import cached_forward, load_tokens

TOLERANCE = 0.01
PROMPT = "The history of the steam engine begins"

TEXT = f"""
The dense model and three whose blocks have {{sparsity:.0%}} fewer parameters. Two were cut with `flap`: `uniform` has
the same sizes in every layer (structure UL-UM), `per layer` the sizes that FLAP chose (AL-AM), which llama.cpp computes
with its `deci` graph. `fewer blocks` lacks those that `shortgpt` takes. Both sides read the same {{windows}} windows of
{{length}} tokens, in float32. `off` is how far the perplexity in llama.cpp is from that in transformers; it is to stay
within {TOLERANCE:.0%} (`within`). `text` says whether both continue a prompt with the same {{new}} tokens, greedily;
`begins` is the start of that text.{{times}}
"""

TIMES = """
Tokens per second: `prefill` of a prompt of {prompt} tokens, `decode` of {timed} tokens after it, batch 1, {threads}
threads and float32, medians of {repeats} repeats. The models take turns, and `× dense` is the median of the ratios to
the dense model in the same round. Every new token reads all weights once, also those of the embedding, which are the
head's and stay: decoding that does nothing but read them is `decode bound` times as fast. `products` are the products
with weights of a token in transformers, done alone and in order, and `rest` is what a token takes beyond them in the
same round: attention to the cache, norms, and the calls themselves, of which a narrower model makes as many.

Why a token isn't as much faster as its bytes allow, by what isn't a product with weights: {why}.
"""


def bounded(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """A row with how much faster it decodes where only reading weights takes time."""
    return {**row, "decode bound × dense": dense["parameters"] / row["parameters"]}


def why(rows: dict[str, dict[str, Any]]) -> str:
    """What of a token in transformers isn't a product with weights, dense and cut."""
    rest = [f"{row['rest ms transformers']:.1f} ms of {1000 / row['decode transformers']:.1f}" for row in rows.values()]
    return ", ".join(f"{name}: {taken}" for name, taken in zip(rows, rest, strict=True))


class Runtime(Protocol):
    """One model in one runtime."""

    def losses(self, ids_NT: Tensor) -> Tensor:
        """Mean negative log-likelihood of every window, [windows] float64."""
        ...

    def greedy(self, ids: Sequence[int], new: int) -> tuple[list[int], float, float]:
        """``new`` tokens after a prompt; seconds of the prompt, and of the new tokens."""
        ...


class Transformers:
    def __init__(self, model: Any) -> None:
        self.model = model

    def losses(self, ids_NT: Tensor) -> Tensor:
        return window_losses(self.model, ids_NT)

    @torch.inference_mode()
    def greedy(self, ids: Sequence[int], new: int) -> tuple[list[int], float, float]:
        start = time.perf_counter()
        logits_BV, cache = cached_forward(self.model, torch.tensor([list(ids)]))
        token = logits_BV.argmax(dim=-1, keepdim=True)
        middle, found = time.perf_counter(), [int(token)]
        for _ in range(new):
            logits_BV, cache = cached_forward(self.model, token, cache)
            token = logits_BV.argmax(dim=-1, keepdim=True)
            found.append(int(token))
        return found[:new], middle - start, time.perf_counter() - middle

    @torch.inference_mode()
    def products(self, new: int) -> float:
        """Seconds of nothing but the products with weights of ``new`` tokens."""
        calls = products(self.model, lambda: cached_forward(self.model, torch.tensor([[0]])))
        start = time.perf_counter()
        for _ in range(new):
            for call in calls:
                call()
        return time.perf_counter() - start


def cut(model: Any, tokenizer: Any, sparsity: float, statistics: Path, **calibration: Any) -> dict[str, Any]:
    """The models of the study by name; the folder ``statistics`` keeps what both cuts ask of the dense model."""
    found = {"dense": model}
    cuts = {
        "uniform": ("flap", {"structure": "UL-UM", "round_to": 32}),
        "per layer": ("flap", {"structure": "AL-AM", "round_to": 32}),
        "fewer blocks": ("shortgpt", {}),
    }
    for name, (method, options) in cuts.items():
        kept = {"statistics": statistics, "dtype": "float32", **calibration}
        plan = sc.plan(model, tokenizer, method=method, options={"sparsity": sparsity, **options}, **kept)
        found[name] = sc.apply(plan, model)
        print(name, sum(p.numel() for p in found[name].parameters()), flush=True)
    return found


def graph_of(file: Path) -> str:
    """The architecture that a GGUF file names."""
    import gguf

    return str(gguf.GGUFReader(file).fields["general.architecture"].contents())


def take_times(
    runtimes: dict[str, dict[str, Runtime]], prompt: list[int], new: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Columns of tokens per second and ratios, by model."""
    seconds: dict[tuple[str, str, str], list[float]] = {}
    # models take short turns: a machine that others use too is another one a minute later
    for side in next(iter(runtimes.values())):
        for repeat in range(-1, repeats):  # the first round warms up
            for name, pair in runtimes.items():
                _, prefill, decode = pair[side].greedy(prompt, new)
                taken = {"prefill": prefill, "decode": decode}
                if isinstance(pair[side], Transformers):
                    taken["products"] = pair[side].products(new)
                    taken["rest"] = decode - taken["products"]
                for what, value in taken.items() if repeat >= 0 else ():
                    seconds.setdefault((name, side, what), []).append(value)
            print(f"{side}, round {repeat + 1} of {repeats}", flush=True)
    columns: dict[str, dict[str, Any]] = {name: {} for name in runtimes}
    for (name, side, what), taken in seconds.items():
        if what == "rest":
            columns[name][f"rest ms {side}"] = 1000 * median(taken) / new
            continue
        dense = seconds["dense", side, what]
        tokens = len(prompt) if what == "prefill" else new
        columns[name][f"{what} {side}"] = tokens / median(taken)
        columns[name][f"{what} {side} × dense"] = median(d / t for d, t in zip(dense, taken, strict=True))
    return columns


class Study:
    """The rows so far, which are written as they come; a second call measures what is missing."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.name = f"runtimes-{Path(arguments.model).stem}"
        rows = [] if arguments.quick else finished_rows(self.name)
        self.rows: dict[str, dict[str, Any]] = {row["model"]: row for row in rows}
        self.runtime = ""

    def compare(self, models: dict[str, Any], tokenizer: Any, ids_NT: Tensor, folder: Path) -> None:
        asked = self.arguments
        runtimes: dict[str, dict[str, Runtime]] = {}
        for name, model in models.items():
            saved = sc.save(model, tokenizer, folder / name.replace(" ", "-"))
            file = Path(sc.convert(saved, folder / f"{name}.gguf", to="gguf", dtype="float32"))
            context = max(ids_NT.shape[1], asked.prompt + max(asked.new, asked.timed) + 1)
            there = LlamaCpp(file, context=context, threads=asked.threads)
            self.runtime = there.name
            runtimes[name] = {"transformers": Transformers(model), "llama.cpp": there}
            if name not in self.rows:
                size = sum(p.numel() for p in model.parameters())
                row = {"model": name, "graph": graph_of(file), "parameters": size}
                self.rows[name] = row | self.agreement(runtimes[name], tokenizer, ids_NT)
                print(self.rows[name], flush=True)
                self.write()
        if not asked.no_times:
            prompt = ids_NT.flatten()[: asked.prompt].tolist()
            for name, columns in take_times(runtimes, prompt, asked.timed, asked.repeats).items():
                self.rows[name] |= columns
            self.write()

    def agreement(self, pair: dict[str, Runtime], tokenizer: Any, ids_NT: Tensor) -> dict[str, Any]:
        """Columns of perplexity, and whether both sides write the same text."""
        here, there = (float(pair[side].losses(ids_NT).mean().exp()) for side in ("transformers", "llama.cpp"))
        prompt = tokenizer(PROMPT)["input_ids"]
        texts = [pair[side].greedy(prompt, self.arguments.new)[0] for side in ("transformers", "llama.cpp")]
        return {
            "perplexity transformers": here,
            "perplexity llama.cpp": there,
            "off": there / here - 1,
            "within": abs(there / here - 1) <= TOLERANCE,
            "text": texts[0] == texts[1],
            "begins": tokenizer.decode(texts[1][:12]).strip(),
        }

    def write(self) -> None:
        if self.arguments.quick:
            return
        texts = {name: Path(getattr(self.arguments, name)).name for name in ("calibration", "evaluation")}
        settings = {**vars(self.arguments), **texts}
        timed = all("products transformers" in row for row in self.rows.values())
        about = {k: v for k, v in settings.items() if k not in ("quick", "no_times")}
        write_result(
            self.name,
            f"{settings['model']} in transformers and in llama.cpp",
            {**about, "llama.cpp": self.runtime, "dtype": "float32", "seed": 0},
            [bounded(row, self.rows["dense"]) for row in self.rows.values()] if timed else list(self.rows.values()),
            TEXT.format(
                times="\n" + TIMES.format(**settings, why=why(self.rows)).rstrip() if timed else "", **settings
            ),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt that is timed")
    parser.add_argument("--new", type=int, default=32, help="tokens of the text that both write")
    parser.add_argument("--timed", type=int, default=12, help="tokens that are written while time is taken")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-times", action="store_true", help="perplexities and texts alone")
    parser.add_argument("--quick", action="store_true", help="a short run that shows that it works; writes no result")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.samples, arguments.length, arguments.windows = 4, 64, 2
        arguments.prompt, arguments.new, arguments.timed, arguments.repeats = 32, 8, 8, 1
    torch.set_num_threads(arguments.threads)
    model, tokenizer = sc.load(arguments.model)
    options = {"samples": arguments.samples, "length": arguments.length}
    ids_NT = load_tokens(
        arguments.evaluation,
        tokenizer,
        samples=arguments.windows,
        length=arguments.length,
        split="evaluation",
        model=model,
        allow_fewer=True,
    ).ids
    with tempfile.TemporaryDirectory() as folder:
        statistics = Path(folder) / "statistics"
        models = cut(model, tokenizer, arguments.sparsity, statistics, calibration=arguments.calibration, **options)
        Study(arguments).compare(models, tokenizer, ids_NT, Path(folder))


if __name__ == "__main__":
    main()
