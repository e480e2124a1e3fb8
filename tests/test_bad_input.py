"""Bad input is one sentence on stderr, an exit code other than 0, and nothing on disk; sparsity 0 changes nothing."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import pkgutil
import re
import shutil
import signal
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

import secateur as sc
from forking import Forked
from runs import QUICK
from secateur import errors
from secateur.methods import get_method, list_methods, make_method, settled
from secateur.observe import calibration
from secateur.plans import Plan

DECODER_METHODS = [m for m in list_methods() if not get_method(m).instead]

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
# what the Rust libraries below transformers raise for the same thing
FULL_WEIGHTS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
FULL_TOKENIZER = Exception("No space left on device (os error 28)")


class Room:
    """A folder to work in, with copies of the tiny checkpoint to break."""

    def __init__(self, path: Path, checkpoint: Path, patch: pytest.MonkeyPatch) -> None:
        self.path, self._checkpoint, self.patch = path, checkpoint, patch

    @property
    def model(self) -> Path:
        """A checkpoint that may be changed."""
        folder = self.path / "model"
        return folder if folder.exists() else Path(shutil.copytree(self._checkpoint, folder))

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def prune(self, *arguments: object, method: str = "wanda", model: object = None, out: object = "deep/out") -> list:
        small = ["--samples", 2, "--length", 32, "--out", out, "--quiet"]
        return ["prune", model or self.model, "--method", method, *small, *arguments]

    def edit_config(self, **changes: Any) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def edit_weights(self, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        path = self.model / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    def plan(self, model: Any, name: str = "plan") -> Path:
        return sc.plan(model, method="magnitude_sp", sparsity=0.5).save(self.path / name)


@pytest.fixture
def room(tmp_path, tiny_checkpoint, monkeypatch) -> Room:
    monkeypatch.chdir(tmp_path)
    # what a run puts into the system's folder for temporary files would be left on disk as well
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return Room(tmp_path, tiny_checkpoint, monkeypatch)


def listing(folder: Path) -> dict[str, str]:
    """Everything below a folder, hidden things included: name → hash of the content, or that it is a folder."""
    return {
        str(path.relative_to(folder)): "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
    }


Case = Callable[[Room], list]
CASES: dict[str, tuple[int, str, Case]] = {}


def case(name: str, code: int, sentence: str, make: Case) -> None:
    """``sentence`` is what follows ``error: ``, with … for anything and {room} for the folder of the test."""
    assert name not in CASES
    CASES[name] = (code, sentence, make)


# -- the request ------------------------------------------------------------------------------------------------------

case(
    "unknown method",
    2,
    "unknown method 'flpa'; did you mean 'flap'? 'secateur methods' shows them all",
    lambda room: room.prune(method="flpa"),
)
case(
    "unknown method, nothing near",
    2,
    "unknown method 'zzzzzz'; 'secateur methods' shows them all",
    lambda room: room.prune(method="zzzzzz"),
)
for value in ("1.0", "1.3", "-0.1", "nan", "inf"):
    for method in ("wanda", "flap", "shortgpt"):
        case(
            f"sparsity {value} of {method}",
            2,
            f"{method}: sparsity must lie in [0, 1), got {value} (…)",
            lambda room, value=value, method=method: room.prune("--sparsity", value, method=method),
        )
case(
    "sparsity that is no number",
    2,
    "invalid value for '--sparsity' / '--ratio': …; 'secateur prune --help' shows what is possible",
    lambda room: room.prune("--sparsity", "half"),
)
case(
    "N:M that doesn't divide",
    2,
    "pattern 2:5 needs a multiple of 5 inputs, model.layers.0.self_attn.q_proj has 32",
    lambda room: room.prune("--pattern", "2:5"),
)
for pattern in ("2-4", "2:4:8", "4:4", "0:4", "4:2", "a:b", "2:", "-2:4"):
    case(
        f"malformed pattern {pattern}",
        2,
        f"pattern …'{pattern}'…",
        lambda room, pattern=pattern: room.prune(f"--pattern={pattern}", "--dry-run"),
    )
case(
    "pattern of a structured method",
    2,
    "flap takes no pattern: 'secateur describe flap' lists its options",
    lambda room: room.prune("--pattern", "2:4", method="flap"),
)
case(
    "unknown option",
    2,
    "flap has no option 'min_kep'; did you mean 'min_keep'? 'secateur describe flap' lists them",
    lambda room: room.prune("--set", "min_kep=2", method="flap"),
)
case(
    "option of the wrong type",
    2,
    "flap: min_keep must be of type int, got 'few'",
    lambda room: room.prune("--set", "min_keep=few", method="flap"),
)
case(
    "option out of range",
    2,
    "flap: min_keep must lie in [1, inf), got 0 (units that every group keeps at least)",
    lambda room: room.prune("--set", "min_keep=0", method="flap"),
)
case(
    "option with an unknown choice",
    2,
    "flap: heads must be one of kv, query, got 'querry'; did you mean 'query'?",
    lambda room: room.prune("--set", "heads=querry", method="flap"),
)
case(
    "option without a value",
    2,
    "--set takes KEY=VALUE, got 'min_keep'",
    lambda room: room.prune("--set", "min_keep", method="flap"),
)
case(
    "budget below the minimum",
    1,
    "can't remove 99.0% of the params: with at least 60 unit(s) kept in every group at most …% can go",
    lambda room: room.prune("--sparsity", 0.99, "--set", "min_keep=60", method="flap"),
)
case(
    "budget below the minimum, layer by layer",
    1,
    "can't remove 99.0% of the params: with at least 60 unit(s) kept in every group at most …% can go",
    lambda room: room.prune("--sparsity", 0.99, "--set", "min_keep=60", method="wanda_sp"),
)
case(
    "no block left",
    1,
    "can't remove 2 of 2 blocks: at least one must stay",
    lambda room: room.prune("--set", "layers=2", method="shortgpt"),
)
case(
    "unknown task",
    2,
    "unknown task 'perplxity:builtin'; did you mean 'perplexity'? (tasks are …)",
    lambda room: room.prune("--evaluate", "perplxity:builtin"),
)
case(
    "unknown format",
    2,
    "command line: format: input should be 'dense' or 'packed', got 'zip'",
    lambda room: room.prune("--format", "zip"),
)
case(
    "unknown dtype",
    2,
    "command line: dtype: input should be 'auto', 'float32', 'bfloat16' or 'float16', got 'float8'",
    lambda room: room.prune("--dtype", "float8"),
)
case(
    "unknown device",
    2,
    "unknown device 'abacus': give cpu, cuda, cuda:0 or mps",
    lambda room: room.prune("--device", "abacus"),
)
case(
    "neither output nor dry run",
    2,
    "give a folder for the checkpoint with --out, or --dry-run to see what would go",
    lambda room: ["prune", room.model, "--method", "magnitude"],
)
for samples in (0, -3):
    case(
        f"{samples} samples",
        2,
        f"command line: calibration.samples: input should be greater than or equal to 1, got {samples}",
        lambda room, samples=samples: room.prune("--samples", samples),
    )
case(
    "length 1",
    2,
    "length must be at least 2 tokens, got 1 (it is the size of a window)",
    lambda room: room.prune("--length", 1),
)
case(
    "length beyond the positions",
    2,
    "length 2000 is beyond the 1024 positions of the model; use --length 1024 or less",
    lambda room: room.prune("--length", 2000),
)
# no calibration text, but sizes are measured on windows too
case(
    "length beyond the positions of a method without data",
    2,
    "length 2000 is beyond the 1024 positions of the model; use --length 1024 or less",
    lambda room: room.prune("--length", 2000, method="magnitude"),
)
for task in ("speed", "request"):
    case(
        f"{task} of more tokens than positions",
        2,
        f"{task}:batch=1,prompt=2000,new=32,repeats=5 takes 2032 positions, and the model has 1024: make it shorter",
        lambda room, task=task: room.prune("--evaluate", f"{task}:prompt=2000", method="magnitude"),
    )

# -- recipes ----------------------------------------------------------------------------------------------------------


def recipe(room: Room, text: str | bytes) -> list:
    return ["prune", room.model, "--recipe", room.file("recipe.yaml", text), "--out", "out", "--quiet"]


case(
    "recipe with an unknown key",
    2,
    "{room}/recipe.yaml: unknown key 'step'; did you mean 'steps'?",
    lambda room: recipe(room, "step: [{method: flap}]\nsteps: [{method: flap}]\n"),
)
case(
    "recipe with an unknown key in a step",
    2,
    "{room}/recipe.yaml: unknown key 'sparsty' in step 2; did you mean 'sparsity'?",
    lambda room: recipe(room, "steps: [{method: flap}, {method: wanda, sparsty: 0.5}]\n"),
)
case(
    "recipe with a bad value",
    2,
    "{room}/recipe.yaml: calibration.samples: input should be greater than or equal to 1, got 0",
    lambda room: recipe(room, "calibration: {samples: 0}\nsteps: [{method: flap}]\n"),
)
case(
    "recipe with an unknown method",
    2,
    "step 2: unknown method 'wunda'; did you mean 'wanda'? 'secateur methods' shows them all",
    lambda room: recipe(room, "steps: [{method: flap}, {method: wunda}]\n"),
)
case(
    "recipe that is no YAML",
    2,
    "recipe {room}/recipe.yaml is not valid YAML: line 2: …",
    lambda room: recipe(room, "steps: [{method: flap\nmodel: }}\n"),
)
case(
    "binary recipe",
    2,
    "recipe {room}/recipe.yaml is not a text file",
    lambda room: recipe(room, b"\xff\xfe\x00\x81"),
)
case(
    "empty recipe",
    2,
    "recipe {room}/recipe.yaml must be a mapping with the key 'steps', not an empty file",
    lambda room: recipe(room, ""),
)
case(
    "missing recipe",
    2,
    "can't read recipe recipe.yaml: No such file or directory",
    lambda room: ["prune", room.model, "--recipe", "recipe.yaml", "--out", "out", "--quiet"],
)

# -- calibration data -------------------------------------------------------------------------------------------------


def calibrated(room: Room, name: str, content: str | bytes) -> list:
    return room.prune("--calibration", room.file(name, content))


def unknown_data_set(room: Room) -> list:
    def refuse(*_: object) -> None:
        raise ConnectionError("Couldn't reach 'wikitex2' on the Hub\n(offline)")

    room.patch.setattr(calibration, "_open_dataset", refuse)
    return room.prune("--calibration", "wikitex2")


case(
    "calibration text shorter than asked",
    1,
    "calibration text short.txt gives 1 windows of 32 tokens, 2 were asked: use samples=1 or a longer text",
    lambda room: calibrated(room, "short.txt", "some quite unusual words " * 3),
)
case(
    "calibration text shorter than a window",
    1,
    "calibration text short.txt has … tokens, fewer than one window of 32; use a longer text",
    lambda room: calibrated(room, "short.txt", "word"),
)
case(
    "empty calibration file",
    1,
    "calibration file empty.txt is empty",
    lambda room: calibrated(room, "empty.txt", ""),
)
case(
    "blank calibration file",
    1,
    "calibration file blank.txt holds no text",
    lambda room: calibrated(room, "blank.txt", " \n\n"),
)
case(
    "binary calibration file",
    1,
    "calibration file binary.txt is not UTF-8 text (byte 0); is it a binary file?",
    lambda room: calibrated(room, "binary.txt", bytes(range(255, -1, -1)) * 8),
)
case(
    "NUL bytes in a calibration file",
    1,
    "calibration file nul.txt holds NUL bytes (the first at 5); is it a binary file?",
    lambda room: calibrated(room, "nul.txt", b"words\0" * 80),
)
case(
    "binary jsonl",
    1,
    "calibration file rows.jsonl is not UTF-8 text (byte 0); is it a binary file?",
    lambda room: calibrated(room, "rows.jsonl", b"\x80\x81"),
)
case(
    "malformed jsonl",
    1,
    "calibration file rows.jsonl, line 2 is not valid JSON: …",
    lambda room: calibrated(room, "rows.jsonl", '{"text": "a"}\n{"text": \n'),
)
case(
    "binary parquet",
    1,
    "calibration file rows.parquet is not a readable parquet file: …",
    lambda room: calibrated(room, "rows.parquet", b"PAR2" * 40),
)
case(
    "cut gzip",
    1,
    "calibration file text.txt.gz is not a whole gzip file",
    lambda room: calibrated(room, "text.txt.gz", b"\x1f\x8b\x08\x00\x00"),
)
case(
    "missing calibration file",
    1,
    "calibration file missing.txt does not exist",
    lambda room: room.prune("--calibration", "missing.txt"),
)
case(
    "calibration folder",
    1,
    "calibration file temporary is a folder; give a text, jsonl, json or parquet file",
    lambda room: room.prune("--calibration", "./temporary"),
)
case(
    "unknown data set",
    1,
    "calibration data set wikitex2 can't be loaded; did you mean 'wikitext2'? (Couldn't reach 'wikitex2' on the Hub …)",
    unknown_data_set,
)
case(
    "calibration source that is no name",
    1,
    "calibration source 'no such text' is no file and no name of a data set; give builtin, self, a file or a name",
    lambda room: room.prune("--calibration", "no such text"),
)
case(
    "missing evaluation file",
    1,
    "evaluation file missing.txt does not exist",
    lambda room: room.prune("--evaluate", "perplexity:missing.txt", method="magnitude"),
)


def no_tokenizer(room: Room) -> list:
    for file in room.model.glob("token*"):
        file.unlink()
    return room.prune()


case(
    "no tokenizer",
    2,
    "text from builtin needs the model's tokenizer; pass it, or use a method that needs no data",
    no_tokenizer,
)

# -- models -----------------------------------------------------------------------------------------------------------


def weights(room: Room, change: Callable[[bytes], bytes]) -> list:
    file = room.model / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    return room.prune()


def changed_weights(room: Room, change: Callable[[dict[str, torch.Tensor]], None], *arguments: object, **rest) -> list:
    room.edit_weights(change)
    return room.prune(*arguments, **rest)


def changed_config(room: Room, **changes: Any) -> list:
    room.edit_config(**changes)
    return room.prune()


def without(room: Room, name: str) -> list:
    (room.model / name).unlink()
    return room.prune()


def missing_shard(room: Room) -> list:
    model, _ = sc.load(room.model)
    shutil.rmtree(room.model)
    model.save_pretrained(room.path / "model", max_shard_size="100KB")
    sorted((room.path / "model").glob("model-*.safetensors"))[1].unlink()
    return room.prune()


def poison(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][1, 2] = value

    return change


def overflow(tensors: dict[str, torch.Tensor]) -> None:
    """Every weight is finite, but the product of gate and up in layer 1 is beyond float32."""
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"].mul_(1e30)


def bert(room: Room) -> list:
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertForMaskedLM(config).save_pretrained(room.path / "bert")
    return room.prune(model="./bert")


def t5(room: Room) -> list:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(room.path / "t5")
    return room.prune(model="./t5")


case(
    "missing model",
    1,
    "there is no model at ./nowhere: no such file or folder",
    lambda room: room.prune(model="./nowhere"),
)
case(
    "folder without config",
    1,
    "temporary holds no model: there is no config.json in it",
    lambda room: room.prune(model="./temporary"),
)
case(
    "config that is no JSON",
    1,
    "{room}/model/config.json is not valid JSON: …",
    lambda room: room.prune(model=room.file("model/config.json", "{").parent),
)
case(
    "folder without weights",
    1,
    "{room}/model has no weights in safetensors form: no model.safetensors",
    lambda room: without(room, "model.safetensors"),
)
CORRUPT = "{room}/model/model.safetensors is corrupt or cut short: …"
case("truncated weights", 1, CORRUPT, lambda room: weights(room, lambda data: data[: len(data) // 2]))
case("weights cut in the header", 1, CORRUPT, lambda room: weights(room, lambda data: data[:40]))
case("garbage instead of weights", 1, CORRUPT, lambda room: weights(room, lambda data: b"\x07garbage" * 4000))
case("empty weights", 1, CORRUPT, lambda room: weights(room, lambda data: b""))
case(
    "missing shard",
    1,
    "{room}/model/model-00002-of-….safetensors is missing, though the index of the checkpoint lists it",
    missing_shard,
)
case(
    "missing tensor",
    1,
    "{room}/model: model.layers.1.mlp.up_proj.weight is missing from the weights",
    lambda room: changed_weights(room, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
)
case(
    "weights of other sizes than the config",
    1,
    "{room}/model: model.layers.0.mlp.down_proj.weight has shape [32, 64], but config.json asks for [32, 96]",
    lambda room: changed_config(room, intermediate_size=96),
)
case(
    "quantised model",
    1,
    "{room}/model is quantised (gptq): secateur prunes float weights, load a float checkpoint",
    lambda room: changed_config(room, quantization_config={"quant_method": "gptq", "bits": 4}),
)
case(
    "encoder-only model",
    1,
    "bert is a BertForMaskedLM (encoder only): secateur prunes decoder-only language models",
    bert,
)
case(
    "encoder-decoder model",
    1,
    "t5 is a T5ForConditionalGeneration (encoder-decoder): secateur prunes decoder-only language models",
    t5,
)
case(
    "unknown model type",
    1,
    "{room}/model has the unknown model type 'lama'; did you mean 'llama'?",
    lambda room: changed_config(room, model_type="lama"),
)
for value in (float("nan"), float("-inf")):
    case(
        f"{value} among the weights",
        1,
        "layer 1, model.layers.1.mlp.up_proj.weight: 1 of 2048 weights are NaN or inf",
        lambda room, value=value: changed_weights(
            room, poison("model.layers.1.mlp.up_proj.weight", value), method="magnitude"
        ),
    )
for method, where in {
    "wanda": "to mlp.down_proj",
    "sparsegpt": "to mlp.down_proj",
    "wanda_sp": "to mlp.down_proj",
    "flap": "in calibration batch 0",
    "shortgpt": "in calibration batch 0",
}.items():
    case(
        f"non-finite activations with {method}",
        1,
        f"layer 1 gives NaN or inf {where}: try --dtype float32 or check the weights",
        lambda room, method=method: changed_weights(
            room, overflow, "--dtype", "float32", "--sparsity", 0.5, method=method
        ),
    )
case(
    "non-finite logits in the evaluation",
    1,
    "…NaN or inf…; deep/out.run holds what is done: the same command with --resume goes on from there",
    lambda room: changed_weights(room, overflow, "--evaluate", "perplexity:builtin", method="magnitude"),
)
case(
    "non-finite text of the model's own",
    1,
    "the model can't write calibration text: its logits hold NaN or inf",
    lambda room: changed_weights(room, overflow, "--calibration", "self"),
)

# -- output -----------------------------------------------------------------------------------------------------------


def occupied(room: Room) -> list:
    room.file("out/precious.txt", "mine")
    return room.prune(out="out")


DISK_FULL = "can't write …out: No space left on device; nothing was left behind"
RESUMABLE = "can't write …out: No space left on device; …out.run holds what is done: the same command with --resume …"
# what is being written when the disk is full, once the first block is finished
FAILURES = {
    "decisions": ("secateur.runs.folder.write_tensors", FULL),
    "blocks": ("secateur.runs.cutting.write_tensors", FULL),
    "weights": ("secateur.models.shards.write_tensors", FULL),
    "config": ("transformers.LlamaConfig.save_pretrained", FULL),
    "plan": ("secateur.plans.Plan.write", FULL),
    "tokenizer": ("transformers.PreTrainedTokenizerFast.save_pretrained", FULL_TOKENIZER),
    "report": ("secateur.report.html.write_report", FULL),
}

case(
    "output that exists",
    1,
    "out exists and is not empty: choose another folder, or pass --overwrite",
    occupied,
)
case(
    "output that is a file",
    1,
    "out is a file; give a folder that doesn't exist yet",
    lambda room: room.prune(out=room.file("out", "mine").name),
)
case(
    "output inside a file",
    1,
    "can't write to file/out: …file is a file",
    lambda room: room.prune(out=room.file("file", "mine").name + "/out", method="magnitude"),
)
case(
    "output with a name that is too long",
    1,
    "can't write to …: File name too long",
    lambda room: room.prune(out="o" * 300),
)


def closed(room: Room) -> list:
    room.patch.setattr("secateur.files.os.access", lambda *_: False)
    return room.prune(out="deep/out")


case("output where nothing may be written", 1, "can't write to deep/out: … may not be written to", closed)
case(
    "model with a name that is too long",
    1,
    "there is no model at …: no such file or folder",
    lambda room: room.prune(model="./" + "m" * 300),
)


def full_folder(room: Room) -> list:
    def full(*_: object, **__: object) -> None:
        raise FULL

    room.patch.setattr("secateur.runs.folder.os.replace", full)
    return room.prune(method="magnitude")


case(
    "disk full at the folder",
    1,
    "can't write to deep/out: No space left on device",
    full_folder,
)


def without_memory(room: Room) -> list:
    def forward(*_: object, **__: object) -> None:
        torch.empty(2**50, dtype=torch.uint8)

    room.patch.setattr("transformers.LlamaForCausalLM.forward", forward)
    return ["evaluate", room.model, "--quiet"]


def gpu_without_memory(room: Room) -> list:
    def forward(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …")

    room.patch.setattr("transformers.LlamaForCausalLM.forward", forward)
    return ["evaluate", room.model, "--quiet"]


for name, size, job in (("", "1,125,899.9 GB", without_memory), (" of a GPU", "2.00 GiB", gpu_without_memory)):
    case(
        f"too little memory{name}",
        1,
        f"out of memory: {size} more were asked for",
        job,
    )


# -- plans ------------------------------------------------------------------------------------------------------------


def apply(room: Room, plan: Path | str, model: object = None) -> list:
    return ["plan", "apply", plan, model or room.model, "--out", "deep/out", "--quiet"]


def damaged_plan(room: Room, name: str, change: Callable[[bytes], bytes]) -> list:
    folder = room.plan(sc.load(room.model)[0])
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    return apply(room, folder)


def full_merge(room: Room) -> list:
    model, _ = sc.load(room.model)
    first = room.plan(model, "first")
    second = sc.plan(model, method="magnitude", sparsity=0.5).save(room.path / "second")
    room.patch.setattr("secateur.plans.Plan.write", raise_full)
    return ["plan", "merge", first, second, "--out", "deep/out"]


def raise_full(plan: Plan, path: Path) -> None:
    (path / "plan.json").write_text("half")
    raise FULL


case(
    "missing plan",
    1,
    "nowhere is not a folder; give a plan, or a checkpoint that holds one",
    lambda room: apply(room, "nowhere"),
)
case(
    "folder without a plan",
    1,
    "temporary holds no plan: there is no plan.json in it, nor in a folder 'plan'",
    lambda room: apply(room, "temporary"),
)
case(
    "plan that is no JSON",
    1,
    "{room}/plan/plan.json is not valid JSON: …",
    lambda room: damaged_plan(room, "plan.json", lambda data: data[:100]),
)
case(
    "truncated plan",
    1,
    "{room}/plan/plan.safetensors is corrupt or cut short: …",
    lambda room: damaged_plan(room, "plan.safetensors", lambda data: data[:-10]),
)
case("disk full at a merged plan", 1, DISK_FULL, full_merge)


def check(run: Any, code: int, sentence: str, room: Path) -> None:
    assert (run.code, run.out) == (code, ""), run.err
    assert run.err.count("\n") == 1 and run.err.endswith("\n") and "Traceback" not in run.err, run.err
    wanted = re.escape(f"error: {sentence}".replace("{room}", str(room))).replace("…", ".*")
    assert re.fullmatch(wanted, run.err[:-1]), run.err


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_nothing_left(cli, room: Room, name: str) -> None:
    code, sentence, make = CASES[name]
    arguments = make(room)
    before = listing(room.path)
    run = cli(*arguments)
    check(run, code, sentence, room.path)
    if "--resume" in sentence:
        # all is done but to measure it
        assert not (room.path / "deep" / "out").exists()
        shutil.rmtree(room.path / "deep")
    assert listing(room.path) == before


@pytest.mark.parametrize("what", FAILURES)
def test_a_full_disk_loses_nothing(cli, room: Room, what: str) -> None:
    place, error = FAILURES[what]
    room.file("out/precious.txt", "mine")
    arguments = room.prune("--overwrite", "--report", method="magnitude", out="out")
    module, _, name = place.rpartition(".")
    real = pkgutil.resolve_name(place if module.endswith(("Config", "Plan", "Fast")) else f"{module}:{name}")
    calls = []

    def full(*given: Any, **more: Any) -> Any:
        calls.append(given)
        if what in ("decisions", "blocks") and len(calls) == 1:
            return real(*given, **more)
        target = next(Path(value) for value in given if isinstance(value, (str, Path)))
        (target / "half" if target.is_dir() else target).write_bytes(b"half")
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, full)
        run = cli(*arguments)
    check(run, 1, RESUMABLE, room.path)
    assert listing(room.path / "out") == {"precious.txt": hashlib.sha256(b"mine").hexdigest()}
    resumed = cli(*arguments, "--resume")
    assert resumed.code == 0, resumed.err
    assert not (room.path / "out.run").exists() and not (room.path / "out" / "precious.txt").exists()
    whole = cli(*room.prune("--no-report", method="magnitude", out="whole"))
    assert whole.code == 0, whole.err
    for name in ("model.safetensors", "config.json", "plan/plan.safetensors", "plan/plan.json"):
        assert (room.path / "out" / name).read_bytes() == (room.path / "whole" / name).read_bytes()


@pytest.mark.parametrize("name", ["out", "report.html"])
def test_a_full_disk_at_the_renaming_loses_nothing(cli, room: Room, name: str) -> None:
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if target.name == name and (source.name.endswith(".part") or source.name == "out"):
            raise FULL
        replace(source, target)

    room.file("out/precious.txt", "mine")
    arguments = room.prune("--overwrite", "--report", method="magnitude", out="out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.files.os.replace", fail)
        check(cli(*arguments), 1, RESUMABLE, room.path)
    assert (room.path / "out" / "precious.txt").read_text() == "mine"
    assert cli(*arguments, "--resume").code == 0
    assert (room.path / "out" / "report.html").is_file()


def test_a_plan_for_another_model_is_refused(cli, room: Room, make_llama) -> None:
    folder = room.plan(make_llama(intermediate_size=96))
    arguments = apply(room, folder)
    before = listing(room.path)
    run = cli(*arguments)
    check(run, 1, "the plan was made for … and doesn't fit …: their tensors have other shapes", room.path)
    assert listing(room.path) == before


def test_progress_before_the_error_stays_apart_from_it(cli, room: Room) -> None:
    room.patch.setattr("secateur.progress.SECONDS_BETWEEN_LINES", 0)
    arguments = [a for a in changed_weights(room, overflow, "--dtype", "float32", "--json") if a != "--quiet"]
    run = cli(*arguments)
    assert (run.code, run.out) == (1, "")
    *progress, last = run.err.splitlines()
    assert last.startswith("error: layer 1 ")
    assert progress and not any("error" in line or "Traceback" in line for line in progress)


# -- what changes nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", DECODER_METHODS)
def test_sparsity_zero_is_the_identity(cli, room: Room, method: str) -> None:
    run = cli(*room.prune("--sparsity", 0, "--no-report", method=method))
    assert run.code == 0, run.err
    before, after = (load_file(folder / "model.safetensors") for folder in (room.model, room.path / "deep" / "out"))
    assert set(before) == set(after)
    assert all(same_bits(before[name], after[name]) for name in before)
    assert Plan.load(room.path / "deep" / "out" / "plan").is_identity


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    # as integers, so that -0.0 and 0.0 differ
    return first.dtype == second.dtype and torch.equal(first.view(torch.int32), second.view(torch.int32))


@pytest.mark.parametrize("method", DECODER_METHODS)
def test_dry_run_writes_nothing(cli, room: Room, method: str) -> None:
    # more than this the smallest model can't give with every method
    quick = [word for option in QUICK.get(method, {}).items() for word in ("--set", "=".join(map(str, option)))]
    arguments = room.prune("--sparsity", 0.1, *quick, "--dry-run", method=method)
    before = listing(room.path)
    run = cli(*arguments)
    assert (run.code, run.err) == (0, "")
    # a preset shows what it stands for
    assert settled(make_method(method, {"sparsity": 0.1}), None)[0].name in run.out
    assert listing(room.path) == before


# -- the same from Python ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (errors.UnknownMethodError, {"method": "flpa"}),
        (errors.OptionError, {"method": "wanda", "sparsity": 1.3}),
        (errors.OptionError, {"method": "wanda", "sparsity": float("nan")}),
        (errors.OptionError, {"method": "flap", "options": {"min_kep": 2}}),
        (errors.UsageError, {"method": "wanda", "pattern": "2:5"}),
        (errors.UsageError, {"method": "wanda", "samples": 0}),
        (errors.UsageError, {"method": "wanda", "length": 2000}),
        (errors.DataError, {"method": "wanda", "calibration": "missing.txt"}),
        (errors.DataError, {"method": "wanda", "samples": 10**6}),
        (errors.BudgetError, {"method": "flap", "sparsity": 0.99, "options": {"min_keep": 60}}),
    ],
)
def test_planning_raises_the_right_class(error, arguments, tiny_checkpoint) -> None:
    model, tokenizer = sc.load(tiny_checkpoint)
    with pytest.raises(errors.SecateurError) as caught:
        sc.plan(model, tokenizer, **{"samples": 2, "length": 32, **arguments})
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_loading_applying_and_saving_raise_the_right_class(room: Room, make_llama) -> None:
    model, tokenizer = sc.load(room.model)
    plan = sc.plan(make_llama(intermediate_size=96), method="magnitude_sp", sparsity=0.5)
    room.edit_weights(poison("model.layers.1.mlp.up_proj.weight", float("nan")))
    before = listing(room.path)
    with pytest.raises(errors.ModelLoadError):
        sc.load(room.path / "nowhere")
    with pytest.raises(errors.NonFiniteError):
        sc.load(room.model)
    with pytest.raises(errors.PlanMismatchError):
        sc.apply(plan, model)
    with pytest.raises(errors.OutputError):
        sc.save(model, tokenizer, room.model)
    with pytest.raises(errors.UsageError):
        sc.save(model, tokenizer, room.path / "out", format="zip")
    assert listing(room.path) == before


def whatever_asks_for_a_decoder(model: Any, plan: Any, out: Path) -> list[Callable[[], object]]:
    return [
        lambda: sc.anatomy(model),
        lambda: sc.plan(model, method="magnitude", sparsity=0.5),
        lambda: sc.apply(plan, model),
        lambda: sc.save(model, None, out),
    ]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_adapters_that_are_not_merged_are_refused(room: Room, tiny_llama) -> None:
    plan = sc.plan(tiny_llama, method="magnitude_sp", sparsity=0.5)
    wrapped: Any = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules=["up_proj", "down_proj"]))
    for model in (wrapped, tiny_llama):
        for asked in whatever_asks_for_a_decoder(model, plan, room.path / "out"):
            with pytest.raises(errors.UnsupportedModelError, match=r"carries adapters.*: merge them first"):
                asked()
    assert not (room.path / "out").exists()
    sc.save(sc.apply(plan, wrapped.merge_and_unload()), None, room.path / "out")
    assert sc.load(room.path / "out")[0].num_parameters() < tiny_llama.num_parameters()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's import
def test_models_that_were_compiled_under_other_names_are_refused(room: Room, tiny_llama) -> None:
    plan = sc.plan(tiny_llama, method="magnitude_sp", sparsity=0.5)
    compiled: Any = torch.compile(tiny_llama)
    in_parts = copy.deepcopy(tiny_llama)
    in_parts.model.layers[1] = torch.compile(in_parts.model.layers[1])
    for model in (compiled, in_parts):
        for asked in whatever_asks_for_a_decoder(model, plan, room.path / "out"):
            with pytest.raises(errors.UnsupportedModelError, match=r"torch\.compile has wrapped.*give it as it was"):
                asked()
    assert not (room.path / "out").exists()
    # compiled in place it has the names of its checkpoint
    tiny_llama.model.layers[1].compile()
    assert sc.apply(plan, tiny_llama).num_parameters() < tiny_llama.num_parameters()


def test_what_is_no_language_model_is_refused(room: Room) -> None:
    network, out = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)), room.path / "out"
    asked: list[Callable[[Any], object]]
    asked = [sc.anatomy, partial(sc.plan, method="magnitude"), partial(sc.prune, method="flap")]
    for ask in asked:
        with pytest.raises(errors.UsageError, match=r"give a model as secateur\.load returns it, not 'smollm2-135m'"):
            ask("smollm2-135m")
        with pytest.raises(errors.UsageError, match=r"Sequential is no language model .* with example_inputs="):
            ask(network)
    with pytest.raises(errors.UsageError, match=r"Sequential is no language model .* saved with plan="):
        sc.save(network, None, out)
    assert not out.exists()


def test_names_in_the_place_of_plans_and_tokenizers_are_refused(tiny_llama) -> None:
    with pytest.raises(errors.UsageError, match=r"give a plan as secateur\.plan or Plan\.load.*, not 'out/plan'"):
        sc.apply("out/plan", tiny_llama)
    with pytest.raises(errors.UsageError, match=r"give a tokenizer as secateur\.load returns it, not 'gpt2'"):
        sc.plan(tiny_llama, "gpt2", method="wanda", samples=2, length=16)
    with pytest.raises(errors.UsageError, match=r"give a tokenizer as secateur\.load returns it, not 'gpt2'"):
        sc.evaluate(tiny_llama, "gpt2", ["perplexity:builtin"], length=16, windows=2)


# -- interrupts -------------------------------------------------------------------------------------------------------

SLEEPER = '''
"""Sleeper: stays in calibration until it is woken."""
import sys
import time
from dataclasses import dataclass
from typing import ClassVar

import secateur
from secateur.allocate import PerMatrix
from secateur.methods import Descriptor, WeightMethod
from secateur.observe import SumSquares


class Sleep(SumSquares):
    def update(self, x_BTC):
        print("calibrating", file=sys.stderr, flush=True)
        time.sleep(60)


@secateur.register("sleeper")
@dataclass(frozen=True, kw_only=True)
class Sleeper(WeightMethod):
    """No options."""

    statistics: ClassVar = {"sleep": Sleep}
    descriptor: ClassVar = Descriptor(
        object="weights", granularity="element", score="activation", allocation="uniform",
        data="unlabelled_calibration", speedup="none",
    )

    def rule(self):
        return PerMatrix(self.sparsity)
'''


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_during_calibration_leaves_nothing(room: Room, number: int) -> None:
    plugin = room.file("sleeper.py", SLEEPER)
    arguments = room.prune("--plugin", plugin, method="sleeper")
    before = listing(room.path)
    environment = {"TMPDIR": str(room.path / "temporary")}
    with Forked(arguments, cwd=room.path, environment=environment) as process:
        assert process.stderr.readline() == "calibrating\n"
        process.send_signal(number)
        out, rest = process.stdout.read(), process.stderr.read()
        assert process.wait() == 130
    assert (out, rest) == ("", "interrupted; nothing was written\n")
    assert listing(room.path) == before
