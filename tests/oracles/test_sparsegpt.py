"""Oracles of SparseGPT: its sequential definition, written in float64 from the formulas."""

import pytest
import torch

from secateur.errors import NonFiniteError
from secateur.methods import Target, make_method
from secateur.observe import Gram
from secateur.solver import inverse_factor, obs_sweep


def gram_of(*batches):
    gram = Gram()
    for batch in batches:
        gram.update(batch)
    return gram


def prune(w, x, **options):
    return make_method("sparsegpt", options).prune(Target("m", "weight", 0, w), {"gram": gram_of(x)})


def data(outputs=12, inputs=20, sequences=4, tokens=30, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5 + torch.eye(inputs)
    x = torch.randn(sequences, tokens, inputs, generator=generator, dtype=torch.float64) @ mix
    w = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    return w.to(dtype), x.to(dtype)


def reference(w, x_BTC, sparsity=0.5, damping=0.01, block=128, pattern=None):
    """Algorithm 1 of the paper in float64: column by column, with the exact rule for the number removed."""
    w = w.double().clone()
    h = sum(2 * s.double().T @ s.double() for s in x_BTC) / len(x_BTC)
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h)).T
    keep = torch.ones(w.shape, dtype=torch.bool)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        for j in range(start, stop):
            if pattern is None and j == start:
                score = (w[:, start:stop] ** 2) / u.diagonal()[start:stop] ** 2
                lowest = score.flatten().argsort(stable=True)[: int(score.numel() * sparsity)]
                flat = torch.ones(score.numel(), dtype=torch.bool)
                flat[lowest] = False
                keep[:, start:stop] = flat.reshape(score.shape)
            if pattern is not None and (j - start) % pattern[1] == 0:
                run = slice(j, j + pattern[1])
                score = (w[:, run] ** 2) / u.diagonal()[run] ** 2
                gone = score.argsort(dim=1, stable=True)[:, : pattern[0]]
                keep[:, run] = torch.ones_like(score, dtype=torch.bool).scatter(1, gone, False)
            q = w[:, j] * keep[:, j]
            error = (w[:, j] - q) / u[j, j]
            w[:, j:] -= torch.outer(error, u[j, j:])
            w[:, j] = q
    return w, keep


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"sparsity": 0.3, "block": 8}, {"pattern": (2, 4)}])
def test_weights_equal_a_plain_float64_reference(options):
    w, x = data(outputs=32, inputs=48, tokens=60)
    expected, keep = reference(w, x, **options)
    given = {"sparsity": options.get("sparsity", 0.5), "block_size": options.get("block", 128)}
    if "pattern" in options:
        given["pattern"] = "2:4"
    mask, weight, notes = prune(w, x, **given)
    assert torch.equal(mask, keep) and not notes
    assert float((weight.double() - expected).norm() / expected.norm()) < 1e-4


def test_equals_refitting_the_columns_to_the_right_one_by_one():
    w, x = data(dtype=torch.float64)
    flat = x.reshape(-1, x.shape[-1])
    mask, weight, _ = prune(w, x, sparsity=0.5, damping=0.0)
    expected = w.clone()
    for j in range(w.shape[1]):
        right = flat[:, j + 1 :]
        for i in (~mask[:, j]).nonzero().flatten().tolist():
            if right.shape[1]:
                gone = flat[:, j] * expected[i, j]
                expected[i, j + 1 :] += torch.linalg.lstsq(right, gone[:, None]).solution.flatten()
            expected[i, j] = 0
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-8)


def test_reported_loss_is_the_total_squared_output_error():
    w, x = data(sequences=1, dtype=torch.float64)
    factor, _ = inverse_factor(2 * x[0].T @ x[0], damping=0.0)
    weight, _, loss = obs_sweep(w, factor, lambda s: s > s.median())
    error = (x[0] @ (weight - w).T).square().sum()
    assert loss == pytest.approx(float(error), rel=1e-9)


def test_masking_only_the_last_column_changes_nothing_else():
    w, x = data(dtype=torch.float64)
    factor, _ = inverse_factor(gram_of(x).total_CC, damping=0.0)

    def last_only(scores):
        keep = torch.ones_like(scores, dtype=torch.bool)
        keep[:, -1] = False
        return keep

    weight, keep, _ = obs_sweep(w, factor, last_only, block=w.shape[1])
    assert torch.equal(weight[:, :-1], w[:, :-1]) and not weight[:, -1].any() and not keep[:, -1].any()


def test_block_size_does_not_change_the_result_for_a_given_mask():
    w, x = data(dtype=torch.float64)
    factor, _ = inverse_factor(gram_of(x).total_CC, damping=0.01)
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(9)) > 0.5
    results = []
    for block in (1, 3, 8, 64):
        start = 0

        def fixed(scores):
            nonlocal start
            part = mask[:, start : start + scores.shape[1]]
            start += scores.shape[1]
            return part

        results.append(obs_sweep(w, factor, fixed, block=block)[0])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-10, atol=1e-12)


def test_orthogonal_inputs_need_no_compensation_and_rank_like_wanda():
    scale = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.2
    x = (torch.eye(8, dtype=torch.float64) * scale).reshape(1, 8, 8)
    w = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask, weight, _ = prune(w, x, sparsity=0.5, damping=0.0)
    torch.testing.assert_close(weight, w * mask, rtol=1e-12, atol=1e-14)
    wanda = (w.abs() * scale).flatten()
    assert torch.equal(mask.flatten(), wanda >= wanda.sort().values[int(wanda.numel() * 0.5)])


def test_compensation_beats_plain_zeroing():
    w, x = data(outputs=24, inputs=32, tokens=60, dtype=torch.float64)
    flat = x.reshape(-1, 32)
    mask, weight, _ = prune(w, x, sparsity=0.5)

    def error(v):
        return float((flat @ (v - w).T).square().sum())

    assert error(weight) < 0.8 * error(w * mask)


def test_singular_hessian_is_damped_further_and_reported():
    w, x = data(outputs=6, inputs=16, sequences=1, tokens=4, dtype=torch.float64)
    mask, weight, notes = prune(w, x, sparsity=0.5, damping=0.0)
    assert torch.isfinite(weight).all() and "damping raised to" in notes[0]
    assert torch.equal(weight == 0, ~mask)


def test_dead_inputs_are_zeroed_and_disturb_nothing():
    w, x = data(dtype=torch.float64)
    x[..., 5] = 0
    _, weight, _ = prune(w, x, sparsity=0.5)
    assert not weight[:, 5].any() and torch.isfinite(weight).all()


def test_a_hessian_with_nan_is_refused():
    with pytest.raises(NonFiniteError, match="NaN or inf"):
        inverse_factor(torch.full((3, 3), float("nan")))


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_n_of_m_leaves_exactly_n_zeros_in_every_run(pattern):
    n, m = map(int, pattern.split(":"))
    w, x = data(outputs=10, inputs=40)
    mask, weight, _ = prune(w, x, pattern=pattern)
    assert ((~mask).reshape(10, -1, m).sum(dim=2) == n).all()
    assert torch.equal(weight != 0, mask)


@pytest.mark.parametrize("damping", [0.01, 0.0])
def test_a_hessian_stays_as_it_was(damping: float) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0
    hessian = x.T @ x
    before = hessian.clone()
    inverse_factor(hessian, damping)
    assert torch.equal(hessian, before)
    hopeless = -hessian
    with pytest.raises(NonFiniteError):
        inverse_factor(hopeless, damping)
    assert torch.equal(hopeless, -before)
