"""Scores and kept tokens beside those of NVIDIA kvpress, on the same keys, values and hidden states.

    python -m venv PEER && PEER/bin/pip install kvpress==0.5.4
    python benchmarks/against_kvpress.py --peer-python PEER/bin/python --text TEXT.txt

kvpress has its own transformers, so that it runs in its own environment. Every layer of a model reads a prompt here;
what its attention saw is handed over in a safetensors file, and ``kvpress_peer.py`` calls the presses on it. The models
are a random Llama and ``--model`` on real text.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import write_result
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import secateur as sc
from secateur.cache.layer import CompressedLayer
from secateur.cache.rereading import reread_scores
from secateur.methods import EvictionMethod, Prompt, RereadMethod
from secateur.methods.cachespec import parse_cache_spec
from secateur.methods.rereading import FIRST, LATER
from secateur.methods.surrogates import Surrogate

# name → our spec; the peer knows its presses by the same names. What isn't said here are the same defaults.
SPECS = {
    "knorm": "knorm:0.5",
    "streaming_llm": "streaming_llm:0.5",
    "observed_attention": "h2o:0.5,recent=0,normalized=true",
    "tova": "tova:0.5",
    "snapkv": "snapkv:0.5",
    "pyramidkv": "pyramidkv:0.5",
    "keydiff": "keydiff:0.5",
    "expected_attention": "expected_attention:0.5",
    "lagkv": "lagkv:0.5,lag=32",
    "adakv": "adakv(snapkv:0.5)",
    "criticalkv": "criticalkv(snapkv:0.5)",
    "chunkkv": "chunkkv(snapkv:0.5)",
    "block": "block_kv(keydiff:0.5)",
    "key_rerotation": "key_rerotation(keydiff:0.5)",
    "think": "think:0.5",
    "decoding": "decoding(keydiff):budget=150",
}
# of the whole model at once
WHOLE_SPECS = {
    "kvzip": "kvzip:0.5,sinks=0",
    "kvzip_plus": "kvzip:0.5,sinks=0,plus=true",
    "kvzip_chunks": "kvzip:0.5,sinks=0,chunk=150",
}
ZAP = "kvzap:threshold={threshold},window=128,surrogate={folder}"
PEER = Path(__file__).with_name("kvpress_peer.py")
NOTES = {
    "lagkv": "ranks of different partitions are equal; of equals ours are the last tokens, theirs any",
    "streaming_llm": "scores are 0 and 1",
    "knorm": "a token that occurs twice has the same norm in layer 0; of equals ours are the last, theirs any",
}


class Requests:
    """A tokenizer for requests to repeat a text: a model's own, or one of letters for a model without."""

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer, self.chat_template = tokenizer, None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self.tokenizer is None:
            return [ord(letter) for letter in text]
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)


class Recording(CompressedLayer):
    """Keeps what a method sees of the prompt, and the input of the attention."""

    def compress(self, query: Tensor, mask: Tensor | None, call: Any, arguments: dict[str, Any]) -> None:
        tokens = self.keys.shape[2]
        self.hidden = call.arguments["hidden_states"]
        self.prompt_seen = Prompt(
            layer=self.index,
            layers=self.layers,
            keys=self.keys,
            values=self.values,
            queries=query,
            positions=call.positions(1, tokens, query.device),
            scaling=arguments["scaling"],
            rope=call.rope(),
            reader=call.reader(),
            hidden=self.hidden,
        )


def prompts(model: Any, ids: Tensor) -> Iterator[tuple[Prompt, Tensor]]:
    """What the attention of every layer sees, and its input [1, S, hidden]."""
    cache = sc.compressed_cache("knorm:0.5", model)
    cache.layers = [Recording(layer.index, layer.layers, layer.steps) for layer in cache.layers]
    with torch.no_grad():
        model(ids, cache=cache)
    for layer in cache.layers:
        yield layer.prompt_seen, layer.hidden


@dataclass
class Compared:
    """How far two implementations are from each other, over all layers."""

    score: float = 0.0
    heads: int = 0
    equal: int = 0
    keys: float = 0.0

    def add_scores(self, mine: Tensor, theirs: Tensor) -> None:
        """Largest difference, as a fraction of the largest score; what is protected on either side left out."""
        theirs = theirs.float()
        free = torch.isfinite(mine) & (theirs < torch.finfo(torch.float32).max)
        free &= theirs < theirs[free].max()
        difference = (mine[free] - theirs[free]).abs().max() / theirs[free].abs().max().clamp(min=1e-12)
        if not difference.isfinite():
            raise ValueError("some scores are no numbers")
        self.score = max(self.score, float(difference))

    def add_kept(self, mine: Tensor, theirs: Tensor) -> None:
        """Kept tokens or channels of every head, [1, K, S] bool."""
        self.heads += mine.shape[1]
        self.equal += int((mine == theirs).all(dim=-1).sum())


def compare(name: str, seen: list[Prompt], peer: dict[str, Tensor]) -> Compared:
    """One method on all layers."""
    method, found = parse_cache_spec(SPECS[name])[0], Compared()
    for layer, prompt in enumerate(seen):
        start = f"{name}.{layer}."
        theirs = {key.removeprefix(start): tensor for key, tensor in peer.items() if key.startswith(start)}
        if not isinstance(method, EvictionMethod):
            kept = torch.zeros(1, *prompt.keys.shape[1::2], dtype=torch.bool)
            found.add_kept(kept.scatter(-1, method.channels(prompt), True), theirs["kept"].bool())
            continue
        if "score" in theirs:
            found.add_scores(method.score(prompt), theirs["score"])
        keep = method.keep_again(prompt) if method.every else method.keep(prompt)
        found.add_kept(keep, theirs["kept"].bool())
        if "keys" in theirs:
            # theirs end at n - 1 instead of before the text that follows, which is the same turn for all of them
            back = torch.full(keep.shape[:1], int(keep[0, 0].sum()) - prompt.tokens)[:, None, None]
            turned = prompt.rope.turned(method.moved_keys(prompt, keep)[keep].view(theirs["keys"].shape), back)
            found.keys = max(found.keys, float((turned - theirs["keys"]).abs().max() / theirs["keys"].abs().max()))
    return found


def compare_whole(name: str, model: Any, ids: Tensor, requests: Requests, peer: dict[str, Tensor]) -> Compared:
    """A method that reads the prompt again, on all layers."""
    method, found = parse_cache_spec(WHOLE_SPECS[name])[0], Compared()
    assert isinstance(method, RereadMethod)
    cache = sc.compressed_cache("knorm:0", model)
    cache.tokenizer = requests
    model(ids, cache=cache)
    scores = reread_scores(cache, model.model, method, (0, 0), ids[0])
    for layer, (score, keep) in enumerate(zip(scores, method.keep_of_all(scores), strict=True)):
        found.add_scores(score[None], peer[f"{name}.{layer}.score"])
        found.add_kept(keep[None], peer[f"{name}.{layer}.kept"].bool())
    return found


def compare_zap(seen: list[Prompt], peer: dict[str, Tensor], folder: str, threshold: float) -> Compared:
    """A surrogate that both read from the same files."""
    method, found = parse_cache_spec(ZAP.format(folder=folder, threshold=threshold))[0], Compared()
    assert isinstance(method, EvictionMethod)
    for layer, prompt in enumerate(seen):
        found.add_scores(method.carry(prompt), peer[f"kvzap.{layer}.score"])
        found.add_kept(method.keep(prompt), peer[f"kvzap.{layer}.kept"].bool())
    return found


def a_surrogate(seen: list[Prompt], folder: Path) -> float:
    """Weights drawn at random, as files of a surrogate; gives a threshold in the middle of its scores."""
    draw = torch.Generator().manual_seed(0)
    layers, scores = [], []
    for prompt in seen:
        hidden, heads = prompt.hidden.shape[-1], prompt.keys.shape[1]
        layers.append(((torch.randn(heads, hidden, generator=draw) / hidden**0.5, torch.randn(heads, generator=draw)),))
        scores.append(Surrogate((layers[-1],)).scores(0, 1, prompt.hidden, heads).flatten())
    surrogate = Surrogate(tuple(layers))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(surrogate.config()), encoding="utf8")
    save_file(surrogate.tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    return float(torch.cat(scores).median())


def random_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=2, head_dim=16, **sizes)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--random-only", action="store_true", help="leave the model on real text out")
    parser.add_argument("--tokens", type=int, default=400)
    arguments = parser.parse_args()
    drawn = torch.randint(0, 512, (1, arguments.tokens), generator=torch.Generator().manual_seed(0))
    models = [("random Llama", random_llama(), drawn, Requests())]
    if not arguments.random_only:
        model, tokenizer = sc.load(arguments.model)
        ids = tokenizer(Path(arguments.text).read_text(encoding="utf8")[:20_000], return_tensors="pt").input_ids
        models.append((Path(arguments.model).name, model.float(), ids[:, : arguments.tokens], Requests(tokenizer)))
    rows: list[dict[str, Any]] = []
    peer_versions: dict[str, str] = {}
    for label, one, tokens, requests in models:
        seen, hidden = zip(*prompts(one, tokens), strict=True)
        with tempfile.TemporaryDirectory() as folder:
            one.save_pretrained(folder)
            handed = {f"{side}.{p.layer}": getattr(p, side).contiguous() for p in seen for side in ("keys", "values")}
            handed |= {f"hidden.{n}": h.contiguous() for n, h in enumerate(hidden)}
            threshold = a_surrogate(list(seen), Path(folder, "surrogate"))
            handed |= {"ids": tokens.contiguous(), "threshold": torch.tensor(threshold, dtype=torch.float64)}
            for name, words in (("first", FIRST), ("later", LATER), ("answer", "\n")):
                handed[f"request.{name}"] = torch.tensor(requests.encode(words, add_special_tokens=False))
            save_file(handed, f"{folder}/seen.tensors")
            command = [arguments.peer_python, str(PEER), folder, ",".join(SPECS)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            peer_versions = dict(pair.split("=") for pair in done.stdout.split()[-3:])
            peer = load_file(f"{folder}/peer.tensors")
            with torch.no_grad():
                compared = {name: (spec, compare(name, list(seen), peer)) for name, spec in SPECS.items()}
                for name, spec in WHOLE_SPECS.items():
                    compared[name] = (spec, compare_whole(name, one, tokens, requests, peer))
                zap = ZAP.format(folder="...", threshold=round(threshold, 3))
                compared["kvzap"] = (zap, compare_zap(list(seen), peer, f"{folder}/surrogate", threshold))
        for name, (spec, found) in compared.items():
            rows.append(
                {
                    "model": label,
                    "kvpress": name,
                    "secateur": spec,
                    "score, largest difference": found.score,
                    "heads with the same kept set": f"{found.equal} of {found.heads}",
                    "note": NOTES.get(name, f"keys differ by {found.keys:.1e}" if found.keys else ""),
                }
            )
            print(rows[-1], flush=True)
    worst = max(row["score, largest difference"] for row in rows)
    setting = {
        "text": f"{Path(arguments.text).name}, first {arguments.tokens} tokens; random ids for the random Llama",
        "dtype": "float32",
        "peer": ", ".join(f"{k} {v}" for k, v in peer_versions.items()),
    }
    write_result("against-kvpress", "Scores and kept tokens beside NVIDIA kvpress", setting, rows, text(worst))


def text(worst: float) -> str:
    digits = math.ceil(-math.log10(worst))
    return f"""
Scores of every token, and the sets of tokens (of `think`: channels) that stay, in every layer and head, on the same
keys, values and hidden states. Differences of scores are fractions of the largest score, and below 1e-{digits - 1}
everywhere.

Deliberate differences: scores are float32; the number kept is floor(S (1 - r)) without the errors of float arithmetic,
and at least 1; of equal scores the last tokens stay; `chunkkv` takes every sequence's own chunks; `adakv` removes what
kvpress hides; `random_kv` draws other numbers; `h2o` is the ObservedAttention of kvpress with the options shown.
`decoding` is compared on one eviction; while a model writes, kvpress turns all queries of its buffer by the last
position. `kvzip` is compared without sinks, because kvpress takes them from the prefix of a chat template, and gives 0
to what else stands in that; `kvzip_chunks` reads in passages of 150 tokens. `kvzap` reads the same files of a surrogate
on both sides, with weights drawn at random.
"""


if __name__ == "__main__":
    main()
