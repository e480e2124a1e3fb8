"""Prune neural networks: one engine, one file per published method.

import secateur as sc
model, tokenizer = sc.load("smollm2-135m")
result = sc.prune(model, tokenizer, method="flap", sparsity=0.2)
sc.save(result.model, tokenizer, "out/", plan=result.plan)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Heavy libraries load when a name is used, so that `import secateur` costs little more than `import torch`.
_HOMES = {
    "load": "secateur.api",
    "anatomy": "secateur.api",
    "plan": "secateur.api",
    "apply": "secateur.api",
    "prune": "secateur.api",
    "densities": "secateur.api",
    "evaluate": "secateur.api",
    "save": "secateur.api",
    "run": "secateur.runs.run",
    "compare": "secateur.comparison",
    "heal": "secateur.runs.healing",
    "push": "secateur.api",
    "convert": "secateur.api",
    "verify": "secateur.api",
    "compressed_cache": "secateur.cache",
    "compress_cache": "secateur.cache",
    "compare_caches": "secateur.cachestudy",
    "load_cache": "secateur.cache",
    "recommend_cache": "secateur.cachestudy",
    "Result": "secateur.api",
    "list_methods": "secateur.methods",
    "describe": "secateur.methods",
    "register": "secateur.methods",
    "rule": "secateur.structure.trace",
    "Sparsifier": "secateur.train.sparsifier",
    "lottery": "secateur.rounds",
    "instability": "secateur.rounds",
    "pq_index": "secateur.criteria.sparsity",
    "Plan": "secateur.plans",
    "SecateurError": "secateur.errors",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from secateur.api import Result, anatomy, apply, convert, densities, evaluate, load, plan, prune, push, save, verify
    from secateur.cache import compress_cache, compressed_cache, load_cache
    from secateur.cachestudy import compare_caches, recommend_cache
    from secateur.comparison import compare
    from secateur.criteria.sparsity import pq_index
    from secateur.errors import SecateurError
    from secateur.methods import describe, list_methods, register
    from secateur.plans import Plan
    from secateur.rounds import instability, lottery
    from secateur.runs.healing import heal
    from secateur.runs.run import run
    from secateur.structure.trace import rule
    from secateur.train.sparsifier import Sparsifier


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
