"""The law of every statistic: any split of the data, merged in order, equals the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.observe import (
    Amplitudes,
    Angle,
    Contributions,
    Cross,
    Gram,
    LastTokens,
    Lost,
    Moments,
    SequenceMoments,
    Similarity,
    Statistic,
    SumSquares,
)


class Told(Contributions):
    """Contributions of pairs of channels to a weight that counts up."""

    def update(self, x_BTC: torch.Tensor) -> None:
        channels = x_BTC.shape[-1]
        weight_OI = torch.arange(3.0 * channels).reshape(3, channels) / channels - 1
        self.read_by(weight_OI, torch.arange(channels).reshape(-1, 2))
        super().update(x_BTC)


KINDS = [SumSquares, Moments, SequenceMoments, Gram, Cross, Lost, Similarity, Angle, LastTokens, Amplitudes, Told]


def values(statistic) -> dict[str, torch.Tensor]:
    """Every result that a statistic offers, as float64."""
    if isinstance(statistic, SumSquares):
        return {"total": statistic.total_C, "a": statistic.mean_per_sequence()}
    if isinstance(statistic, Moments):
        return {"mean": statistic.mean_C, "variance": statistic.variance()}
    if isinstance(statistic, SequenceMoments):
        return {"sums": statistic.sums_NC, "squares": statistic.squares_NC}
    if isinstance(statistic, Gram):
        return {"gram": statistic.total_CC.double(), "count": torch.tensor([statistic.sequences, statistic.tokens])}
    if isinstance(statistic, Cross):
        return {"cross": statistic.total_CC.double(), "sum": statistic.sum_C}
    if isinstance(statistic, Lost):
        return {"lost": statistic.total_OC.double(), "sum": statistic.sum_C}
    if isinstance(statistic, LastTokens):
        return {"rows": statistic.rows_NC.double()}
    if isinstance(statistic, Amplitudes):
        return {f"{a}, {b}": statistic.over(a, b) for a in statistic.WAYS for b in ("mean", "l2")}
    if isinstance(statistic, Contributions):
        return {"mean": statistic.mean_U()}
    return {"mean": torch.tensor(statistic.mean, dtype=torch.float64)}


@st.composite
def split_data(draw):
    sequences = draw(st.integers(2, 7))
    tokens = draw(st.integers(2, 5))
    channels = 2 * draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**20))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    offset = draw(st.sampled_from([0.0, 10.0]))
    x = torch.randn(sequences, tokens, channels, generator=torch.Generator().manual_seed(seed)) * scale + offset * scale
    cuts = sorted(draw(st.sets(st.integers(1, sequences - 1))))
    return x, cuts


@pytest.mark.parametrize("kind", KINDS)
@given(case=split_data())
@settings(max_examples=40, deadline=None)
def test_any_split_merged_equals_the_whole(kind, case):
    x, cuts = case
    whole = kind()
    whole.update(x)
    parts = []
    for part in torch.tensor_split(x, cuts):
        statistic = kind()
        statistic.update(part)
        parts.append(statistic)
    merged = parts[0]
    for part in parts[1:]:
        merged.merge(part)
    stepwise = kind()
    for part in torch.tensor_split(x, cuts):
        stepwise.update(part)
    for name, expected in values(whole).items():
        size = float(expected.abs().max()) + 1e-30
        for other in (merged, stepwise):
            torch.testing.assert_close(values(other)[name], expected, rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_an_empty_one_changes_nothing(kind):
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    statistic, empty = kind(), kind()
    statistic.update(x)
    before = {n: v.clone() for n, v in values(statistic).items()}
    statistic.merge(empty)
    for name, expected in before.items():
        torch.testing.assert_close(values(statistic)[name], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_keeps_to_the_protocol(kind):
    assert isinstance(kind(), Statistic)


def test_moments_equal_two_passes_far_from_zero():
    x = torch.randn(64, 8, 3, generator=torch.Generator().manual_seed(0)) * 0.01 + 100
    statistic = Moments()
    for part in x.split(7):
        statistic.update(part)
    flat = x.reshape(-1, 3).double()
    torch.testing.assert_close(statistic.mean_C, flat.mean(dim=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistic.variance(), flat.var(dim=0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("channels", [1, 5, 64, 130])
def test_gram_equals_the_plain_product(channels):
    x = torch.randn(3, 11, channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = Gram()
    gram.update(x)
    flat = x.reshape(-1, channels)
    torch.testing.assert_close(gram.total_CC, flat.T @ flat)


def test_cross_equals_the_plain_product_and_a_gram_where_both_inputs_are_one():
    x, dense = torch.randn(2, 3, 11, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cross, same, gram = Cross(), Cross(), Gram()
    cross.update_pair(x, dense)
    same.update_pair(x, x)
    gram.update(x)
    torch.testing.assert_close(cross.total_CC, x.reshape(-1, 5).T @ dense.reshape(-1, 5))
    torch.testing.assert_close(cross.sum_C, dense.sum(dim=(0, 1)))
    torch.testing.assert_close(same.total_CC, gram.total_CC)
    with pytest.raises(ValueError, match="no data"):
        _ = Cross().total_CC


def test_what_is_lost_is_held_against_an_input_of_another_width():
    generator = torch.Generator().manual_seed(0)
    x, lost = (torch.randn(3, 11, n, generator=generator, dtype=torch.float64) for n in (5, 4))
    found = Lost()
    found.update_pair(x, lost)
    torch.testing.assert_close(found.total_OC, lost.reshape(-1, 4).T @ x.reshape(-1, 5))
    torch.testing.assert_close(found.sum_C, lost.sum(dim=(0, 1)))
    with pytest.raises(ValueError, match="no data"):
        _ = Lost().total_OC


def test_gram_says_when_it_has_seen_nothing():
    with pytest.raises(ValueError, match="no data"):
        _ = Gram().total_CC


def test_gram_caches_a_factorisation_until_more_data_comes():
    gram, calls = Gram(), []
    gram.update(torch.ones(1, 2, 3))
    for _ in range(2):
        gram.cached("factor", 0.1, lambda g: calls.append(1))
    gram.update(torch.ones(1, 2, 3))
    gram.cached("factor", 0.1, lambda g: calls.append(1))
    assert len(calls) == 2


@pytest.mark.parametrize("channels", [24, 700])
def test_a_gram_of_bfloat16_inputs_loses_nothing(channels):
    before = torch.get_float32_matmul_precision()
    x = torch.randn(3, 90, channels, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    gram = Gram()
    gram.update(x[:2])
    gram.update(x[2:])
    flat = x.double().reshape(-1, channels)
    # products of bfloat16 factors are exact in float32: what is left is the rounding of float32 sums
    torch.testing.assert_close(gram.total_CC.double(), flat.T @ flat, rtol=1e-5, atol=1e-4)
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("kind", [SumSquares, Moments])
def test_statistics_of_many_rows_are_those_of_a_few(kind):
    x = torch.randn(2, 1500, 6, generator=torch.Generator().manual_seed(0)) + 5
    whole, pieces = kind(), kind()
    whole.update(x)
    for piece in x.reshape(-1, 1, 6).split(7):
        pieces.update(piece)
    flat = x.double().reshape(-1, 6)
    if isinstance(whole, Moments):
        for found in (whole, pieces):
            torch.testing.assert_close(found.mean_C, flat.mean(dim=0), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(found.variance(), flat.var(dim=0), rtol=1e-5, atol=1e-6)
    else:
        for found in (whole, pieces):
            torch.testing.assert_close(found.total_C, flat.square().sum(dim=0), rtol=1e-6, atol=1e-6)
