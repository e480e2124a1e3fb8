"""Peak memory of pruning checkpoints larger than the memory that it takes.

    python benchmarks/scale.py

Random Llama checkpoints of real sizes (weights are never all in memory, here neither) go through the command line as
separate processes; the peak is the kernel's high-water mark of resident memory, Python and torch included. The 7B
checkpoint is made of sparse files, so that it takes no disk. Peaks over depth and times come from one width with 8, 16
and 32 blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import finished_rows, write_result
from processes import measured, own_peak_bytes

from secateur.tensorfiles import Made, write_tensors
from secateur.versions import machine

SHAPES: dict[str, dict[str, int]] = {
    "3B": {"hidden": 3072, "ffn": 8192, "blocks": 28, "heads": 24, "kv_heads": 8, "vocab": 128256},
    "7B": {"hidden": 4096, "ffn": 11008, "blocks": 32, "heads": 32, "kv_heads": 32, "vocab": 32000},
    "8 blocks": {"hidden": 1024, "ffn": 2816, "blocks": 8, "heads": 16, "kv_heads": 8, "vocab": 49152},
    "16 blocks": {"hidden": 1024, "ffn": 2816, "blocks": 16, "heads": 16, "kv_heads": 8, "vocab": 49152},
    "32 blocks": {"hidden": 1024, "ffn": 2816, "blocks": 32, "heads": 16, "kv_heads": 8, "vocab": 49152},
}

TEXT = """
Every row is one process: `secateur prune` (or `plan apply`) on a random Llama in bfloat16. `peak GB` is its
high-water mark of resident memory, `model GB` its weights, `cpu` its processor seconds (the rows of 3B and 7B ran
beside other work, so that their wall time says little). A model is never all in memory: the peak is one block, the
next one being read, a working copy in the compute dtype, and Python with torch. It does not grow with the depth.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="where checkpoints and outputs go (default: a temporary folder)")
    parser.add_argument("--only", choices=("3B", "7B", "depth"), action="append")
    parser.add_argument("--repeats", type=int, default=3, help="of the rows over depth")
    parser.add_argument("--name", default="scale")
    arguments = parser.parse_args()
    wanted = arguments.only or ["3B", "7B", "depth"]
    work = arguments.work or Path(tempfile.mkdtemp(prefix="scale-"))
    work.mkdir(parents=True, exist_ok=True)
    # rows of an earlier run that this one doesn't make again
    rows = [row for row in finished_rows(arguments.name) if _part_of(row) not in wanted]
    try:
        if "3B" in wanted:
            model = make_checkpoint(work / "3B", **SHAPES["3B"])
            common = ["--samples", "8", "--length", "256"]
            for method in (["wanda", "--pattern", "2:4"], ["flap", "--sparsity", "0.2"]):
                rows.append(run("3B", work, ["prune", str(model), "--method", *method, *common]))
            shutil.rmtree(model)
        if "7B" in wanted:
            model = make_checkpoint(work / "7B", sparse=True, **SHAPES["7B"])
            for method, pattern in (("random_sp", ""), ("random", "2:4")):
                plan = make_plan(work / f"plan-{method}", model, method, pattern)
                rows.append(run("7B", work, ["plan", "apply", str(plan), str(model)], label=f"plan apply ({method})"))
                shutil.rmtree(plan)
            shutil.rmtree(model)
        if "depth" in wanted:
            models = {name: make_checkpoint(work / name.replace(" ", "-"), **SHAPES[name]) for name in list(SHAPES)[2:]}
            taken: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
            for _ in range(arguments.repeats):
                for name, model in models.items():
                    command = ["prune", str(model), "--method", "wanda", "--sparsity", "0.5"]
                    taken[name].append(run(name, work, [*command, "--samples", "16", "--length", "256"]))
            for found in taken.values():
                middle = {key: statistics.median(row[key] for row in found) for key in ("seconds", "cpu", "peak GB")}
                rows.append({**found[0], **middle})
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    setting = {"calibration": "builtin; 3B: 8 x 256 tokens, depth: 16 x 256 tokens", "repeats": arguments.repeats}
    write_result(arguments.name, "Peak memory of large checkpoints", setting, rows, TEXT)


def run(name: str, work: Path, command: list[str], label: str = "") -> dict[str, Any]:
    """One row; the output is deleted again."""
    out = work / "out"
    extra = ["--no-measure", "--no-report"] if command[0] == "prune" else []
    full = [sys.executable, "-m", "secateur", *command, *extra, "--out", str(out)]
    found = measured(full, log=work / "log", environment=os.environ)
    assert found.peak_bytes > own_peak_bytes(), "this process was larger than its child: the mark is not the child's"
    options = iter(command)
    row = {
        "model": name,
        "what": label or " ".join(word for word in options if word not in (command[0], command[1], "--method")),
        "model GB": SIZES[name] / 1e9,
        "peak GB": found.peak_bytes / 1e9,
        "seconds": found.seconds,
        "cpu": found.cpu_seconds,
        "output GB": sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e9,
        # a part may be made again on another machine
        "processor": machine()["cpu"],
    }
    print(row, flush=True)
    shutil.rmtree(out)
    return row


def _part_of(row: dict[str, Any]) -> str:
    return row["model"] if row["model"] in ("3B", "7B") else "depth"


SIZES: dict[str, int] = {}


def make_checkpoint(
    folder: Path, *, hidden: int, ffn: int, blocks: int, heads: int, kv_heads: int, vocab: int, sparse: bool = False
) -> Path:
    """A random Llama in bfloat16 with smollm2-135m's tokenizer; ``sparse`` files hold zeros, which take no disk."""
    width = hidden // heads
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": width, "vocab_size": vocab, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0,
        "bos_token_id": 1, "eos_token_id": 2, "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    files = [{**shapes, "model.norm.weight": (hidden,)}]
    for first in range(0, blocks, 4):
        part = {}
        for layer in range(first, min(blocks, first + 4)):
            base = f"model.layers.{layer}"
            part |= {f"{base}.self_attn.{n}_proj.weight": (heads * width, hidden) for n in "q"}
            part |= {f"{base}.self_attn.{n}_proj.weight": (kv_heads * width, hidden) for n in "kv"}
            part |= {f"{base}.self_attn.o_proj.weight": (hidden, heads * width)}
            part |= {f"{base}.mlp.{n}_proj.weight": (ffn, hidden) for n in ("gate", "up")}
            part |= {f"{base}.mlp.down_proj.weight": (hidden, ffn)}
            part |= {f"{base}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        files.append(part)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map, total = {}, 0
    for number, part in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {key: Made(torch.bfloat16, shape, _maker(key, shape)) for key, shape in part.items()}
        if sparse:
            _write_holes(folder / name, tensors)
        else:
            write_tensors(folder / name, tensors)
        weight_map |= dict.fromkeys(part, name)
        total += sum(made.size for made in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    SIZES[next((n for n, s in SHAPES.items() if s["blocks"] == blocks and s["hidden"] == hidden), folder.name)] = total
    _copy_tokenizer(folder)
    return folder


def _maker(name: str, shape: tuple[int, ...]) -> Any:
    def make() -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(sum(name.encode()))
        # one random stretch, repeated: drawing billions of numbers would take longer than pruning them
        count = shape[0] * shape[1]
        stretch = torch.randn(min(count, 1 << 20), generator=generator).mul_(0.02).to(torch.bfloat16)
        return stretch.repeat(-(-count // len(stretch)))[:count].reshape(shape)

    return make


def _write_holes(path: Path, tensors: dict[str, Made]) -> None:
    """The same file with zeros for data, of which none takes disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        begin, end = end, end + tensors[name].size
        header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)


def _copy_tokenizer(folder: Path) -> None:
    """In a process of its own, which may be as large as it likes."""
    code = "import sys, secateur as sc; sc.load('smollm2-135m')[1].save_pretrained(sys.argv[1])"
    measured([sys.executable, "-c", code, str(folder)], log=folder / "log", environment=os.environ)
    (folder / "log").unlink()


def make_plan(path: Path, model: Path, method: str, pattern: str) -> Path:
    """A plan for ``model`` by a method that needs no data, made block by block in a process of its own."""
    code = (
        "import sys; from secateur.recipes import make_recipe; from secateur.runs.run import Options, planned\n"
        "steps = [{'method': sys.argv[3], 'pattern': sys.argv[4] or None}]\n"
        "with planned(make_recipe({'model': sys.argv[1], 'steps': steps}, ''), Options()) as plans:\n"
        "    plans[0].save(sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(model), str(path), method, pattern]
    measured(command, log=path.with_suffix(".log"), environment=os.environ)
    return path


if __name__ == "__main__":
    main()
