"""Models without some of their attentions and MLPs, chosen by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from families import tiny_ids
from runs import tokens_of
from secateur.engine import decide
from secateur.methods import Descriptor, SublayerMethod
from secateur.models.fingerprint import fingerprint
from secateur.models.sources import Source
from secateur.plans import Plan
from secateur.provenance import Provenance

HOW: dict[str, Any] = {"dtype": torch.float32, "batch_tokens": 32, "progress": lambda *_: None}


@dataclass(frozen=True, kw_only=True)
class Chosen(SublayerMethod):
    """Removes what it is told to."""

    name: ClassVar[str] = "chosen"
    descriptor: ClassVar = Descriptor(
        object="sublayers", granularity="layer", score="loss", allocation="global", data="none", speedup="real"
    )
    names: str = ""

    def search(self, sublayers, trials):
        return frozenset(self.names.split()), ()


def plan_without(model: Any, names: Iterable[str]) -> Plan:
    """The plan that takes the sub-layers of these names."""
    found = decide(Chosen(names=" ".join(names)), Source(model), tokens_of(tiny_ids()), **HOW).whole
    provenance = Provenance(method="chosen", options={}, model=fingerprint(Source(model)))
    return Plan(provenance=(provenance,), groups=found.groups, keep=found.keep)


def silenced(model: Any, names: Iterable[str]) -> Any:
    """A copy of a Llama whose sub-layers of these names add nothing."""
    model = copy.deepcopy(model)
    for name in names:
        _, layer, kind = name.split(".")
        block = model.model.layers[int(layer)]
        (block.self_attn.o_proj if kind == "attention" else block.mlp.down_proj).weight.data.zero_()
    return model


def gone(plan: Plan) -> set[str]:
    """Names of the sub-layers that a plan takes."""
    found = {name for name, kept in plan.keep.items() if name != "layers" and not len(kept)}
    blocks = plan.removed("layers").tolist() if "layers" in plan.keep else []
    return found | {f"layers.{layer}.{kind}" for layer in blocks for kind in ("attention", "mlp")}
