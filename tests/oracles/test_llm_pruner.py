"""Oracles of llm_pruner: gradients of a second, naive implementation, the published counts, and what scores must be."""

import pytest
import torch

import secateur as sc
from families import make_tiny, tiny_ids
from runs import plan_for
from secateur.allocate import CountedAllocator
from secateur.allocate.units import Limits
from secateur.allocate.windows import leaving
from secateur.errors import BudgetError, DataError, NonFiniteError, OptionError, UnsupportedModelError
from secateur.methods import Coupled, Part, make_method
from secateur.models.decoders import decoder_anatomy
from secateur.models.sources import Source
from secateur.observe.activations import Activations
from secateur.observe.backward import BackwardWalk, Slopes
from secateur.structure import Cost, Group, Slices

IDS = tiny_ids()


def naive(model, ids):
    """(gradient of the mean loss, mean of squared gradients of single windows) by parameter."""
    gradients, squares = {}, {}
    for window in ids.split(1):
        model.zero_grad()
        model(input_ids=window, labels=window).loss.backward()
        for name, parameter in model.named_parameters():
            gradients[name] = gradients.get(name, 0) + parameter.grad / len(ids)
            squares[name] = squares.get(name, 0) + parameter.grad.square() / len(ids)
    model.zero_grad()
    return gradients, squares


@pytest.mark.filterwarnings("ignore:`loss_type=None`")
@pytest.mark.parametrize("family", ["llama-tied-bias", "phi3", "gpt_neox", "gpt2", "gemma3"])
def test_scores_of_a_walk_back_through_the_blocks_are_those_of_a_whole_backward(family):
    model = make_tiny(family).double()
    gradients, squares = naive(model, IDS)
    plan = plan_for("llm_pruner", model, IDS, dtype=torch.float64, sparsity=0.4, criterion="param_mix")
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for group in decoder_anatomy(model).of_kind("kv_head", "neuron"):
        total = 0
        for part in group.slices:
            if part.tensor.endswith(".bias"):
                continue
            w = model.get_parameter(part.tensor).detach()
            s = (w * gradients[part.tensor] - 0.5 * w.square() * squares[part.tensor]).abs()
            total = total + s.movedim(part.dim, 0)[part.index].flatten(1).sum(1)
        torch.testing.assert_close(plan.scores[group.name].double(), total, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:`loss_type=None`")
@pytest.mark.parametrize("family", ["llama-tied-bias", "llama", "granite", "phi3"])
@pytest.mark.parametrize("criterion", ["param_mix", "vectorize"])
def test_hidden_channels_score_by_all_their_entries_tables_and_norms_among_them(family, criterion):
    model = make_tiny(family).double()
    gradients, squares = naive(model, IDS)
    asked = {"sparsity": 0.3, "criterion": criterion, "granularity": "channel"}
    plan = plan_for("llm_pruner", model, IDS, dtype=torch.float64, **asked)
    width = model.config.hidden_size
    # everything but what lies within attentions has the width along one of its sides
    total = torch.zeros(width, dtype=torch.float64)
    for part in decoder_anatomy(model)["hidden"].slices:
        w = model.get_parameter(part.tensor).detach()
        s = w * gradients[part.tensor]
        if criterion == "param_mix":
            s = s - 0.5 * w.square() * squares[part.tensor]
        s = s.movedim(part.dim, 0).reshape(width, -1)
        if not part.tensor.endswith(".bias"):
            total += s.sum(1).abs() if criterion == "vectorize" else s.abs().sum(1)
    torch.testing.assert_close(plan.scores["hidden"].double(), total, rtol=1e-6, atol=0)
    cut = sc.apply(plan, model)
    assert cut.config.hidden_size == round(0.7 * width / 4) * 4
    assert torch.equal(plan.keep["hidden"], total.topk(cut.config.hidden_size).indices.sort().values)


def test_channels_need_no_data_for_magnitudes_and_refuse_what_is_for_heads_and_neurons():
    model = make_tiny("llama")
    plan = plan_for("llm_pruner", model, IDS, sparsity=0.25, criterion="l1", granularity="channel")
    width, slices = model.config.hidden_size, decoder_anatomy(model)["hidden"].slices
    sizes = [model.get_parameter(s.tensor).detach().movedim(s.dim, 0).reshape(width, -1).abs().sum(1) for s in slices]
    mean = torch.stack(sizes).mean(0)
    torch.testing.assert_close(plan.scores["hidden"], mean)
    with pytest.raises(OptionError, match="granularity=channel goes with neither heal, rounds"):
        make_method("llm_pruner", {"granularity": "channel", "heal": "refit"})
    with pytest.raises(UnsupportedModelError, match="hidden channels of GPT2LMHeadModel must stay: its config"):
        plan_for("llm_pruner", make_tiny("gpt2"), IDS, granularity="channel")


def descended(model, ids, *, single=False, limit=None, batch_tokens=32):
    walk = BackwardWalk(
        Source(model),
        ids,
        dtype=torch.float32,
        batch_tokens=batch_tokens,
        hidden=Activations(limit=limit),
        single=single,
    )
    found = {}
    for layer in (2, 1, 0):
        names = ["mlp.down_proj.weight", "self_attn.q_proj.weight"]
        found |= {(layer, n): s for n, s in walk.descend(walk.open_changed(layer), layer, names).items()}
    return found


def test_squares_of_equal_windows_are_those_of_one_gradient_and_the_mean_is_that_of_all():
    model = make_tiny("llama")
    for slope in descended(model, IDS[:1].repeat(3, 1), single=True).values():
        torch.testing.assert_close(slope.diagonal, slope.gradient.square(), rtol=1e-4, atol=1e-12)
    alone = [descended(model, window) for window in IDS.split(1)]
    for place, slope in descended(model, IDS).items():
        mean = torch.stack([one[place].gradient for one in alone]).mean(0)
        torch.testing.assert_close(slope.gradient, mean, rtol=1e-4, atol=1e-7)


def test_slopes_of_parts_merge_into_those_of_all_and_survive_as_tensors():
    gradients = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    whole, first, second = Slopes(), Slopes(), Slopes()
    for i, g in enumerate(gradients):
        whole.update(g, squared=True)
        (first if i < 2 else second).update(g, squared=True)
    again = Slopes()
    again.load_state(second.state())
    first.merge(again)
    assert first.windows == whole.windows == 6
    torch.testing.assert_close(first.gradient, gradients.mean(0))
    torch.testing.assert_close(first.diagonal, gradients.square().mean(0))
    with pytest.raises(ValueError, match="one window"):
        whole.update(gradients[0], 2, squared=True)


def test_activations_on_disk_and_other_batches_change_nothing():
    model = make_tiny("llama")
    usual = descended(model, IDS)
    for other in (descended(model, IDS, limit=1), descended(model, IDS, batch_tokens=1)):
        for place, slope in usual.items():
            torch.testing.assert_close(other[place].total, slope.total, rtol=1e-4, atol=1e-6)


def scores(model, **options):
    return plan_for("llm_pruner", model, IDS, sparsity=0.4, **options).scores


@pytest.mark.parametrize("criterion", ["param_first", "param_second", "param_mix", "vectorize"])
def test_what_nothing_reads_scores_zero_and_leaves_first(criterion):
    model = make_tiny("llama")
    block = model.model.layers[1]
    with torch.no_grad():
        block.mlp.down_proj.weight[:, 7] = 0
        # both queries of the first key-value head, and one of the second
        block.self_attn.o_proj.weight[:, :24] = 0
    plan = plan_for("llm_pruner", model, IDS, sparsity=0.4, criterion=criterion)
    assert plan.scores["layers.1.mlp"][7] == 0 and 7 in plan.removed("layers.1.mlp")
    heads = plan.scores["layers.1.attention"]
    assert heads[0] == 0 < heads[1]


def test_sums_before_absolute_values_are_never_larger():
    model = make_tiny("llama")
    first, vector = scores(model), scores(model, criterion="vectorize")
    assert all(bool((vector[name] <= first[name] * (1 + 1e-6)).all()) for name in first)
    assert any(bool((vector[name] < 0.9 * first[name]).any()) for name in first)
    part = Part("w", 0, torch.arange(2)[:, None], "weight", torch.ones(2, 3), gradient=torch.rand(2, 3))
    both = [
        make_method("llm_pruner", {"criterion": c}).score_coupled(Coupled("g", 2, (part,)))
        for c in ("param_first", "vectorize")
    ]
    torch.testing.assert_close(*both)


def test_expansions_are_exact_where_the_loss_is_what_they_expand():
    w = torch.tensor([[2.0], [-3.0]], dtype=torch.float64)
    index = torch.arange(2)[:, None]

    def change(criterion, **learned):
        part = Part("w", 0, index, "weight", w, **learned)
        return make_method("llm_pruner", {"criterion": criterion}).score_coupled(Coupled("g", 2, (part,)))

    # L = c w: without w it changes by c w
    c = torch.tensor([[0.5], [4.0]], dtype=torch.float64)
    torch.testing.assert_close(change("param_first", gradient=c), (c * w).abs().flatten())
    # L = h w^2 / 2
    h = torch.tensor([[3.0], [0.7]], dtype=torch.float64)
    lost = (0.5 * h * w.square()).flatten()
    torch.testing.assert_close(change("param_mix", gradient=h * w, diagonal=h), lost)
    torch.testing.assert_close(change("param_second", diagonal=h), 2 * lost)


def rows(fold="grouped", **options):
    """Scores of two key-value heads of two channels, with two queries each, by l1."""
    q = torch.arange(8.0).reshape(8, 1)
    k = torch.zeros(4, 1)
    k[3] = 100
    parts = (
        Part("k", 0, torch.arange(4).reshape(2, 2), "weight", k),
        Part("q", 0, torch.arange(8).reshape(2, 4), "weight", q),
        Part("b", 0, torch.arange(8).reshape(2, 4), "bias", torch.full((8,), 1e6)),
    )
    method = make_method("llm_pruner", {"criterion": "l1", "fold": fold, **options})
    return method.score_coupled(Coupled("g", 2, parts)).tolist()


def test_query_heads_are_folded_into_their_own_key_value_head():
    assert rows(grouping="sum") == [0 + 1 + 2 + 3, 4 + 5 + 6 + 7 + 100]
    # the official fold gives the first one the first and the third query head
    assert rows("official", grouping="sum") == [0 + 1 + 4 + 5, 2 + 3 + 6 + 7 + 100]
    assert rows() == [3, 61]


def test_projections_are_put_together_channel_by_channel():
    # of every channel: queries 2, 4 | 10, 12, keys 0, 0 | 0, 100
    assert rows(grouping="max") == [6, 110]
    assert rows(grouping="first") == [0, 100]
    assert rows(grouping="second") == [6, 22]
    # relative to their means 7 and 25
    assert rows(grouping="prod") == pytest.approx([0, 12 / 7 * 100 / 25])


def test_heads_are_scored_with_the_weight_that_reads_them():
    model = make_tiny("llama")
    before = scores(model, criterion="l1")["layers.0.attention"]
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, :16] *= 3
    after = scores(model, criterion="l1")["layers.0.attention"]
    assert after[0] > before[0] and after[1] == before[1]


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("l2", 2)])
def test_the_first_projection_is_that_of_the_keys_and_the_second_what_reads_them(family, criterion, power):
    model = make_tiny(family)
    if family == "opt":
        block = model.model.decoder.layers[1]
        attention, heads, reader = block.self_attn, 4, block.self_attn.out_proj.weight
        projections = [getattr(attention, f"{name}_proj").weight for name in "qkv"]
        ffn = [block.fc1.weight, block.fc2.weight.T]
    else:
        block, heads = model.model.layers[1], 2
        attention, mlp, reader = block.self_attn, block.mlp, block.self_attn.o_proj.weight
        fused = family == "phi3"
        projections = (
            attention.qkv_proj.weight.split([32, 16, 16])
            if fused
            else [getattr(attention, f"{name}_proj").weight for name in "qkv"]
        )
        gate_up = mlp.gate_up_proj.weight.chunk(2) if fused else [mlp.gate_proj.weight, mlp.up_proj.weight]
        ffn = [*gate_up, mlp.down_proj.weight.T]

    def sums(weights, units):
        return [w.detach().double().abs().pow(power).reshape(units, -1).sum(1) for w in weights]

    of_heads, of_neurons = sums([*projections, reader.T], heads), sums(ffn, len(ffn[0]))
    for grouping, head, neuron in (
        ("first", of_heads[1], of_neurons[0]),
        ("second", of_heads[-1], of_neurons[-1]),
        ("auto", sum(of_heads) / 4, sum(of_neurons) / len(ffn)),
    ):
        found = scores(model, criterion=criterion, grouping=grouping)
        for part, expected in (("attention", head), ("mlp", neuron)):
            torch.testing.assert_close(found[f"layers.1.{part}"].double(), expected, rtol=1e-5, atol=0)


def counted(ratio, *, hidden, heads, kv_heads, head_dim, neurons):
    """(key-value heads, neurons, parameters) that leave one layer, by the counts of the published code."""
    queries = heads // kv_heads
    columns = torch.arange(heads * head_dim).reshape(kv_heads, -1)
    head_cost = Cost(2 * hidden * head_dim * (queries + 1))
    groups = [
        Group("a", "kv_head", 0, kv_heads, head_cost, (Slices("o.weight", 1, columns),), reader="o", parts=queries),
        Group(
            "m",
            "neuron",
            0,
            neurons,
            Cost(3 * hidden),
            (Slices("d.weight", 1, torch.arange(neurons)[:, None]),),
            reader="d",
        ),
    ]
    zeros = {g.name: torch.zeros(g.units) for g in groups}
    kept = CountedAllocator(ratio).allocate(zeros, groups, 0, Limits())
    gone = [g.units - len(kept[g.name]) for g in groups]
    return (*gone, sum(n * g.cost.params for n, g in zip(gone, groups, strict=True)))


LLAMA_7B = {"hidden": 4096, "heads": 32, "kv_heads": 32, "head_dim": 128, "neurons": 11008}
LLAMA_3_8B = {"hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "neurons": 14336}
TINYLLAMA = {"hidden": 2048, "heads": 32, "kv_heads": 4, "head_dim": 64, "neurons": 5632}


@pytest.mark.parametrize(
    ("shape", "dense", "layers", "ratio", "units", "left"),
    [
        (LLAMA_3_8B, 8_030_261_248, 26, 0.25, (2, 3584), 6_612_586_496),
        (TINYLLAMA, 1_100_048_384, 14, 0.25, (1, 1408), 945_907_712),
        (LLAMA_7B, 6_738_415_616, 26, 0.25, (8, 2752), 5_422_977_024),
        (LLAMA_7B, 6_738_415_616, 28, 0.6, (19, 6605), 3_350_188_032),
    ],
)
def test_the_published_counts_of_parameters(shape, dense, layers, ratio, units, left):
    heads, neurons, params = counted(ratio, **shape)
    assert (heads, neurons) == units
    assert dense - layers * params == left


def test_channels_that_leave_are_counted_as_published():
    assert leaving(11008, 0.25) == 2752
    assert leaving(4096, 0.25) // 128 == 8
    assert leaving(4096, 0.26) == 1065 and 1065 // 128 == 8


def test_the_window_is_the_published_one_and_layers_around_it_stay_whole():
    allocator = make_method("llm_pruner").allocator()
    assert [i for i in range(32) if allocator.heads.holds(i, 32)] == list(range(4, 30))
    assert [i for i in range(30) if allocator.neurons.holds(i, 30)] == list(range(4, 28))
    model = make_tiny("llama", num_hidden_layers=5)
    plan = plan_for("llm_pruner", model, IDS, sparsity=0.2)
    assert {name for name in plan.keep if len(plan.removed(name))} == {
        f"layers.{layer}.{part}" for layer in (1, 2, 3, 4) for part in ("attention", "mlp")
    } - {"layers.1.attention", "layers.2.attention", "layers.3.attention", "layers.4.attention"}
    own = plan_for("llm_pruner", model, IDS, sparsity=0.2, first=2, last=2, last_mlp=1, ratio=0.5)
    assert {name for name in own.keep if len(own.removed(name))} == {
        "layers.2.attention",
        "layers.2.mlp",
        "layers.3.mlp",
    }


@pytest.mark.parametrize("more", [{}, {"granularity": "channel"}, {"rounds": 2}, {"scope": "global"}])
def test_a_ratio_counts_where_no_sparsity_is_asked_for(more):
    model = make_tiny("llama", num_hidden_layers=4)
    alone, beside = (plan_for("llm_pruner", model, IDS, ratio=0.5, sparsity=s, **more) for s in (0.0, 0.2))
    assert any(len(alone.removed(name)) for name in alone.keep)
    assert all(torch.equal(alone.keep[name], beside.keep[name]) for name in beside.keep)


def test_what_an_earlier_round_removed_stays_removed_and_later_rounds_see_it_gone(monkeypatch):
    model = make_tiny("llama")
    seen = []
    real = BackwardWalk.open_changed

    def opened(self, layer):
        block = real(self, layer)
        seen.append(int((block.mlp.down_proj.weight == 0).all(0).sum()))
        return block

    monkeypatch.setattr(BackwardWalk, "open_changed", opened)
    plan = plan_for("llm_pruner", model, IDS, sparsity=0.4, rounds=2)
    half = plan_for("llm_pruner", model, IDS[:3], sparsity=0.2)
    assert seen[:3] == [0, 0, 0] and seen[3:6] == [len(half.removed(f"layers.{i}.mlp")) for i in (2, 1, 0)]
    for name in half.keep:
        assert set(half.removed(name).tolist()) <= set(plan.removed(name).tolist())


def test_units_compete_over_the_window_by_raw_scores():
    model = make_tiny("llama")
    plan = plan_for("llm_pruner", model, IDS, scope="global", fill=False, ratio=0.5)
    removed = torch.cat([plan.scores[name][plan.removed(name)] for name in plan.keep])
    kept = torch.cat([plan.scores[name][units] for name, units in plan.keep.items()])
    # half of two heads and forty neurons in each of three layers; one unit of every group stays
    assert len(removed) == 63 and removed.max() <= kept[kept > removed.max()].min()
    assert int((kept < removed.max()).sum()) <= 6


def test_the_first_blocks_stay_where_whole_layers_leave():
    model = make_tiny("llama", num_hidden_layers=5)
    plan = plan_for("llm_pruner", model, IDS, sparsity=0.4, granularity="layer")
    assert plan.keep["layers"].tolist() == [0, 1, 2] and set(plan.keep) == {"layers"}
    cut = sc.apply(plan, model)
    assert cut.config.num_hidden_layers == 3 and torch.isfinite(cut(IDS).logits).all()


def test_a_frozen_model_has_gradients_all_the_same():
    model = make_tiny("llama")
    usual = scores(model)
    frozen = scores(model.requires_grad_(False))
    assert all(torch.equal(usual[name], frozen[name]) for name in usual)
    assert not any(p.requires_grad for p in model.parameters())


def test_what_leaves_is_made_up_for_as_with_other_methods():
    model = make_tiny("llama")
    plain, bias, refit = (plan_for("llm_pruner", model, IDS, sparsity=0.4, heal=h) for h in ("none", "bias", "refit"))
    assert all(torch.equal(plain.keep[name], bias.keep[name]) for name in plain.keep)
    assert bias.biases and refit.values and not plain.biases


def test_plans_of_other_sizes_share_their_scores(tmp_path, monkeypatch, tiny_llama, tiny_tokenizer):
    walks = []
    real = BackwardWalk._climb
    monkeypatch.setattr(BackwardWalk, "_climb", lambda self: (walks.append(1), real(self))[1])

    def planned(sparsity, **options):
        text = {"samples": 2, "length": 16, "dtype": "float32", "statistics": tmp_path}
        return sc.plan(tiny_llama, tiny_tokenizer, method="llm_pruner", sparsity=sparsity, options=options, **text)

    small, large = planned(0.2), planned(0.4, scope="global", first=1)
    assert len(walks) == 1
    assert all(torch.equal(small.scores[name], large.scores[name]) for name in small.scores)
    assert len(planned(0.2, criterion="vectorize").keep) == len(small.keep) and len(walks) == 2


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 2, "uniform": True}, "rounds need a budget"),
        ({"ratio": 0.5, "budget": "kv_bytes"}, "ratio and a budget"),
        ({"granularity": "layer", "heal": "bias"}, "granularity=layer goes with neither"),
        (
            {"granularity": "channel", "scope": "global", "first": 2},
            "granularity=channel doesn't go with scope, first$",
        ),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(OptionError, match=message):
        make_method("llm_pruner", options)


def test_a_ratio_that_takes_all_heads_is_refused():
    with pytest.raises(BudgetError, match=r"layers.0.attention: 97.0% take 2 of 2, and 1 must stay"):
        plan_for("llm_pruner", make_tiny("llama"), IDS, ratio=0.97, fill=False)
    with pytest.raises(BudgetError, match="at most"):
        plan_for("llm_pruner", make_tiny("llama"), IDS, sparsity=0.5, first=2)
    with pytest.raises(BudgetError, match="at most"):
        plan_for("llm_pruner", make_tiny("llama"), IDS, sparsity=0.1, first=2, last=2)


def test_rounds_without_windows_are_refused():
    with pytest.raises(DataError, match="7 rounds need a calibration window each"):
        plan_for("llm_pruner", make_tiny("llama"), IDS, rounds=7)


def test_query_heads_that_cannot_be_shared_are_refused():
    model = make_tiny("llama")
    attention = model.model.layers[0].self_attn
    attention.k_proj = torch.nn.Linear(32, 24, bias=False)
    with pytest.raises(UnsupportedModelError, match="layer 0 has 4 query heads for 3 key-value heads"):
        sc.anatomy(model)


def test_a_loss_that_overflows_says_what_helps():
    model = make_tiny("llama")
    with torch.no_grad():
        # fine in float32, too much for the logits in half precision
        model.lm_head.weight *= 1e6
    scores(model)
    with pytest.raises(NonFiniteError, match=r"the loss of a calibration window is .*--dtype float32"):
        plan_for("llm_pruner", model, IDS, dtype=torch.float16, sparsity=0.4)
