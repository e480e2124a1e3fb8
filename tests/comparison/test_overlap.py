"""What plans have in common, against the zeros of masked models."""

from __future__ import annotations

import pytest
import torch

from secateur import api
from secateur.comparison.overlap import jaccard

METHODS = {
    "wanda_sp": {"method": "wanda_sp", "sparsity": 0.5},
    "query heads": {"method": "random_sp", "sparsity": 0.5, "options": {"heads": "query"}},
    "blocks": {"method": "shortgpt", "sparsity": 0.5},
    "weights": {"method": "magnitude", "sparsity": 0.5},
    "refitted": {"method": "flap", "sparsity": 0.5, "heal": "refit"},
}


@pytest.fixture(params=["llama", "transposed"])
def model(request, make_llama):
    if request.param == "llama":
        return make_llama()
    from families import make_tiny

    return make_tiny("gpt2")


def test_it_is_that_of_the_zeros_of_masked_models(model):
    plans = {n: api.plan(model, calibration="self", samples=2, length=16, **how) for n, how in METHODS.items()}
    found = jaccard(plans, lambda heads: api.anatomy(model, heads=heads))
    zeros = [gone_in(plan, model) for plan in plans.values()]
    for a, first in enumerate(zeros):
        for b, second in enumerate(zeros):
            assert found[a][b] == pytest.approx(float((first & second).sum() / (first | second).sum()))
    assert all(found[a][a] == 1.0 for a in range(len(zeros)))
    # all of a block, and half of everything: neither is in the other
    assert 0 < found[0][3] < 1


def gone_in(plan, model):
    """True for every weight of the blocks that is zero once the plan masks a model without zeros."""
    ones = api.apply(plan, model, mask=True)
    before = dict(model.named_parameters())
    gone = []
    for matrix in api.anatomy(model).matrices:
        if "layers" in plan.keep and matrix.layer not in plan.keep["layers"].tolist():
            # a silent block is one whose outputs are zero; all of it leaves
            gone.append(torch.ones(before[matrix.tensor].shape, dtype=torch.bool).flatten())
        else:
            gone.append((ones.get_parameter(matrix.tensor) == 0).flatten() & (before[matrix.tensor] != 0).flatten())
    return torch.cat(gone)


def test_plans_that_remove_nothing_have_no_overlap(make_llama):
    model = make_llama()
    nothing = api.plan(model, method="magnitude_sp", sparsity=0.0)
    some = api.plan(model, method="magnitude_sp", sparsity=0.5)
    found = jaccard({"nothing": nothing, "some": some}, lambda heads: api.anatomy(model, heads=heads))
    assert found == [[None, 0.0], [0.0, 1.0]]


def test_a_rotated_plan_has_no_weights_in_common_with_others(make_llama):
    model = make_llama()
    seen = {"calibration": "self", "samples": 2, "length": 16}
    plans = {n: api.plan(model, method=n, sparsity=0.5, **seen) for n in ("slicegpt", "magnitude_sp", "wanda_sp")}
    found = jaccard(plans, lambda heads: api.anatomy(model, heads=heads))
    assert found[0] == [None, None, None] == [row[0] for row in found]
    assert found[1][1] == 1.0 and 0 < found[1][2] < 1
