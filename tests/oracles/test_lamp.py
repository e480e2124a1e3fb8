"""Oracles of LAMP, worked out by hand."""

import torch

from secateur.methods import Target, make_method


def scores(weight):
    return make_method("lamp").score(Target("m", "weight", 0, torch.as_tensor(weight, dtype=torch.float32)), {})


def test_scores_are_squares_over_those_at_least_as_large():
    found = scores([[1.0, -3.0], [2.0, 0.0]])
    assert torch.allclose(found, torch.tensor([[1 / 14, 1.0], [4 / 13, 0.0]], dtype=found.dtype))


def test_the_order_within_a_matrix_is_that_of_magnitude():
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scores(weight).flatten().argsort(), weight.abs().flatten().argsort())


def test_scale_of_a_matrix_does_not_matter():
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(scores(weight), scores(weight * 8))


def test_the_largest_weight_of_every_matrix_has_the_score_one_and_no_matrix_is_emptied(tiny_llama):
    import secateur as sc

    with torch.no_grad():
        tiny_llama.model.layers[0].mlp.up_proj.weight.mul_(1e-4)
    plan = sc.plan(tiny_llama, method="lamp", sparsity=0.95)
    assert all(bool(mask.any()) for mask in plan.masks.values())
    total = sum(mask.numel() for mask in plan.masks.values())
    assert sum(int((~mask).sum()) for mask in plan.masks.values()) == int(total * 0.95)
