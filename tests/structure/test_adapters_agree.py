"""Two ways to know a decoder: its family's entry in a table, and the trace of its forward. They must say the same."""

from __future__ import annotations

from collections import defaultdict

import pytest

import secateur as sc
from families import FAMILY_CONFIGS, make_tiny, tiny_ids
from secateur.structure.anatomy import Group

# hidden channels may leave where a config gives heads a width of their own, and nothing else is scaled by theirs
WIDE = {"llama", "llama-tied-bias", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "granite"}
Unit = frozenset[tuple[str, int, frozenset[int]]]


def units(group: Group) -> list[Unit]:
    """What leaves with every unit: tensor, dimension, positions."""
    found: list[dict[tuple[str, int], set[int]]] = [defaultdict(set) for _ in range(group.units)]
    for part in group.slices:
        for unit, positions in zip(found, part.index.tolist(), strict=True):
            unit[part.tensor, part.dim].update(positions)
    return [frozenset((*place, frozenset(positions)) for place, positions in unit.items()) for unit in found]


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_adapter_and_trace_agree(family):
    model = make_tiny(family)
    traced = sc.anatomy(model, example_kwargs={"input_ids": tiny_ids(2, 8), "use_cache": False})
    by_trace = {unit for group in traced if group.frozen is None for unit in units(group)}
    # a single unit is no choice: one key-value head for all queries can't be cut, and the trace doesn't offer it
    # and the trace takes logits for what a caller counts on
    known = [g for g in sc.anatomy(model) if g.frozen is None and g.kind not in ("layer", "vocab") and g.units > 1]
    # ALiBi's slopes belong to the number of heads, so that adapter freezes them
    heads = set() if family in ("falcon-mqa", "falcon-alibi") else {"kv_head"}
    wide = {"hidden"} if family in WIDE else set()
    assert {group.kind for group in known} == {"neuron"} | heads | wide
    for group in known:
        missing = [number for number, unit in enumerate(units(group)) if unit not in by_trace]
        assert not missing, f"{group.name}: the trace has no units {missing}"
