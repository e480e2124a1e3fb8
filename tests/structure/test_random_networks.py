"""Random networks: what is cut equals what is masked, and costs what it was said to cost; or it is refused."""

from __future__ import annotations

from collections import Counter

import pytest

from cut_networks import check, check_traced, pruned_anatomy, randomised
from random_networks import MAKERS, RandomNetwork
from secateur.errors import SecateurError
from secateur.structure.groups import HEADS, traced_anatomy
from secateur.structure.trace import trace

NETWORKS, PARTS = 125, 25
# of every network: 500 cases in all
CUTS = ((0.1, 0), (0.3, 1), (0.5, 2), (0.8, 3))
TOLERANCE = 1e-9


def cases(part: int) -> range:
    return range(part, NETWORKS, PARTS)


def cut_and_check(seed: int, counts: Counter[str]) -> None:
    network = RandomNetwork(seed)
    module, inputs = randomised(network, seed), (network.example,)
    traced = trace(module, inputs)
    dense = check_traced(traced, module, inputs, TOLERANCE)
    for number, (fraction, cut_seed) in enumerate(CUTS):
        anatomy = traced_anatomy(traced, heads=HEADS[(seed + number) % 3])
        try:
            found = pruned_anatomy(module, inputs, anatomy, None, fraction, cut_seed)
        except SecateurError as refusal:
            # units of two groups that lie on the same positions, all of them chosen
            assert "nothing would be left of" in str(refusal)
            counts["refused"] += 1
            continue
        counts["cut" if found.removed else "nothing to cut"] += 1
        check(found, TOLERANCE, dense)


# tracing the lines that run makes this a third slower, and the first parts reach what the others reach
@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=[pytest.mark.no_cover] if part >= 5 else []) for part in range(PARTS)]
)
def test_cut_equals_masked(part):
    counts: Counter[str] = Counter()
    for seed in cases(part):
        try:
            cut_and_check(seed, counts)
        except Exception as error:
            raise AssertionError(f"{error}\n\n{RandomNetwork(seed)}") from error
    # a refusal is a last resort, not a way out
    assert counts["refused"] <= 2 and counts["cut"] > 0.7 * sum(counts.values())


def test_every_kind_of_piece_is_drawn(monkeypatch):
    drawn: Counter[str] = Counter()
    for makers in MAKERS.values():
        for name, make in list(makers.items()):

            def noted(rng, shape, name=name, make=make):
                made = make(rng, shape)
                drawn[name] += made is not None
                return made

            monkeypatch.setitem(makers, name, noted)
    for seed in range(NETWORKS):
        RandomNetwork(seed)
    assert {name for makers in MAKERS.values() for name in makers} == {name for name, count in drawn.items() if count}
