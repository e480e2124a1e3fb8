"""What ``secateur estimate`` says beside what the run then takes: three models, four methods.

    python benchmarks/estimate.py --work FOLDER
    python benchmarks/estimate.py --work FOLDER --heal

Both are child processes on this machine. Memory is the kernel's high-water mark of the child. Where other work keeps
the machine busy, wall time says nothing; the time is therefore judged by the child's processor seconds as well.
Checkpoints are made in FOLDER (1.5 GB) and kept; run with OMP_NUM_THREADS=1 so that processor seconds are seconds.
``--heal`` has other rows: a short recovery training behind the cut.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import write_result
from processes import measured

RUNS = (("magnitude", ""), ("wanda", ""), ("sparsegpt", ""), ("flap", ""))
SHORT = "steps=8,batch=2,length=128,held_out=2,measure=8"
TRAINED = (
    ("flap", f"lora:{SHORT}"),
    ("flap", f"lora:{SHORT},checkpointing=true,dtype=bfloat16"),
    ("flap", f"full:{SHORT}"),
    ("wanda", f"lora:{SHORT}"),
)
SMOLLM = "smollm2-135m"
RANDOM: dict[str, dict[str, Any]] = {
    "12 blocks of 1024": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "24 blocks of 768": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}

TEXT = """
`memory` is the peak of resident memory in MB and `seconds` the time from the start of the process, as `secateur
estimate` says and as the run then took (`wall`, and `cpu` of all its threads); the ratios are estimate / measured.
The aim is memory within 20 % and time within a factor of 1.5.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--heal", action="store_true", help="trainings behind the cut instead of other methods")
    parser.add_argument("--make", action="store_true", help="only make the checkpoints")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.make:
        make(arguments.work)
        return
    # in a process of its own, because the mark of a child starts at what its parent had
    subprocess.run([sys.executable, __file__, "--work", str(arguments.work), "--make"], check=True)
    runs = TRAINED if arguments.heal else RUNS
    rows = [compare(model, *run, arguments) for model in (SMOLLM, *RANDOM) for run in runs]
    setting = {
        "models": "SmolLM2-135M-Instruct and two random Llamas, all in bfloat16",
        "calibration": f"built-in, {arguments.samples} windows of {arguments.length} tokens, {arguments.dtype}",
        "worst memory ratio": _worst(rows, "memory ratio"),
        "worst time ratio": _worst(rows, "time ratio"),
    }
    name = f"estimate-{'recovery-' if arguments.heal else ''}{arguments.dtype}"
    write_result(name, "Estimates beside what runs take", setting, rows, TEXT)


def make(work: Path) -> None:
    """The checkpoints that aren't there yet."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import secateur as sc

    model, tokenizer = sc.load(SMOLLM, dtype="bfloat16")
    assert tokenizer is not None
    if not (work / SMOLLM).exists():
        sc.save(model, tokenizer, work / SMOLLM)
    for name, sizes in RANDOM.items():
        if not (work / name).exists():
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(max_position_embeddings=2048, **sizes)).bfloat16().save_pretrained(work / name)
            tokenizer.save_pretrained(work / name)


def compare(model: str, method: str, heal: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: the estimate, and the run."""
    folder, out, log = arguments.work / model, arguments.work / "out", arguments.work / "log"
    wanted = [folder, "--method", method, "--samples", arguments.samples, "--length", arguments.length]
    trained = ["--heal", heal] if heal else []
    common = [str(a) for a in [*wanted, "--dtype", arguments.dtype, "--out", out, *trained]]
    shutil.rmtree(out, ignore_errors=True)
    secateur = [sys.executable, "-m", "secateur"]
    said = subprocess.run([*secateur, "estimate", *common, "--json", "--quiet"], check=True, stdout=subprocess.PIPE)
    estimate = json.loads(said.stdout)
    run = measured([*secateur, "prune", *common, "--no-measure", "--no-report"], log=log, environment=os.environ)
    row = {
        "model": model,
        "method": method,
        **({"heal": heal} if heal else {}),
        "memory estimated": estimate["memory_bytes"] / 1e6,
        "memory measured": run.peak_bytes / 1e6,
        "memory ratio": estimate["memory_bytes"] / run.peak_bytes,
        "seconds estimated": estimate["seconds"],
        "cpu": run.cpu_seconds,
        "wall": run.seconds,
        "time ratio": estimate["seconds"] / run.cpu_seconds,
    }
    print(row, flush=True)
    return row


def _worst(rows: list[dict[str, Any]], column: str) -> float:
    return max((row[column] for row in rows), key=lambda ratio: max(ratio, 1 / ratio))


if __name__ == "__main__":
    main()
