"""The Sparsifier in loops of all kinds: optimizers, scalers, accumulation, compilation, ranks, averages, errors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
import sparse_ranks
from conftest import build_llama
from ranks import run_ranks
from secateur.errors import CorruptFileError, NonFiniteError, UsageError
from secateur.train.asked import training_methods
from sparse_training import RHYTHM, STEPS, batch, network, same, sgd, sparsifier, train

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01),
}


def step_of(module: nn.Module, number: int, optimizer) -> None:
    x, y = batch(number)
    optimizer.zero_grad()
    F.cross_entropy(module(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whatever_the_optimizer_remembers_of_dead_weights_is_zero(name):
    module = network()
    optimizer = OPTIMIZERS[name](module.parameters())
    pruned = sparsifier(module, optimizer, "rigl", sparsity=0.8)
    train(module, optimizer, pruned)
    for name, mask in pruned.masks.items():
        weight = module.get_parameter(name)
        states = [v for v in optimizer.state[weight].values() if v.shape == weight.shape]
        assert states and not weight[~mask].any() and not any(bool(state[~mask].any()) for state in states)


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_dead_weights_are_zero_whatever_their_gradients_were(broken):
    module = network()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    pruned = sparsifier(module, optimizer, "gmp", sparsity=0.5)
    train(module, optimizer, pruned)
    name, weight, dead = "4.weight", module[4].weight, ~pruned.masks["4.weight"]
    weight.grad[dead] = broken
    pruned.mask_gradients()
    assert not weight.grad[dead].any()
    weight.grad[dead] = broken
    optimizer.step()
    pruned.step()
    states = [state for state in optimizer.state[weight].values() if state.shape == weight.shape]
    assert not weight[dead].any() and weight.isfinite().all()
    assert states and all(state.isfinite().all() and not state[dead].any() for state in states)
    average = copy.deepcopy(module)
    average.get_parameter(name).data[dead] = broken
    pruned.apply(average)
    assert same(average, module)
    # of a weight that lives it is seen
    weight.grad[~dead] = broken
    optimizer.step()
    pruned.step()
    assert not weight[~dead].isfinite().any() and not weight[dead].any()


def test_regrown_weights_begin_without_a_past():
    """Those that were dead before an update are zero behind it, in weight and momentum."""
    module = network()
    optimizer = sgd(module)
    pruned = sparsifier(module, optimizer, "granet", sparsity=0.8, fraction=0.5)
    before = pruned.masks
    grown = 0

    def check(step):
        nonlocal before, grown
        for name, mask in pruned.masks.items():
            new = mask & ~before[name]
            weight = module.get_parameter(name)
            grown += int(new.sum())
            assert not weight[new].any() and not optimizer.state[weight]["momentum_buffer"][new].any()
        before = pruned.masks

    train(module, optimizer, pruned, seen=check)
    assert grown > 0


class Averaging(torch.optim.SGD):
    """Keeps running means in a list of its state, as optimizers of others do."""

    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            state = self.state[weight]
            means = state.setdefault("means", {"of gradients": [torch.zeros_like(weight) for _ in range(2)]})
            for decay, mean in zip((0.9, 0.99), means["of gradients"], strict=True):
                mean.lerp_(weight.grad, 1 - decay)
                weight.data.sub_(mean, alpha=0.1)


def test_what_lies_deeper_in_the_state_of_an_optimizer_is_forgotten_too():
    module = network()
    optimizer = Averaging(module.parameters(), lr=0.1)
    pruned = sparsifier(module, optimizer, "gmp", sparsity=0.8)
    train(module, optimizer, pruned)
    for name, mask in pruned.masks.items():
        for mean in optimizer.state[module.get_parameter(name)]["means"]["of gradients"]:
            assert not mean[~mask].any() and mean[mask].any()


def test_steps_that_a_scaler_left_out_are_not_counted():
    module = network()
    optimizer = sgd(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1000)
    pruned = sparsifier(module, optimizer, "rigl", sparsity=0.8)
    moved = []
    for number in range(1, 9):
        x, y = batch(number)
        optimizer.zero_grad()
        loss = F.cross_entropy(module(x), y)
        scaler.scale(loss * (float("inf") if number in (2, 5) else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(pruned.step())
    # steps 2, 4 and 6 of those that were taken
    assert pruned.steps_done == 6 and [i for i, one in enumerate(moved, start=1) if one] == [3, 6, 8]
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


class Fused(torch.optim.SGD):
    """An optimizer that is told of inf and leaves the step out by itself, as fused ones do."""

    _step_supports_amp_scaling = True

    def step(self, closure=None):
        if not float(self.found_inf):
            super().step(closure)


def test_a_fused_optimizer_leaves_steps_out_by_itself():
    module = network()
    optimizer = Fused(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    pruned = sparsifier(module, optimizer, "rigl", sparsity=0.8)
    before = copy.deepcopy(module)
    x, y = batch(1)
    scaler.scale(F.cross_entropy(module.eval()(x), y) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not pruned.step() and pruned.steps_done == 0 and same(module, before)


def test_accumulated_batches_are_one_step():
    whole, parts = network().eval(), network().eval()
    optimizer, other = sgd(whole), sgd(parts)
    first, second = (sparsifier(m, o, "rigl", sparsity=0.8) for m, o in ((whole, optimizer), (parts, other)))
    for number in range(1, STEPS + 1):
        x, y = batch(number)
        optimizer.zero_grad()
        F.cross_entropy(whole(x), y).backward()
        optimizer.step()
        first.step()
        other.zero_grad()
        for half in (slice(0, 8), slice(8, 16)):
            (F.cross_entropy(parts(x[half]), y[half]) / 2).backward()
            if half.stop == 16:
                other.step()
            second.step()
    assert second.steps_done == STEPS
    assert all(torch.equal(mask, second.masks[name]) for name, mask in first.masks.items())


def test_groups_of_parameters_and_those_that_are_frozen():
    module = network()
    module[4].weight.requires_grad_(False)
    groups = [{"params": [module[0].weight], "lr": 0.01}, {"params": [module[6].weight, module[6].bias], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    pruned = sparsifier(module, optimizer, "gmp", sparsity=0.8)
    train(module, optimizer, pruned)
    assert set(pruned.masks) == {"0.weight", "6.weight"} and module[4].weight.count_nonzero() == 72 * 20


def test_tied_weights_have_one_mask_and_embeddings_stay():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 8)
            self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6, bias=False)
            self.b.weight, self.head.weight = self.a.weight, self.table.weight

        def forward(self, ids):
            return self.head(self.b(self.a(self.table(ids))))

    module = Tied()
    pruned = sc.Sparsifier(module, method="erk_random", sparsity=0.5, distribution="uniform")
    assert set(pruned.masks) == {"a.weight"} and module.b.weight.count_nonzero() == 32
    # either name will do to leave it out, and what stays by default can be asked for
    with pytest.raises(UsageError, match="Tied has no weights to prune once those"):
        sc.Sparsifier(Tied(), method="erk_random", exclude=["b.*"])
    asked = sc.Sparsifier(Tied(), method="erk_random", exclude=["b"], include=["table.weight"])
    assert set(asked.masks) == {"table.weight"}


def test_which_weights_are_pruned():
    module = nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 8, 3), "depth": nn.Conv2d(8, 8, 3, groups=8), "up": nn.ConvTranspose2d(8, 4, 2),
            "norm": nn.LayerNorm([4, 4]), "lstm": nn.LSTM(4, 5), "attention": nn.MultiheadAttention(8, 2),
            "bilinear": nn.Bilinear(3, 3, 2),
        }
    )  # fmt: skip
    names = {"conv.weight", "up.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"}
    names |= {"attention.in_proj_weight", "attention.out_proj.weight"}
    assert set(sc.Sparsifier(module, method="erk_random").masks) == names
    more = sc.Sparsifier(module, method="erk_random", depthwise=True, keep_first=True, include=["bilinear"])
    assert set(more.masks) == (names | {"depth.weight", "bilinear.weight"}) - {"conv.weight"}


def test_weights_that_are_computed_stay_dense_and_are_named():
    from torch.nn.utils.parametrizations import spectral_norm, weight_norm

    module = nn.Sequential(weight_norm(nn.Linear(4, 6)), spectral_norm(nn.Conv1d(6, 4, 1)), nn.Linear(1, 5))
    before = copy.deepcopy(module)
    named = r"weights of 0, 1 are computed from other parameters .* stay dense: .*remove_parametrizations\(module"
    with pytest.warns(UserWarning, match=named):
        pruned = sc.Sparsifier(module, method="gmp", end=2, every=1)
    assert set(pruned.masks) == {"2.weight"} and same(module, before)
    # who leaves it out, or asks for what it is computed from, knows
    sc.Sparsifier(module, method="gmp", end=2, every=1, exclude=["0"], include=["1.parametrizations.weight.original"])
    module[1].requires_grad_(False)
    with pytest.raises(UsageError, match=r"Sequential has no weights to prune once .* left out: weights of 0 are comp"):
        sc.Sparsifier(module, method="gmp", end=2, every=1, exclude=["2"])
    nn.utils.parametrize.remove_parametrizations(module[0], "weight")
    assert set(sc.Sparsifier(module, method="gmp", end=2, every=1).masks) == {"0.weight", "2.weight"}


@pytest.mark.parametrize("method", ["rigl", "snfs"])
def test_a_part_that_a_step_leaves_out_has_a_gradient_of_zeros(method):
    """As an expert that no token goes to, or a layer that is frozen on the way."""
    parts = nn.ModuleDict({"in": nn.Linear(8, 16), "often": nn.Linear(16, 4), "seldom": nn.Linear(16, 4)})
    optimizer = torch.optim.SGD(parts.parameters(), lr=0.1)
    pruned = sc.Sparsifier(parts, optimizer, method=method, sparsity=0.5, begin=0, end=8, every=2)
    for number in range(1, 7):
        optimizer.zero_grad()
        hidden = parts["in"](torch.ones(2, 8)).relu()
        parts["seldom" if number == 3 else "often"](hidden).square().sum().backward()
        optimizer.step()
        pruned.step()
    assert pruned.sparsity == pytest.approx(0.5, abs=0.05) and len(pruned.log) == 3
    assert all(not parts.get_parameter(name)[~mask].any() for name, mask in pruned.masks.items())


def test_a_compiled_module_is_pruned_behind_its_back():
    plain = network()
    optimizer = sgd(plain)
    train(plain, optimizer, sparsifier(plain, optimizer, "gmp", sparsity=0.8))
    inner = network()
    module = torch.compile(inner, backend="eager")
    other = sgd(module)
    pruned = sparsifier(module, other, "gmp", sparsity=0.8)
    train(module, other, pruned)
    assert same(plain, inner) and "0.weight" in pruned.masks


@pytest.mark.parametrize("decoder", [False, True])
def test_parts_that_are_compiled_by_themselves_change_no_names(decoder, tmp_path):
    module = build_llama() if decoder else nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 4))
    plain = copy.deepcopy(module)
    blocks, first = (module.model.layers, "model.layers.0.mlp.up_proj.weight") if decoder else (module, "0.0.weight")
    blocks[0] = torch.compile(blocks[0], backend="eager")
    pruned = sc.Sparsifier(module, method="gmp", sparsity=0.5, begin=0, end=2, every=1)
    for _ in range(2):
        pruned.step()
    plan = pruned.plan()
    assert first in plan.masks and not any("_orig_mod" in name for name in plan.masks)
    pruned.apply(plain)
    masked = sc.apply(plan, plain)
    values = list(module.parameters())
    for made in (plain, masked) if decoder else (plain, masked, sc.apply(plan, module)):
        assert all(torch.equal(a, b) for a, b in zip(made.parameters(), values, strict=True))
    assert not masked.get_parameter(first)[~plan.masks[first]].any()
    pruned.save(tmp_path / "state")
    resumed = sc.Sparsifier(plain, method="gmp", sparsity=0.5, begin=0, end=2, every=1, resume=tmp_path / "state")
    assert resumed.sparsities == pruned.sparsities


def test_channels_of_parts_that_are_compiled_by_themselves():
    plain = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 4))
    module = copy.deepcopy(plain)
    module[0] = torch.compile(module[0], backend="eager")
    schedule = {"method": "gmp", "sparsity": 0.5, "begin": 0, "end": 1, "every": 1}
    pruned = sc.Sparsifier(module, units="channels", example_inputs=(torch.ones(1, 8),), **schedule)
    pruned.step()
    assert sc.apply(pruned.finish(), plain)[0][0].weight.shape == (8, 8)


def test_bf16_autocast_and_bf16_weights():
    module = network()
    optimizer = sgd(module)
    pruned = sparsifier(module, optimizer, "granet", sparsity=0.8)
    for number in range(1, STEPS + 1):
        x, y = batch(number)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(module(x), y)
        loss.backward()
        optimizer.step()
        pruned.step()
    assert pruned.sparsity == pytest.approx(0.8, abs=1e-3)
    half = network().bfloat16()
    small = sparsifier(half, torch.optim.SGD(half.parameters(), lr=0.1), "rigl", sparsity=0.8)
    x, y = batch(1)
    F.cross_entropy(half(x.bfloat16()).float(), y).backward()
    assert small.sparsity == pytest.approx(0.8, abs=1e-3) and half[4].weight.dtype == torch.bfloat16


def test_an_average_of_weights_takes_the_masks_and_norms_are_taken_again():
    module = network()
    optimizer = sgd(module)
    pruned = sparsifier(module, optimizer, "granet", sparsity=0.8)
    average = torch.optim.swa_utils.AveragedModel(
        module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    train(module, optimizer, pruned, seen=lambda step: average.update_parameters(module))
    assert average.module[4].weight[~pruned.masks["4.weight"]].any()
    pruned.apply(average)
    torch.optim.swa_utils.update_bn([batch(number) for number in range(4)], average)
    for name, mask in pruned.masks.items():
        assert not average.module.get_parameter(name)[~mask].any() and average.module.get_parameter(name)[mask].any()
    mean = torch.stack([average.module[0](batch(number)[0]).mean((0, 2, 3)) for number in range(4)]).mean(0)
    assert torch.allclose(average.module[1].running_mean, mean, atol=1e-5)
    with pytest.raises(UsageError, match=r"the module has no parameter 0\.weight of shape \[8, 1, 3, 3\]"):
        pruned.apply(nn.Linear(3, 3))


def test_gradients_of_dead_weights_can_be_hidden_from_a_clip():
    module = network()
    optimizer = sgd(module)
    pruned = sparsifier(module, optimizer, "rigl", sparsity=0.8)
    x, y = batch(1)
    F.cross_entropy(module(x), y).backward()
    whole = torch.nn.utils.get_total_norm([p.grad for p in module.parameters()])
    pruned.mask_gradients()
    assert torch.nn.utils.get_total_norm([p.grad for p in module.parameters()]) < whole
    assert not module[4].weight.grad[~pruned.masks["4.weight"]].any()
    optimizer.step()
    pruned.step()
    # the next step is one that grows weights by their gradients
    optimizer.zero_grad()
    F.cross_entropy(module(x), y).backward()
    pruned.mask_gradients()
    assert module[4].weight.grad[~pruned.masks["4.weight"]].any()


@pytest.mark.parametrize("method", ["rigl", "snfs"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_order_of_step_and_zero_grad_does_not_matter(method, set_to_none):
    first, second = network(), network()
    optimizer, other = sgd(first), sgd(second)
    train(first, optimizer, sparsifier(first, optimizer, method, sparsity=0.8))
    pruned = sparsifier(second, other, method, sparsity=0.8)
    for number in range(1, STEPS + 1):
        x, y = batch(number)
        F.cross_entropy(second(x), y).backward()
        other.step()
        other.zero_grad(set_to_none)
        pruned.step()
    assert same(first, second)


def test_gradients_that_are_gone_are_missed():
    alone = sc.Sparsifier(network(), method="rigl", end=2, every=1)
    with pytest.raises(UsageError, match=r"rigl looks at gradients, and 0\.weight has none at step 1: call sparsifier"):
        alone.step()


def test_any_schedule_and_masks_to_begin_with():
    module = network()
    optimizer = sgd(module)
    pruned = sparsifier(module, optimizer, "gmp", schedule=lambda step: 0.1 * min(step, 5))
    seen = []
    train(module, optimizer, pruned, seen=lambda step: seen.append(round(pruned.sparsity, 2)))
    assert seen == [0, 0.2, 0.2, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    plan = pruned.plan()
    other = network()
    further = sparsifier(other, sgd(other), "gmp", masks=plan, sparsity=0.7)
    assert further.sparsity == pytest.approx(0.5, abs=1e-3) and other[4].weight.count_nonzero() == 720
    train(other, further._watched.optimizer, further)
    assert further.sparsity == pytest.approx(0.7, abs=1e-3)
    assert all(not (mask & ~plan.masks[name]).any() for name, mask in further.masks.items())


@pytest.mark.parametrize("wrong", [1.5, math.nan])
def test_a_schedule_that_leaves_its_range_on_the_way_is_named(wrong):
    module = network()
    optimizer = sgd(module)
    pruned = sparsifier(module, optimizer, "gmp", schedule=lambda step: wrong if step == 4 else 0.5)
    with pytest.raises(UsageError, match=f"at step 4 it gave {wrong}"):
        train(module, optimizer, pruned)
    assert pruned.sparsity == pytest.approx(0.5, abs=1e-3)


def test_other_criteria():
    for criterion in ("saliency", "random"):
        module = network()
        optimizer = sgd(module)
        pruned = sparsifier(module, optimizer, "gmp", sparsity=0.8, criterion=criterion)
        train(module, optimizer, pruned)
        assert pruned.sparsity == pytest.approx(0.8, abs=1e-3)


def test_state_takes_one_bit_per_weight_and_lies_in_one_file(tmp_path):
    module = network()
    optimizer = sgd(module)
    pruned = sparsifier(module, optimizer, "snfs", sparsity=0.8)
    train(module, optimizer, pruned, last=5)
    state = pruned.state_dict()
    assert {n: packed.numel() for n, packed in state["masks"].items()} == {
        "0.weight": 9, "4.weight": 180, "6.weight": 13,
    }  # fmt: skip
    path = pruned.save(tmp_path / "state.safetensors")
    other = sparsifier(network(), None, "snfs", sparsity=0.8)
    other.load(path)
    again = other.state_dict()
    assert again.keys() == state.keys() and again["log"] == state["log"] and again["counters"] == state["counters"]
    assert all(torch.equal(t, again[k][n]) for k in ("masks", "momentum") for n, t in state[k].items())
    with pytest.raises(UsageError, match="there is no state of a Sparsifier at"):
        other.load(tmp_path / "nothing")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptFileError, match="is no state of a Sparsifier, or damaged"):
        other.load(path)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("set", {}, "the state is one of gmp, and this training prunes by set"),
        ("gmp", {"end": 10}, "the state was saved with end=8, and this training has end=10: a training goes on"),
        ("gmp", {"schedule": lambda step: 0.3}, "the state was saved with another schedule"),
        ("gmp", {"exclude": ["6"]}, r"the state was saved for other weights: 6\.weight isn't the same in both"),
    ],
)
def test_a_state_of_another_training_is_refused(method, changes, message):
    state = sparsifier(network(), None, "gmp").state_dict()
    other = sparsifier(network(), None, method, **changes)
    with pytest.raises(UsageError, match=message):
        other.load_state_dict(state)
    with pytest.raises(UsageError, match="this is no state of a Sparsifier"):
        other.load_state_dict({"model": 1})
    optimizer = sgd(module := network())
    with pytest.raises(UsageError, match=message):
        sparsifier(module, optimizer, method, resume=state, **changes)
    assert not optimizer._optimizer_step_post_hooks


def test_only_modules_are_pruned():
    for wrong in (None, "model", torch.ones(2, 2)):
        with pytest.raises(UsageError, match=r"the model must be a torch\.nn\.Module, got "):
            sc.Sparsifier(wrong, method="gmp", end=8, every=2)
    with pytest.raises(UsageError, match=r"the model must be a torch\.nn\.Module, got OrderedDict"):
        sparsifier(module := network(), sgd(module), "gmp").apply(module.state_dict())


def test_bad_input_is_one_sentence_and_changes_nothing():
    module, elsewhere = network(), network()
    before = copy.deepcopy(module)
    given = {"end": 8, "every": 2}
    for bad, message in (
        ({"exclude": ["*"]}, "Sequential has no weights to prune once those that exclude and keep_first name are left"),
        ({"exclude": ["9"]}, "no parameter of the model matches '9'"),
        ({"exclude": "0.weight"}, r"exclude takes a list of patterns: write exclude=\['0.weight'\]"),
        ({"optimizer": sgd(elsewhere)}, "the optimizer holds none of the weights that are pruned"),
        ({"optimizer": "sgd"}, "optimizer must be a torch.optim.Optimizer, got str"),
        ({"schedule": 0.5}, "schedule must be a function of the step, got float"),
        ({"schedule": lambda step: 90}, r"schedule must give a sparsity in \[0, 1\), the fraction removed; .* gave 90"),
        ({"schedule": lambda step: step / 8}, r"schedule must give a sparsity in \[0, 1\), .* at step 8 it gave 1\.0"),
        ({"schedule": lambda step: None if step else 0.0}, "at step 8 it gave None"),
        ({"masks": {"9.weight": torch.ones(2, 2, dtype=torch.bool)}}, r"masks: 9\.weight is no weight that is pruned"),
        ({"masks": {"6.weight": torch.zeros(5, 20, dtype=torch.bool)}, "sparsity": 0.01}, "a sparsity of 6.2%, which"),
    ):
        with pytest.raises(UsageError, match=message):
            sc.Sparsifier(module, **{**given, "method": "gmp", **bad})
    assert same(module, before)
    with pytest.raises(UsageError, match="Sequential has no weights to prune: see include and exclude"):
        sc.Sparsifier(nn.Sequential(nn.BatchNorm1d(3)), method="erk_random")
    module[4].weight.data[:, :60] = 0
    with pytest.raises(UsageError, match=r"7\d\.\d% of the weights are zero already, which is more than .* 50\.0%"):
        sc.Sparsifier(module, method="gmp", sparsity=0.5, **given)
    assert "gmp" in training_methods() and "wanda" not in training_methods()


def test_scores_that_are_not_finite_stop_with_the_name_of_the_layer():
    module = network()
    optimizer = sgd(module)
    pruned = sparsifier(module, optimizer, "rigl", sparsity=0.5)
    train(module, optimizer, pruned, last=1)
    one = torch.zeros_like(module[4].weight)
    one[0, 0] = float("nan")
    module[4].weight.register_hook(lambda gradient: gradient + one)
    step_of(module, 2, optimizer)
    with pytest.raises(NonFiniteError, match=r"4\.weight: 1 of 1440 growth scores are NaN or inf at step 2"):
        pruned.step()


def test_a_layer_that_loses_its_last_weight_is_named():
    module = network()
    module[6].weight.data.mul_(1e-3)
    options = {"scope": "global", "sparsity": 0.9}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    pruned = sparsifier(module, optimizer, "gmp", **options)
    with pytest.warns(UserWarning, match=r"nothing is left of 6\.weight after step \d, .* floor=0\.01 keeps"):
        train(module, optimizer, pruned)
    other = network()
    other[6].weight.data.mul_(1e-3)
    floored = sparsifier(other, still := torch.optim.SGD(other.parameters(), lr=0.0), "gmp", floor=0.05, **options)
    train(other, still, floored)
    assert int(floored.masks["6.weight"].sum()) == 5 and floored.sparsity <= 0.9 + 1e-6


def test_effective_operations():
    """By hand: a forward of the layers, two operations for a multiply-accumulate."""
    module = network()
    optimizer = sgd(module)
    pruned = sparsifier(module, optimizer, "rigl", sparsity=0.8)
    dense = {"0.weight": 2 * 8 * 9 * 9, "4.weight": 2 * 72 * 20, "6.weight": 2 * 20 * 5}
    first = pruned.flops(torch.zeros(1, 1, 8, 8))
    inference = sum(flops * (1 - pruned.sparsities[name]) for name, flops in dense.items())
    assert first.dense == sum(dense.values()) and first.inference == pytest.approx(inference)
    train(module, optimizer, pruned)
    found = pruned.flops(torch.zeros(1, 1, 8, 8))
    # dense gradients of weights in 4 of 12 steps
    assert found.training == pytest.approx(2 * inference + 2 / 3 * inference + 1 / 3 * first.dense)
    assert found.dense_training == 3 * first.dense and found.inference == pytest.approx(inference)
    two = network()
    other = sgd(two)
    grown = sparsifier(two, other, "gmp", sparsity=0.8)
    kept = []
    train(two, other, grown, seen=lambda step: kept.append(sum(
        flops * (1 - grown.sparsities[name]) for name, flops in dense.items())))  # fmt: skip
    assert grown.flops(torch.zeros(1, 1, 8, 8)).training == pytest.approx(3 * sum(kept) / STEPS)


def test_operations_of_a_tied_weight_are_those_of_all_its_modules():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.a, self.b = nn.Embedding(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.alias = self.a.weight
            self.head = nn.Linear(8, 6)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.b(self.a(self.a(self.table(ids)))))

    pruned = sc.Sparsifier(Tied(), method="erk_random", sparsity=0.5, distribution="uniform")
    found = pruned.flops(torch.arange(3))
    # three uses of 8x8, and the head, which stays
    head = 2 * 3 * 8 * 6
    assert (found.dense, found.inference) == (3 * 2 * 3 * 64 + head, 3 * 3 * 64 + head)


def test_a_language_model_is_pruned_planned_and_laid_on_its_copy(tmp_path):
    model = build_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruned = sc.Sparsifier(model, optimizer, method="gmp", sparsity=0.5, exclude=["lm_head"], end=4, every=2)
    ids = torch.arange(32).reshape(2, 16)
    for _ in range(4):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        pruned.step()
    plan = pruned.finish()
    assert set(plan.masks) == {n for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n}
    assert all(torch.equal(sc.apply(plan, model).get_parameter(n), model.get_parameter(n)) for n in plan.masks)
    sc.save(model, None, tmp_path / "out", plan=plan, format="packed")
    loaded, _ = sc.load(tmp_path / "out")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_nothing_goes_on_behind_the_end():
    module = network()
    optimizer = sgd(module)
    pruned = sparsifier(module, optimizer, "gmp", sparsity=0.9)
    train(module, optimizer, pruned, last=5)
    plan = pruned.finish()
    step_of(module, 6, optimizer)
    with pytest.raises(UsageError, match=r"has given its plan by finish\(\)"):
        pruned.step()
    assert pruned.steps_done == 5
    assert all(torch.equal(mask, plan.masks[name]) for name, mask in pruned.masks.items())


def test_a_step_that_is_taken_back_leaves_no_history():
    module = network()
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=2)
    pruned = sparsifier(module, optimizer, "rigl", sparsity=0.5)

    def loss_at(number):
        optimizer.zero_grad()
        x, y = batch(number)
        loss = F.cross_entropy(module(x), y)
        loss.backward()
        return loss

    [state] = [optimizer.state[optimizer.param_groups[0]["params"][0]]]
    optimizer.step(lambda: loss_at(1))
    pruned.step()
    before = copy.deepcopy(state)
    optimizer.step(lambda: loss_at(2))
    assert len(state["old_dirs"]) > len(before["old_dirs"])
    assert pruned.step()
    [state] = [optimizer.state[optimizer.param_groups[0]["params"][0]]]
    assert state["n_iter"] == before["n_iter"] and len(state["old_dirs"]) == len(before["old_dirs"])
    assert len(state["old_stps"]) == len(before["old_stps"])


@pytest.mark.parametrize("method", ["rigl", "granet"])
def test_ranks_have_the_same_masks_at_every_update(method, tmp_path):
    run_ranks(sparse_ranks.job, 2, method, tmp_path)
    seen = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = network().eval()
    optimizer = sgd(alone)
    pruned = sparsifier(alone, optimizer, method, sparsity=0.8)
    masks: list[dict[str, torch.Tensor]] = []
    train(alone, optimizer, pruned, seen=lambda step: masks.append(pruned.masks))
    assert len(masks) == len(seen[0]) == STEPS and RHYTHM["every"] == 2
    for one, two, here in zip(*seen, masks, strict=True):
        assert all(torch.equal(mask, two[name]) for name, mask in one.items())
        # up to ties: the mean of two halves is rounded in another order than the whole
        assert sum(int((mask != here[name]).sum()) for name, mask in one.items()) <= 4
