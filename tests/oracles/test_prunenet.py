"""Oracles of prunenet: the policy as written, rewards by hand, what is learnt, and policies that are used again."""

import json
import math

import pytest
import torch
from scipy.stats import ks_2samp

import secateur as sc
from families import make_tiny, tiny_ids
from runs import plan_for
from secateur.errors import BudgetError, CorruptFileError, OptionError, OutputError, UsageError
from secateur.methods import Target, make_method
from secateur.models.decoders import decoder_blocks
from secateur.search import Episodes, Policy, PolicySearch, draw_order
from secateur.search.policy import UNCHANGED, concrete, distance, divergence, returns, reward

IDS = tiny_ids()
ROWS, INPUTS = 12, 5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def policy():
    return Policy.begin(ROWS, INPUTS, seed=3)


# -- the policy ------------------------------------------------------------------------------------------------------


def test_two_layers_are_one_probe(policy):
    w = random(ROWS, INPUTS)
    as_written = ((w @ policy.weight.T + policy.bias) @ policy.vector).flatten()
    torch.testing.assert_close(policy.logits(w), as_written, rtol=1e-5, atol=1e-5)
    # rows that change places take their logits along
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    eps = torch.rand(ROWS, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(policy.keep(w[order], eps[order]), policy.keep(w, eps)[order])


def test_gradients_are_those_of_the_two_layers(policy):
    w = random(ROWS, INPUTS)
    tensors = [policy.weight, policy.bias, policy.vector]
    for tensor in tensors:
        tensor.requires_grad_(True)
    mine = torch.autograd.grad(policy.logits(w).sigmoid().log().sum(), tensors)
    logits = ((w @ policy.weight.T + policy.bias) @ policy.vector).flatten()
    for one, other in zip(mine, torch.autograd.grad(logits.sigmoid().log().sum(), tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_noise_in_the_middle_changes_nothing_and_none_is_infinite():
    alpha = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(concrete(alpha, torch.full((3,), 0.5)), alpha)
    assert torch.isfinite(concrete(alpha, torch.tensor([0.0, 1.0, 0.0])).log()).all()
    saturated = Policy(torch.full((2, 1), 1e6), torch.zeros(2), torch.ones(2, 1)).shares(torch.tensor([[1.0], [-1.0]]))
    assert torch.isfinite(saturated.logit()).all()


def test_rows_are_drawn_as_one_after_the_other():
    weights = torch.tensor([0.1, 0.2, 0.7])
    generator = torch.Generator().manual_seed(0)
    keys = draw_order(weights, torch.rand(20_000, 3, generator=generator))
    pairs = keys.topk(2).indices.sort().values
    found = {pair: float((pairs == torch.tensor(pair)).all(dim=1).float().mean()) for pair in ((0, 1), (0, 2), (1, 2))}
    expected = {
        (a, b): weights[a] * weights[b] / (1 - weights[a]) + weights[b] * weights[a] / (1 - weights[b])
        for a, b in found
    }
    assert found == pytest.approx({pair: float(p) for pair, p in expected.items()}, abs=0.01)


def drawn_in_learning(policy, w, times):
    made = PolicySearch([lambda: w], 1, Episodes(seed=3))
    made.policy = policy
    for episode in range(times):
        made.history = [0.0] * episode
        yield int(made._rows(0, w))


def drawn_in_pruning(policy, w, times):
    method = make_method("prunenet")
    for layer in range(times):
        target = Target(f"layers.{layer}.mlp", "neuron", layer, w.T, torch.arange(len(w))[:, None])
        yield int(method.score(target, {"policy": policy, "writer": w}).argmax())


@pytest.mark.parametrize("draw", [drawn_in_learning, drawn_in_pruning])
def test_rows_are_drawn_by_lot_and_with_noise(draw):
    # alpha is 0.05, 0.5 and 0.95
    w = torch.tensor([[-1.0], [0.0], [1.0]])
    policy = Policy(torch.full((3, 1), math.log(19) / 3), torch.zeros(3), torch.ones(3, 1))
    torch.testing.assert_close(policy.shares(w), torch.tensor([0.05, 0.5, 0.95]))
    eps = torch.rand(50_000, 3, generator=torch.Generator().manual_seed(0))
    keep = concrete(policy.shares(w).expand(50_000, 3), eps)
    expected = (keep / keep.sum(dim=1, keepdim=True)).mean(dim=0)
    found = torch.tensor(list(draw(policy, w, 1000))).bincount(minlength=3) / 1000
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


# -- rewards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"), [([1, 2, 3], [1, 2, 3], 0), ([1, 2], [3, 4], 1), ([1, 2, 3, 4], [1, 2], 0.5)]
)
def test_distances_by_hand(first, second, expected):
    a, b = torch.tensor(first, dtype=torch.float32), torch.tensor(second, dtype=torch.float32)
    assert distance(a, b) == distance(b, a) == expected
    assert reward(a, b) == (1 / expected if expected else UNCHANGED)


def test_distances_are_those_of_scipy():
    for seed in range(5):
        a, b = random(40, seed=seed), random(27, seed=seed + 50) + 0.3
        assert distance(a, b) == pytest.approx(ks_2samp(a.numpy(), b.numpy()).statistic, abs=1e-12)


def test_rewards_are_discounted_by_the_block():
    assert returns([10, 8, 6, 4], 0.95) == pytest.approx([10, 7.6, 5.415, 3.4295])


def test_singular_values_interlace():
    w = random(20, 7)
    whole, left = torch.linalg.svdvals(w), torch.linalg.svdvals(w[3:])
    assert (left <= whole + 1e-5).all() and (left[:-3] >= whole[3:] - 1e-5).all()


def test_the_two_divergences():
    alpha = torch.tensor([0.3])
    assert float(divergence(alpha, "official")) == pytest.approx(0.2566, abs=1e-4)
    assert float(divergence(alpha, "exact")) == pytest.approx(0.0823, abs=1e-4)
    assert float(divergence(torch.tensor([0.5]), "exact")) == pytest.approx(0, abs=1e-6)


# -- learning --------------------------------------------------------------------------------------------------------


def search(kept: int = 8, **how) -> PolicySearch:
    matrices = [lambda seed=seed: random(ROWS, INPUTS, seed=seed) for seed in range(3)]
    return PolicySearch(matrices, kept, Episodes(**{"episodes": 4, **how}))


def naive_episode(made: PolicySearch, how: Episodes) -> torch.Tensor:
    """The weight of the policy after one episode, with modules and autograd as the published code has them."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(INPUTS, ROWS)
    vector = torch.nn.Parameter(made.policy.vector.detach().clone())
    with torch.no_grad():
        linear.weight.copy_(made.policy.weight)
        linear.bias.copy_(made.policy.bias)
    optimizer = torch.optim.AdamW([linear.weight, linear.bias, vector], lr=how.rate)
    drawn = [made._rows(layer, matrix()) for layer, matrix in enumerate(made._matrices)]
    for layer, (matrix, kept) in enumerate(zip(made._matrices, drawn, strict=True)):
        w = matrix()
        gain = how.discount**layer * reward(torch.linalg.svdvals(w), torch.linalg.svdvals(w[kept]))
        alpha = (linear(w) @ vector).flatten().sigmoid()
        loss = -concrete(alpha, made._noise(layer, "loss", ROWS))[kept].log().sum() * gain
        loss.backward()
        if how.update == "per_layer":
            optimizer.step()
            optimizer.zero_grad()
    if how.update == "per_episode":
        torch.nn.utils.clip_grad_norm_([linear.weight, linear.bias, vector], 1.0)
        optimizer.step()
    return linear.weight.detach()


@pytest.mark.parametrize("update", ["per_layer", "per_episode"])
def test_an_episode_as_published(update):
    made = search(update=update)
    expected = naive_episode(made, Episodes(update=update))
    before = made.policy.tensors()["weight"]
    made.step()
    torch.testing.assert_close(made.policy.weight.detach(), expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(expected, before)
    # what earned the reward is kept, and not what came of it
    assert torch.equal(made.best["weight"], before) and made.best_reward == made.history[0]


def test_a_search_goes_on_to_the_same_bits():
    whole, first, second = search(), search(), search()
    while not whole.finished:
        whole.step()
    first.step()
    first.step()
    second.load_state(first.state())
    while not second.finished:
        second.step()
    assert second.history == whole.history and second.best_reward == max(whole.history)
    assert all(torch.equal(second.best[name], tensor) for name, tensor in whole.best.items())
    assert torch.equal(second.policy.weight, whole.policy.weight)


def test_where_all_rows_stay_nothing_has_moved():
    made = search(kept=ROWS)
    assert made._rows(0, random(ROWS, INPUTS)).tolist() == list(range(ROWS))
    made.step()
    assert made.history == [3 * UNCHANGED] and torch.isfinite(made.policy.weight).all()


@pytest.mark.parametrize("kind", ["official", "exact"])
def test_the_divergence_enters_the_loss(kind):
    plain, other = search(), search(divergence=kind)
    plain.step()
    other.step()
    assert not torch.equal(plain.policy.weight, other.policy.weight)


# -- the method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("neurons", "share", "kept"), [(1536, 0.3, 1075), (40, 0.3, 28), (40, 0.33, 26)])
def test_a_policy_learns_with_as_many_rows_as_published(make_llama, monkeypatch, neurons, share, kept):
    from secateur.engine import policies

    seen = []
    monkeypatch.setattr(policies.PolicySearch, "__init__", lambda self, matrices, rows, how: seen.append(rows) or 1 / 0)
    model = make_llama(intermediate_size=neurons, hidden_size=8, num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(ZeroDivisionError):
        plan_for("prunenet", model, IDS, sparsity=share, budget="neurons")
    assert seen == [kept]


def test_numbers_of_neurons():
    plan = plan_for("prunenet", make_tiny("llama"), IDS, sparsity=0.3, budget="neurons")
    assert {name: len(kept) for name, kept in plan.keep.items()} == {f"layers.{i}.mlp": 28 for i in range(3)}


@pytest.mark.parametrize(
    "asked",
    [
        {"sparsity": 0.33, "budget": "neurons"},
        {"sparsity": 0.33, "budget": "neurons", "round_to": 8},
        {"sparsity": 0.86, "budget": "neurons", "min_keep": 5, "round_to": 3},
        {"sparsity": 0.2},
        {"sparsity": 0.21},
        {"sparsity": 0.3, "selection": "topk"},
    ],
)
def test_as_many_neurons_stay_as_the_policy_has_learnt_with(asked, monkeypatch):
    """int((1 - r) I) of them, the published number: never the nearest where that is larger."""
    from secateur.engine import policies

    seen, real = [], policies.PolicySearch.__init__

    def noting(self, matrices, rows, how):
        seen.append(rows)
        real(self, matrices, rows, how)

    monkeypatch.setattr(policies.PolicySearch, "__init__", noting)
    plan = plan_for("prunenet", make_tiny("llama"), IDS, episodes=1, **asked)
    assert {len(kept) for kept in plan.keep.values()} == set(seen) and 0 < seen[0] < 40
    if asked.get("budget") and len(asked) == 2:
        assert seen == [26]


def test_scores_by_the_policy(policy):
    w = random(ROWS, INPUTS)
    target = Target("layers.0.mlp", "neuron", 0, random(4, ROWS), torch.arange(ROWS)[:, None])
    seen = {"policy": policy, "writer": w}
    ranked = make_method("prunenet", {"selection": "topk"}).score(target, seen)
    assert torch.equal(ranked.argsort(), policy.shares(w).argsort())
    drawn = [make_method("prunenet", {"seed": seed}).score(target, seen) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_no_text_is_looked_at():
    model = make_tiny("llama")
    assert not make_method("prunenet").uses_data
    plans = [plan_for("prunenet", model, tiny_ids(seed=seed), sparsity=0.3) for seed in (0, 1)]
    assert not plans[0].diff(plans[1])


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_the_policy_looks_at_the_weight_that_writes_neurons(family, monkeypatch):
    from secateur.engine import policies

    seen = []
    monkeypatch.setattr(policies.PolicySearch, "__init__", lambda self, matrices, *_: seen.extend(matrices) or 1 / 0)
    model = make_tiny(family)
    for matrix in ("gate", "up"):
        with pytest.raises(ZeroDivisionError):
            plan_for("prunenet", model, IDS, sparsity=0.3, matrix=matrix)
    block = decoder_blocks(model)[1][0]
    expected = {
        "llama": lambda: (block.mlp.gate_proj.weight, block.mlp.up_proj.weight),
        "phi3": lambda: block.mlp.gate_up_proj.weight.chunk(2),
        "gpt2": lambda: (block.mlp.c_fc.weight.T,) * 2,
        "opt": lambda: (block.fc1.weight,) * 2,
    }[family]()
    assert torch.equal(seen[0](), expected[0]) and torch.equal(seen[len(seen) // 2](), expected[1])


def test_a_policy_is_kept_and_used_at_another_sparsity_and_for_another_model(tmp_path):
    folder, model = tmp_path / "policy", make_tiny("llama")
    options = {"budget": "neurons", "episodes": 3, "policy": str(folder)}
    first = plan_for("prunenet", model, IDS, sparsity=0.4, **options)
    assert sorted(path.name for path in folder.iterdir()) == ["policy.json", "policy.safetensors"]
    about = json.loads((folder / "policy.json").read_text(encoding="utf8"))
    assert (about["neurons"], about["inputs"], about["removed"]) == (40, 32, pytest.approx(0.4))
    assert about["reward"] == max(about["rewards"]) and len(about["rewards"]) == 3
    # the same as without a folder, and the plan doesn't say where it was
    del options["policy"]
    assert not first.diff(plan_for("prunenet", model, IDS, sparsity=0.4, **options))
    assert "policy" not in first.provenance[0].options
    options["policy"] = str(folder)
    before = (folder / "policy.safetensors").read_bytes()
    for other in (model, make_tiny("qwen3")):
        used = plan_for("prunenet", other, IDS, sparsity=0.2, **{**options, "episodes": 1})
        assert {len(kept) for kept in used.keep.values()} == {32}
    assert (folder / "policy.safetensors").read_bytes() == before
    # what is drawn for a smaller sparsity holds what is drawn for a larger one
    less = plan_for("prunenet", model, IDS, sparsity=0.2, **options)
    assert all(set(first.keep[n].tolist()) <= set(less.keep[n].tolist()) for n in first.keep)


@pytest.mark.parametrize("asked", [{"budget": "neurons=0.6"}, {"budget": "params=0.7"}, {"uniform": True}])
def test_a_policy_learns_at_what_budgets_take_of_the_neurons(asked, tmp_path):
    model, options = make_tiny("llama"), {"variants": "scores", "episodes": 1, **asked}
    plan = plan_for("prunenet", model, IDS, policy=str(tmp_path / "policy"), **options)
    removed = json.loads((tmp_path / "policy" / "policy.json").read_text(encoding="utf8"))["removed"]
    gone, whole = (sum(map(len, parts)) for parts in (map(plan.removed, plan.keep), map(range, plan.groups.values())))
    assert gone / whole == pytest.approx(removed, abs=0.02)
    if "sparsity" not in plan.provenance[0].options:
        # what the plan doesn't name has no part in it
        assert not plan.diff(plan_for("prunenet", model, IDS, sparsity=0.6, **options))


def test_a_crash_ends_in_the_same_bytes(tiny_checkpoint, tmp_path, monkeypatch):
    from secateur.engine import policies
    from secateur.runs.folder import DiskKeeper

    monkeypatch.setattr(policies, "SECONDS_BETWEEN_STATES", 0.0)

    def job(out):
        step = {"method": "prunenet", "sparsity": 0.3, "options": {"episodes": 3, "policy": str(tmp_path / out / "p")}}
        return {"model": str(tiny_checkpoint), "out": str(tmp_path / out / "cut"), "steps": [step]}

    class Crash(BaseException):
        pass

    sc.run(job("whole"))
    for name, number in (("search", 2), ("keep", 0)):
        kept = getattr(DiskKeeper, name)

        def crashing(self, *args, kept=kept, number=number, **kwargs):
            kept(self, *args, **kwargs)
            if number in args:
                raise Crash

        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(DiskKeeper, name, crashing)
            sc.run(job("again"), resume=name == "keep")
    sc.run(job("again"), resume=True)
    for name in ("cut/model.safetensors", "cut/plan/plan.safetensors", "p/policy.safetensors", "p/policy.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, OptionError, r"sparsity must lie in \[0, 1\)"),
        ({"sparsity": 0.9}, BudgetError, "can't remove 90.0% of the params"),
        ({"discount": 0.0}, OptionError, "discount must lie in"),
        ({"episodes": "many"}, OptionError, "episodes must be of type int"),
        ({"update": "per_step"}, OptionError, "update must be one of"),
    ],
)
def test_mistakes_in_a_sentence(options, error, message):
    with pytest.raises(error, match=message):
        plan_for("prunenet", make_tiny("llama"), IDS, **options)


def test_a_policy_of_another_model_or_none_at_all(tmp_path):
    folder = tmp_path / "policy"
    plan_for("prunenet", make_tiny("llama"), IDS, sparsity=0.3, episodes=1, policy=str(folder))
    with pytest.raises(UsageError, match="is for blocks of 40 neurons with 32 inputs, and this model has 24 with 32"):
        plan_for("prunenet", make_tiny("llama", intermediate_size=24), IDS, sparsity=0.3, policy=str(folder))
    (folder / "policy.json").unlink()
    with pytest.raises(CorruptFileError, match="holds no policy: there must be"):
        plan_for("prunenet", make_tiny("llama"), IDS, sparsity=0.3, policy=str(folder))


def test_a_place_that_no_policy_can_be_written_to_is_refused_before_one_is_learnt(tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.engine.policies.PolicySearch.step", lambda self: pytest.fail("it learns already"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file is a file"):
        plan_for("prunenet", make_tiny("llama"), IDS, sparsity=0.3, policy=str(tmp_path / "file/policy"))


def test_blocks_of_different_widths():
    model = make_tiny("llama")
    cut = sc.apply(plan_for("flap", model, IDS, sparsity=0.4), model)
    with pytest.raises(UsageError, match="one policy for all blocks, and these have from"):
        plan_for("prunenet", cut, IDS, sparsity=0.3)


def test_weights_that_are_not_finite(make_llama):
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = math.nan
    with pytest.raises(sc.errors.NonFiniteError, match="layer 1"):
        plan_for("prunenet", model, IDS, sparsity=0.3)
