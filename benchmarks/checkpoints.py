"""The checkpoints of a comparison: what every tool is given, and how the results are judged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

# secateur and torch are imported within the functions: the process that times others must stay small


def prepare(work: Path, model_name: str, dtypes: Sequence[str], text: str, samples: int, length: int) -> str:
    """Write a plain checkpoint per dtype and the calibration ids (``ids.npy``); returns the sha256 of the ids."""
    import numpy

    import secateur as sc
    from secateur.observe.calibration import load_tokens

    for dtype in dtypes:
        model, tokenizer = sc.load(model_name, dtype=dtype)
        sc.save(model, tokenizer, work / dtype)
    tokens = load_tokens(text, tokenizer, samples=samples, length=length)
    numpy.save(work / "ids.npy", tokens.ids.numpy())
    return hashlib.sha256(tokens.ids.numpy().astype("<i8").tobytes()).hexdigest()


def check_tokens(out: Path, sha256: str) -> None:
    """Raise RuntimeError unless the plan in ``out`` was calibrated on the ids with this hash."""
    plan = json.loads(next(out.rglob("plan.json")).read_text(encoding="utf8"))
    found = plan["provenance"][0]["calibration"]["sha256"]
    if found != sha256:
        raise RuntimeError(f"{out.name} was calibrated on other tokens than llm-compressor: {found}, not {sha256}")


def block_matrices(folder: Path) -> list[str]:
    """Names of the linear weights in the blocks of a checkpoint."""
    import secateur as sc

    return [matrix.tensor for matrix in sc.anatomy(sc.load(folder)[0]).matrices]


def measure(folder: Path, matrices: list[str], text: str, windows: int, length: int) -> dict[str, float]:
    """Perplexity of a checkpoint in float32, and the fraction of zeros in ``matrices``."""
    import secateur as sc

    model, tokenizer = sc.load(folder)
    table = sc.evaluate({"model": model}, tokenizer, [f"perplexity:{text}"], length=length, windows=windows)
    weights = [model.get_parameter(name) for name in matrices]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return {
        "perplexity": table["perplexity"].values["model"],
        "sparsity": zeros / sum(weight.numel() for weight in weights),
    }


def same_mask(folder: Path, other: Path, matrices: list[str]) -> float:
    """Fraction of the entries of ``matrices`` that are zero in both checkpoints or in neither."""
    import secateur as sc

    one, two = sc.load(folder)[0], sc.load(other)[0]
    pairs = [(one.get_parameter(name) == 0, two.get_parameter(name) == 0) for name in matrices]
    return sum(int((a == b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
