"""Oracles of the PQ index: values by hand, its six properties, and the bound that follows from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import secateur as sc
from secateur.criteria.sparsity import retained
from secateur.errors import NonFiniteError, UsageError

ORDERS = [(0.5, 1.0), (1.0, 2.0), (0.2, 1.4), (0.9, 3.0)]
vectors = st.lists(st.floats(0.01, 100), min_size=2, max_size=20).map(lambda v: torch.tensor(v, dtype=torch.float64))


def naive(x: torch.Tensor, p: float, q: float) -> float:
    sizes = np.abs(x.numpy().astype(np.float64)).ravel()
    norm = {order: (sizes**order).sum() ** (1 / order) for order in (p, q)}
    return 1 - len(sizes) ** (1 / q - 1 / p) * norm[p] / norm[q]


@pytest.mark.parametrize(("p", "q"), ORDERS)
def test_constant_vectors_have_none_and_one_hot_vectors_the_most(p, q):
    assert sc.pq_index(torch.full((7,), -3.0), p, q) == 0
    one = torch.zeros(4)
    one[2] = 5
    assert float(sc.pq_index(one, p, q)) == pytest.approx(1 - 4 ** (1 / q - 1 / p))


def test_by_hand():
    one = torch.tensor([0.0, 2.0, 0.0, 0.0])
    assert float(sc.pq_index(one)) == pytest.approx(0.75) and float(sc.pq_index(one, 1.0, 2.0)) == pytest.approx(0.5)
    w = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert float(sc.pq_index(w)) == pytest.approx(0.0555858573695, abs=1e-12)
    assert float(sc.pq_index(w, 1.0, 2.0)) == pytest.approx(0.0871290708247, abs=1e-12)


def test_of_gaussian_numbers_and_the_bound():
    w = torch.from_numpy(np.random.RandomState(0).randn(1000))
    for (p, q), index, kept in (((0.5, 1.0), 0.154483, 846), ((1.0, 2.0), 0.204266, 634)):
        found = sc.pq_index(w, p, q)
        assert float(found) == pytest.approx(index, abs=1e-6)
        assert int(retained(found, torch.tensor(1000), p, q).ceil()) == kept


def test_the_bound_at_its_ends():
    for (p, q), sparse in (((0.5, 1.0), 0.75), ((1.0, 2.0), 0.5)):
        assert float(retained(torch.tensor(sparse), torch.tensor(4), p, q)) == pytest.approx(1.0)
        assert float(retained(torch.tensor(0.0), torch.tensor(4), p, q)) == 4
    w = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert float(retained(sc.pq_index(w, 1, 2), torch.tensor(4), 1, 2)) == pytest.approx(10 / 3)
    # one that may leave as much as what stays halves the number by (1 + 1)^(-2)
    assert float(retained(torch.tensor(0.0), torch.tensor(8), 0.5, 1.0, eta=1.0)) == 2


@given(vectors, st.sampled_from(ORDERS), st.floats(1e-6, 1e6))
def test_properties(w, orders, scale):
    p, q = orders
    index = sc.pq_index(w, p, q)
    assert float(index) == pytest.approx(naive(w, p, q), abs=1e-9)
    for other in (scale * w, torch.cat([w, w, w]), w.flip(0), -w):
        assert torch.isclose(sc.pq_index(other, p, q), index, atol=1e-9)
    # rising tide, and a transfer from the largest to the smallest
    assert sc.pq_index(w + w.max(), p, q) <= index + 1e-12
    poor, rich = int(w.argmin()), int(w.argmax())
    if w[rich] > w[poor]:
        shared = w.clone()
        shared[rich] -= (w[rich] - w[poor]) / 4
        shared[poor] += (w[rich] - w[poor]) / 4
        assert sc.pq_index(shared, p, q) < index + 1e-12
    # babies: one more without anything
    assert sc.pq_index(torch.cat([w, torch.zeros(1)]), p, q) > index


@given(vectors, st.sampled_from(ORDERS))
def test_the_bound_holds(w, orders):
    """Dropping all but the r largest leaves so much of the sum of |w|^p that r isn't below the bound."""
    p, q = orders
    sums = w.sort(descending=True).values.pow(p).cumsum(0)
    for r in range(1, len(w) + 1):
        eta = float((sums[-1] - sums[r - 1]) / sums[r - 1])
        assert r >= float(retained(sc.pq_index(w, p, q), torch.tensor(len(w)), p, q, eta)) - 1e-6


def test_rows_masks_and_small_numbers():
    w = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 7.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(sc.pq_index(w, dim=1), torch.tensor([0.0555858573695, 0.75, 0.0], dtype=torch.float64))
    mask = torch.tensor([[True, True, True, True], [False, False, False, True], [False, False, False, False]])
    assert sc.pq_index(w, dim=1, mask=mask)[1:].tolist() == [0.0, 0.0]
    assert sc.pq_index(w, mask=mask) == sc.pq_index(w[mask])
    # squares of the smallest numbers of half precision are zero even in float64, four times over
    tiny = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64) * 1e-300
    assert float(sc.pq_index(tiny, 1.0, 2.0)) == pytest.approx(0.0871290708247)


def test_what_is_refused():
    w = torch.ones(3)
    for p, q in ((1.0, 1.0), (2.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (1.0, float("inf"))):
        with pytest.raises(UsageError, match="0 < p < q"):
            sc.pq_index(w, p, q)
    with pytest.raises(UsageError, match="no entries"):
        sc.pq_index(torch.ones(0, 3))
    with pytest.raises(UsageError, match="mask must be boolean"):
        sc.pq_index(w, mask=torch.ones(3))
    with pytest.raises(NonFiniteError, match="NaN or inf"):
        sc.pq_index(torch.tensor([1.0, float("nan")]))
