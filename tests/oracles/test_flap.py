"""Oracles of FLAP's sheet."""

import pytest
import torch

from secateur.allocate import GlobalAllocator
from secateur.allocate.units import Limits
from secateur.criteria import standardise
from secateur.errors import BudgetError, OptionError
from secateur.methods import Target, make_method
from secateur.methods.structure.flap import streaming_fluctuation
from secateur.observe import Moments, SequenceMoments, SumSquares
from secateur.structure import Cost, Group


def observed(x_BTC):
    seen = {"moments": Moments(), "squares": SumSquares(), "sequences": SequenceMoments()}
    for statistic in seen.values():
        statistic.update(x_BTC)
    return seen


def case(seed=0, outputs=6, channels=10):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 12, channels, generator=generator) * torch.rand(channels, generator=generator) + 1.5
    w = torch.randn(outputs, channels, generator=generator)
    target = Target("layers.0.mlp", "neuron", 0, w, torch.arange(channels)[:, None])
    return w, x, target


def channel_scores(x, target, **options):
    return make_method("flap", options)._channel_scores(target.weight, observed(x))


def outputs(w, x, removed, bias):
    kept = w.clone()
    kept[:, removed] = 0
    return x.reshape(-1, x.shape[-1]).double() @ kept.double().T + bias


def test_a_constant_channel_costs_nothing():
    w, x, target = case()
    x[..., 3] = 0.75
    scores = channel_scores(x, target)
    assert float(scores[3]) < 1e-12 and scores.argmin() == 3
    bias = make_method("flap").compensate(target, observed(x), torch.tensor([3]))
    torch.testing.assert_close(outputs(w, x, [3], bias), outputs(w, x, [], 0), rtol=1e-5, atol=1e-6)


def test_mean_output_is_preserved_for_any_removed_set():
    w, x, target = case()
    removed = [0, 2, 7, 8]
    bias = make_method("flap").compensate(target, observed(x), torch.tensor(removed))
    shift = (outputs(w, x, removed, bias) - outputs(w, x, [], 0)).mean(dim=0)
    assert shift.abs().max() < 1e-6


def test_single_removal_costs_variance_times_column_energy():
    w, x, target = case()
    flat = x.reshape(-1, x.shape[-1]).double()
    seen = observed(x)
    for j in range(x.shape[-1]):
        bias = make_method("flap").compensate(target, seen, torch.tensor([j]))
        energy = w[:, j].double().square().sum()
        with_bias = (outputs(w, x, [j], bias) - outputs(w, x, [], 0)).square().sum(dim=1).mean()
        without = (outputs(w, x, [j], 0) - outputs(w, x, [], 0)).square().sum(dim=1).mean()
        torch.testing.assert_close(with_bias, flat[:, j].var(unbiased=False) * energy, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(without, flat[:, j].square().mean() * energy, rtol=1e-5, atol=1e-8)


def test_any_other_constant_is_worse_by_its_distance():
    w, x, target = case()
    removed = [1, 4]
    bias = make_method("flap").compensate(target, observed(x), torch.tensor(removed))
    other = bias + torch.linspace(-0.5, 0.5, len(bias), dtype=torch.float64)
    best, worse = ((outputs(w, x, removed, b) - outputs(w, x, [], 0)).square().sum(dim=1).mean() for b in (bias, other))
    torch.testing.assert_close(worse - best, (other - bias).square().sum(), rtol=1e-4, atol=1e-6)


def test_standardising_ignores_scale_and_offset_of_a_layer():
    scores = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(standardise(scores), standardise(7.5 * scores + 3), rtol=1e-9, atol=1e-9)
    assert standardise(scores).std() == pytest.approx(1.0)
    # what is squared in an attention that gives little is below 1e-12
    torch.testing.assert_close(standardise(1e-14 * scores), standardise(scores), rtol=1e-9, atol=1e-9)
    assert not standardise(torch.full((9,), 0.3)).any() and not standardise(torch.zeros(9)).any()


def budget_case():
    heads = Group("a", "kv_head", 0, 2, Cost(3))
    channels = Group("m", "neuron", 0, 4, Cost(1))
    scores = {"a": torch.tensor([0.9, -0.2]), "m": torch.tensor([1.0, 0.5, 0.1, -0.5])}
    return scores, [heads, channels]


def test_budget_by_hand():
    scores, groups = budget_case()
    kept = GlobalAllocator(0.3).allocate(scores, groups, 10, Limits())
    assert kept["a"].tolist() == [0] and kept["m"].tolist() == [0, 1, 2]


def test_budget_by_hand_under_the_published_rule():
    scores, groups = budget_case()
    kept = GlobalAllocator(0.3, strict=True).allocate(scores, groups, 10, Limits())
    assert kept["a"].tolist() == [0] and kept["m"].tolist() == [0, 1]


def test_sparsity_zero_is_the_identity_under_both_rules():
    scores, groups = budget_case()
    for strict in (False, True):
        kept = GlobalAllocator(0.0, strict=strict).allocate(scores, groups, 10, Limits())
        assert [len(kept[n]) for n in ("a", "m")] == [2, 4]


def test_streaming_recursion_by_hand():
    seen = SequenceMoments()
    expected = [0.0, 0.125, 0.3958333]
    for value, wanted in zip((1.0, 2.0, 3.0), expected, strict=True):
        seen.update(torch.tensor([[[value]]]))
        assert float(streaming_fluctuation(seen)) == pytest.approx(wanted, abs=1e-6)


def test_exact_statistics_by_hand():
    seen = observed(torch.tensor([[[1.0]], [[2.0]], [[3.0]]]))["moments"]
    assert float(seen.mean_C) == pytest.approx(2.0) and float(seen.variance()) == pytest.approx(1.0)


def test_streaming_equals_exact_up_to_the_token_factor_on_many_sequences():
    x = torch.randn(400, 16, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.5, 1.0, 2.0])
    seen = observed(x)
    ratio = streaming_fluctuation(seen["sequences"]) / (16 * seen["moments"].variance())
    assert ((ratio > 0.98) & (ratio < 0.99)).all()


def test_metrics_follow_their_formulas():
    w, x, target = case()
    flat = x.reshape(-1, x.shape[-1]).double()
    variance, energy = flat.var(dim=0), w.double().square().sum(dim=0)
    torch.testing.assert_close(channel_scores(x, target, metric="IFV"), variance, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(channel_scores(x, target, metric="WIFV"), variance * energy, rtol=1e-5, atol=1e-9)
    norms = x.double().square().sum(dim=1).mean(dim=0).sqrt()
    expected = (w.double().abs() * norms).mean(dim=0)
    torch.testing.assert_close(channel_scores(x, target, metric="WIFN"), expected, rtol=1e-5, atol=1e-9)


def test_attention_scores_are_squared_before_standardising():
    w, x, _ = case(channels=8)
    target = Target("layers.0.attention", "kv_head", 0, w, torch.arange(8).reshape(2, 4))
    s = channel_scores(x, target)
    squared = make_method("flap").score(target, observed(x))
    plain = make_method("flap", {"square_attn": False}).score(target, observed(x))
    torch.testing.assert_close(squared, standardise(s.square()).reshape(2, 4).mean(dim=1))
    torch.testing.assert_close(plain, standardise(s).reshape(2, 4).mean(dim=1))


def test_negative_number_of_heads_is_refused():
    with pytest.raises(OptionError, match="remove_heads"):
        make_method("flap", {"structure": "AL-MM", "remove_heads": -1})


@pytest.mark.parametrize("structure", ["AL-MM", "UL-MM"])
def test_heads_alone_leave_no_number_of_neurons(structure):
    groups = [Group(f"layers.{layer}.attention", "kv_head", layer, 4, Cost(12, 12, 48)) for layer in range(2)]
    method = make_method("flap", {"structure": structure, "remove_heads": 2})
    with pytest.raises(BudgetError, match="the model has no neurons to give what a number of heads leaves"):
        method.allocator().allocate({g.name: torch.ones(4) for g in groups}, groups, 96, Limits())
