"""Oracles of Wanda, and a second implementation straight from the formula in float64."""

import pytest
import torch

from secateur.errors import OptionError
from secateur.methods import Target, make_method
from secateur.observe import SumSquares


def seen(*batches):
    squares = SumSquares()
    for batch in batches:
        squares.update(batch)
    return {"squares": squares}


def with_norms(a):
    """One sequence of one token whose squared channel norms are ``a``."""
    return seen(torch.as_tensor(a, dtype=torch.float32).sqrt().reshape(1, 1, -1))


def prune(weight, statistics, **options):
    target = Target("m", "weight", 0, torch.as_tensor(weight, dtype=torch.float32))
    return make_method("wanda", options).prune(target, statistics)[0]


def reference_mask(w, x_BTC, sparsity):
    """Per output row, int(inputs * sparsity) lowest |W| * ||X_j|| leave; plain loops, float64."""
    norms = [float(x_BTC[:, :, j].double().square().sum()) ** 0.5 for j in range(w.shape[1])]
    keep = torch.ones(w.shape, dtype=torch.bool)
    for i in range(w.shape[0]):
        scores = [abs(float(w[i, j])) * norms[j] for j in range(w.shape[1])]
        for j in sorted(range(w.shape[1]), key=lambda j: scores[j])[: int(w.shape[1] * sparsity)]:
            keep[i, j] = False
    return keep


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.73])
def test_masks_equal_a_plain_float64_reference(sparsity):
    generator = torch.Generator().manual_seed(1)
    w, x = torch.randn(24, 40, generator=generator), torch.randn(6, 9, 40, generator=generator)
    assert torch.equal(prune(w, seen(x[:2], x[2:]), sparsity=sparsity), reference_mask(w, x, sparsity))


def test_hand_case():
    # S = [[3, 4], [1, 8]]: the first entry of both rows leaves, where magnitude removes (0, 1) and (1, 0)
    assert prune([[3.0, 1], [1, 2]], with_norms([1.0, 16]), sparsity=0.5).tolist() == [[False, True], [False, True]]


def test_white_inputs_give_magnitude_masks_per_row():
    w = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    target = Target("m", "weight", 0, w)
    magnitude = make_method("magnitude", {"sparsity": 0.4, "scope": "row"}).prune(target, {})[0]
    assert torch.equal(prune(w, with_norms(torch.full((20,), 3.0)), sparsity=0.4), magnitude)


def test_scaling_a_channel_and_its_column_against_each_other_changes_nothing():
    generator = torch.Generator().manual_seed(2)
    w, x = torch.randn(8, 20, generator=generator), torch.randn(3, 5, 20, generator=generator)
    scale = torch.ones(20)
    scale[3] = 64.0
    assert torch.equal(prune(w, seen(x)), prune(w / scale, seen(x * scale)))
    magnitude = make_method("magnitude", {"scope": "row"})
    first, second = (magnitude.prune(Target("m", "weight", 0, t), {})[0] for t in (w, w / scale))
    assert not torch.equal(first, second)


def test_a_j_is_the_mean_over_sequences_of_the_squared_norm():
    x = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(3))
    expected = torch.stack([x[i].double().square().sum(dim=0) for i in range(4)]).mean(dim=0)
    torch.testing.assert_close(seen(x)["squares"].mean_per_sequence(), expected, rtol=1e-6, atol=0)


def test_a_silent_input_gives_zero_scores_not_nan():
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    x[..., 2] = 0
    keep = prune(torch.ones(4, 6), seen(x), sparsity=0.17)
    assert not keep[:, 2].any() and keep.sum() == 4 * 5


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 5)])
def test_n_of_m_leaves_exactly_n_zeros_in_every_run(n, m):
    w = torch.randn(6, m * 4, generator=torch.Generator().manual_seed(n))
    keep = prune(w, with_norms(torch.rand(m * 4) + 0.1), pattern=f"{n}:{m}")
    assert ((~keep).reshape(6, 4, m).sum(dim=2) == n).all()


def test_variant_reaches_the_sparsity_with_a_varying_number_per_row():
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(32, 64, generator=generator) * torch.logspace(0, 1, 64)
    keep = prune(w, with_norms(torch.rand(64, generator=generator) + 0.1), sparsity=0.5, use_variant=True)
    per_row = (~keep).float().mean(dim=1)
    assert abs(float(per_row.mean()) - 0.5) < 0.02
    assert per_row.std() > 0.01


@pytest.mark.parametrize(
    ("method", "options", "others"),
    [
        ("wanda", {"use_variant": True}, [{"scope": "layer"}, {"scope": "global"}, {"pattern": "2:4"}]),
        ("magnitude", {"inclusive": True}, [{"scope": "row"}, {"scope": "global"}, {"pattern": "2:4"}]),
        ("sparsegpt", {"inclusive": True}, [{"pattern": "2:4"}]),
    ],
)
def test_a_rule_that_another_option_would_replace_is_refused(method, options, others):
    make_method(method, options)
    for other in others:
        with pytest.raises(OptionError, match=f"{method}: {next(iter(options))} .* leave .* out"):
            make_method(method, {**options, **other})


def test_variant_rows_lose_entries_up_to_one_shared_share_of_their_sum():
    w = torch.randn(16, 32, generator=torch.Generator().manual_seed(6)).abs()
    keep = prune(w, with_norms(torch.ones(32)), sparsity=0.4, use_variant=True)
    removed_share = (w * ~keep).sum(dim=1) / w.sum(dim=1)
    smallest_kept = torch.where(keep, w, torch.inf).min(dim=1).values / w.sum(dim=1)
    # adding the next entry would pass the shared alpha in every row
    assert float(removed_share.max()) <= float((removed_share + smallest_kept).min()) + 1e-6
