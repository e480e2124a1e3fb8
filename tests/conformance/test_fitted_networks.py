"""Methods that fit what stays to inputs: networks of all kinds, data of all forms, and what can be wrong with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from channel_networks import Attention, Residual
from cut_networks import difference, randomised
from random_networks import RandomNetwork
from secateur.errors import DataError, NonFiniteError, PlanMismatchError, SecateurError, UsageError
from secateur.plans import Plan
from secateur.solver import inverse_hessian, refit_without

DTYPE = torch.double


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


class Kinds(nn.Module):
    """Grouped, transposed and one-dimensional convolutions, and products with plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.grouped = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 10, 4, stride=2, padding=1)
        self.along = nn.Conv1d(10, 6, 3, padding=1)
        self.left, self.right = nn.Parameter(torch.randn(7, 6)), nn.Parameter(torch.randn(7, 5))
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.up(F.gelu(self.grouped(F.relu(self.stem(x))))))
        x = self.left @ F.gelu(self.along(x.mean(dim=3)))
        return self.head(torch.tanh(x.transpose(1, 2) @ self.right))


class Transformer(nn.Module):
    """Attention of torch, across two sequences: one parameter in three parts, each reading something else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.other = nn.Linear(6, 16), nn.Linear(6, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.other(y))
        x = torch.tanh(self.up(x))
        return self.head(self.norm(x + self.attention(x, y, y, need_weights=False)[0]))


CASES = {
    "residual": (Residual, (4, 3, 12, 12)),
    "attention": (Attention, (4, 7, 6)),
    "kinds": (Kinds, (4, 3, 6, 6)),
}


def made(name: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    cls, shape = CASES[name]
    return cls().double().eval(), noise(*shape, seed=seed)


def pruned(module, x, data=None, **options):
    return sc.prune(
        module,
        example_inputs=(x,),
        method="obspa",
        sparsity=0.4,
        budget="channels",
        data=[x, x + 0.1] if data is None and options.get("calibration") != "noise" else data,
        options=options,
    )


@pytest.mark.parametrize("options", [{}, {"inputs": "dense"}, {"calibration": "noise", "samples": 9}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_masked_equals_cut_with_the_fitted_values(name, options):
    module, x = made(name)
    result = pruned(module, x, **options)
    masked = sc.apply(result.plan, module, mask=True)
    with torch.no_grad():
        assert difference(result.model(x), masked(x)) < 1e-10
    assert type(result.model) is type(module) and result.plan.values and not result.report.notes
    assert ("bn2.running_var" in result.plan.values) == (name == "residual" and "calibration" not in options)


def test_the_plan_gives_the_same_bits_again(tmp_path):
    module, x = made("residual")
    result = pruned(module, x)
    result.plan.save(tmp_path / "plan")
    again = sc.apply(Plan.load(tmp_path / "plan"), module)
    first, second = result.model.state_dict(), again.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    inplace = sc.apply(result.plan, made("residual")[0], inplace=True)
    assert all(torch.equal(t, first[n]) for n, t in inplace.state_dict().items())


def test_fitting_keeps_more_than_plain_deletion_in_every_layer():
    module, x = made("kinds")
    result = pruned(module, x)
    plain = sc.apply(result.plan.__class__(result.plan.provenance, result.plan.groups, result.plan.keep), module)
    with torch.no_grad():
        dense = module(x)
        fitted, deleted = (float((m(x) - dense).square().sum()) for m in (result.model, plain))
    assert fitted < 0.5 * deleted
    assert {"grouped.weight", "up.weight", "along.weight", "left", "right", "head.weight"} >= set(result.plan.values)
    assert {"grouped.weight", "up.weight", "along.weight"} <= set(result.plan.values)


def test_the_parts_of_one_parameter_are_fitted_each_to_what_it_reads():
    module, inputs = Transformer().double().eval(), (noise(9, 5, 6), noise(9, 7, 6, seed=1))
    result = sc.prune(module, example_inputs=inputs, method="obspa", sparsity=0.3, budget="channels", data=[inputs])
    weight, stream = module.attention.in_proj_weight, result.plan.keep["up"]
    lanes = (result.plan.keep["attention.in_proj_weight"][:, None] * 8 + torch.arange(8)).flatten()
    rows = torch.cat([lanes, 16 + lanes, 32 + lanes])
    gone = ~torch.isin(torch.arange(16), stream)
    with torch.no_grad():
        masked = sc.apply(result.plan, module, mask=True)
        assert torch.equal(result.model.attention.in_proj_weight, masked.attention.in_proj_weight[rows][:, stream])
        read = [torch.tanh(layer(x)).flatten(0, 1) for layer, x in zip((module.up, module.other), inputs, strict=True)]
        hessians = [inverse_hessian(2 * x.T @ x, 0.01)[0] for x in read]
        queries, others = (
            refit_without(weight[part], h, gone) for part, h in zip((slice(16), slice(16, 48)), hessians, strict=True)
        )
    wanted = torch.cat([queries, others])[rows][:, stream]
    assert torch.allclose(result.model.attention.in_proj_weight, wanted, atol=1e-9) and gone.any()


@pytest.mark.parametrize("seed", range(12))
def test_random_networks(seed):
    network = RandomNetwork(seed)
    module, x = randomised(network, seed), network.example
    try:
        result = sc.prune(
            module,
            example_inputs=(x,),
            method="obspa",
            sparsity=0.3,
            budget="channels",
            data=[x, x],
            options={"norms": "stored"},
        )
    except SecateurError as refusal:
        pytest.skip(str(refusal))
    anatomy = sc.anatomy(module, example_inputs=(x,))
    with torch.no_grad():
        out = result.model(x)
        if not any(anatomy[name].inexact for name in result.plan.keep):
            assert difference(out, sc.apply(result.plan, module, mask=True)(x)) < 1e-9
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


# -- data --------------------------------------------------------------------------------------------------------------


def test_batches_of_any_form_and_size():
    module, x = made("residual")
    images = noise(12, 3, 12, 12, seed=5)
    labels = torch.arange(12) % 10
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=5)
    plans = [pruned(module, x, data).plan for data in (images, (images, labels), loader, list(images.split(4)))]
    for plan in plans[1:]:
        assert not plan.diff(plans[0])
        for name, values in plan.values.items():
            # statistics of norms are summed in float32
            assert torch.allclose(values, plans[0].values[name], rtol=1e-4, atol=1e-6)


def test_keyword_inputs_come_as_dictionaries():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, *, left, right):
            return self.b(torch.tanh(self.a(left - right)))

    module = Keyword().double()
    given = {"right": noise(4, 3), "left": noise(4, 3, seed=1)}
    first = sc.prune(
        module, example_kwargs=given, method="obspa", sparsity=0.3, budget="channels", data=[given | {"labels": 3}]
    )
    second = sc.prune(
        module,
        example_kwargs=given,
        method="obspa",
        sparsity=0.3,
        budget="channels",
        data=[dict(reversed(given.items()))],
    )
    assert torch.equal(first.plan.values["b.weight"], second.plan.values["b.weight"])


def test_noise_is_drawn_from_the_seed():
    module, x = made("residual")
    plans = [pruned(module, x, calibration="noise", samples=8, seed=seed).plan for seed in (0, 0, 1)]
    name = "conv2.weight"
    assert torch.equal(plans[0].values[name], plans[1].values[name])
    assert not torch.equal(plans[0].values[name], plans[2].values[name])


# -- what can't be fitted is named -------------------------------------------------------------------------------------


def test_what_reads_in_its_own_way_is_named_and_left_alone():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 6)
            self.w, self.head = nn.Parameter(torch.randn(5, 8)), nn.Linear(5, 2)
            self.rnn = nn.LSTM(6, 5, batch_first=True)

        def forward(self, x):
            x = torch.tanh(self.a(x))
            y = torch.einsum("btc,oc->bto", x, self.w)
            return self.head(y + self.rnn(torch.tanh(self.b(x)))[0])

    module, x = Mixed().double().eval(), noise(4, 6, 3)
    result = pruned(module, x)
    notes = " ".join(result.plan.provenance[0].notes)
    assert "einsum" in notes and "reads w in its own way" in notes
    assert "b stays: no weight that can be fitted reads it" in notes and len(result.plan.keep["a"]) < 8
    assert "w" not in result.plan.values and "b.weight" in result.plan.values
    with torch.no_grad():
        assert difference(result.model(x), sc.apply(result.plan, module, mask=True)(x)) < 1e-10
    assert torch.equal(result.model.w, module.w[result.plan.keep["w"]][:, result.plan.keep["a"]])


def test_a_weight_that_is_applied_twice_is_fitted_once_to_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.shared, self.head = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.shared(torch.tanh(self.a(x)))) + self.shared(torch.tanh(self.b(x))))

    module, x = Twice().double().eval(), noise(40, 3)
    result = pruned(module, x, [x], damping=0.0)
    kept = next(kept for name, kept in result.plan.keep.items() if name in ("a", "b"))
    with torch.no_grad():
        both = torch.cat([torch.tanh(module.a(x)), torch.tanh(module.b(x))])
        wanted = torch.linalg.lstsq(both[:, kept], both @ module.shared.weight.T).solution.T
    rows = result.plan.keep.get("shared", torch.arange(4))
    assert torch.allclose(result.model.shared.weight, wanted[rows], atol=1e-8)


# -- bad input ---------------------------------------------------------------------------------------------------------


def refused(error, match, data=None, x=None, **options):
    module, example = made("residual")
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(error, match=match) as caught:
        sc.prune(
            module,
            example_inputs=(example if x is None else x,),
            method="obspa",
            sparsity=0.3,
            data=data,
            options=options,
        )
    assert "\n" not in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


def test_bad_data_is_one_sentence():
    good = noise(4, 3, 12, 12)
    refused(DataError, "needs data: give data=")
    refused(DataError, "is empty", data=[])
    refused(DataError, r"input 0 of batch 1 of the data has shape \[4, 4, 12, 12\]", data=[good, noise(4, 4, 12, 12)])
    refused(DataError, r"takes \['any', 3, 12, 12\]", data=[noise(4, 3, 8, 8)])
    refused(DataError, "float32, where the network takes", data=[good.float()])
    refused(DataError, "must be a tensor, got str", data=[("cat",)])
    refused(DataError, "must hold 1 inputs", data=[()])
    refused(DataError, "batch 1 of the data holds NaN", data=[good, torch.full_like(good, float("nan"))])
    refused(DataError, "input 0 of batch 0 of the data is empty", data=[good[:0]])
    refused(NonFiniteError, "the inputs of .* hold NaN or inf", data=[torch.full_like(good, 1e300)])
    refused(DataError, "takes no data", data=[good], calibration="noise")
    refused(DataError, "low < high", calibration="noise", low=1.0, high=1.0)
    refused(UsageError, "damping must lie in", data=[good], damping=-1.0)


def test_noise_stands_in_for_numbers_only():
    module = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.tensor([[1, 2, 3]])
    with pytest.raises(DataError, match="example input 0, which is int64"):
        sc.plan(module, example_inputs=(x,), method="obspa", sparsity=0.3, options={"calibration": "noise"})


def test_batches_that_take_another_path_are_refused():
    class Path(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.a(x)
            return self.b(torch.tanh(x) if len(x) > 2 else torch.relu(torch.tanh(x)))

    with pytest.raises(DataError, match="another path"):
        sc.plan(Path(), example_inputs=(torch.zeros(4, 3),), method="obspa", sparsity=0.3, data=torch.zeros(2, 3))


def test_norms_of_one_entry_are_refused():
    module = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(1, 3)
    with pytest.raises(DataError, match="one entry per channel"):
        sc.plan(module.eval(), example_inputs=(x,), method="obspa", sparsity=0.3, data=[x])


def test_values_for_other_entries_are_refused():
    module, x = made("residual")
    plan = pruned(module, x).plan
    masks = dict(plan.masks)
    masks["conv2.weight"] = masks["conv2.weight"].flip(1)
    wrong = Plan(plan.provenance, plan.groups, plan.keep, masks, plan.values)
    with pytest.raises(PlanMismatchError, match=r"values for entries of conv2\.weight"):
        sc.apply(wrong, module)
