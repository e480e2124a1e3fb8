"""What cutting hands back: the user's own module with its sizes changed, or a graph that trains, and why."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from cut_networks import Pruned, check, difference, images, pruned, randomised, tokens, zeroed
from secateur.errors import PlanError
from secateur.networks.applying import copied
from secateur.structure.graphcut import cut_graph
from secateur.structure.modulecut import Different, cut_module
from secateur.structure.resize import Cut
from secateur.structure.trace import trace


def own(found: Pruned) -> nn.Module:
    """The user's module, cut, after checks that it computes the same under the same names."""
    module = cut_module(found.cut, found.graph, found.inputs, {})
    assert type(module) is type(found.module)
    with torch.no_grad():
        assert difference(module(*found.inputs), found.graph(*found.inputs)) < 1e-12
    names = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    assert names.keys() == found.module.state_dict().keys()
    assert all(found.sizes.get(name, size) == size for name, size in names.items())
    return module


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped, self.gn = nn.Conv2d(8, 16, 3, padding=1, groups=4), nn.GroupNorm(4, 16)
        self.depthwise, self.point = nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 6, 1)
        self.up, self.act = nn.ConvTranspose2d(6, 12, 2, groups=3), nn.PReLU(12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.gn(self.grouped(torch.relu(self.bn(self.a(x))))))
        x = self.act(self.up(torch.relu(self.point(self.depthwise(x)))))
        return self.head(x.mean((2, 3)))


def test_attributes_of_convolutions_and_norms_follow():
    # a whole group of the grouped convolution, which is a group of the norm; and one of the transposed convolution
    module = randomised(Convolutions())
    found = pruned(module, images(2, 3, 6, 6), {"a#2": [1], "point": [1]})
    check(found)
    cut = own(found)
    assert (cut.a.out_channels, cut.bn.num_features) == (6, 6)
    assert (cut.grouped.in_channels, cut.grouped.out_channels, cut.grouped.groups) == (6, 12, 3)
    assert (cut.gn.num_groups, cut.gn.num_channels) == (3, 12)
    assert (cut.depthwise.in_channels, cut.depthwise.out_channels, cut.depthwise.groups) == (12, 12, 12)
    assert (cut.point.in_channels, cut.point.out_channels) == (12, 4)
    assert (cut.up.in_channels, cut.up.out_channels, cut.up.groups) == (4, 8, 2)
    assert (cut.act.num_parameters, cut.head.in_features) == (8, 8)
    for name, part in cut.named_modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            fresh = type(part)(part.in_channels, part.out_channels, part.kernel_size, groups=part.groups)
            assert fresh.weight.shape == part.weight.shape, name


class Attention(nn.Module):
    """Attention with its sizes as attributes, as most people write it."""

    def __init__(self, dim: int = 8, num_heads: int = 4, head_dim: int = 3) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim, self.hidden_size = dim, num_heads, head_dim, num_heads * head_dim
        self.norm, self.qkv = nn.LayerNorm(dim), nn.Linear(dim, 3 * num_heads * head_dim)
        self.proj, self.mlp_norm = nn.Linear(self.hidden_size, dim), nn.RMSNorm(dim)
        self.up, self.down = nn.Linear(dim, 10), nn.Linear(10, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + self.proj(out.transpose(1, 2).reshape(batch, length, self.hidden_size))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


def test_a_norm_without_parameters_states_the_channels_that_it_sees():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.Conv2d(8, 2, 1))
    cut = own(pruned(module.double(), images(2, 3, 6, 6), {"0": [1, 4]}))
    # it warns of inputs of other sizes, and warnings are errors here
    assert cut(*images(2, 3, 6, 6)).shape == (2, 2, 4, 4) and cut.get_submodule("1").num_features == 6


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)


def test_attributes_of_attention_and_the_hidden_size_follow():
    module = randomised(Transformer())
    found = pruned(
        module, tokens(2, 5, below=11), {"blocks.0.norm": [0, 5], "blocks.0.qkv": [2], "blocks.1.up": [1, 2, 3]}
    )
    cut = own(found)
    first, second = cut.blocks
    assert (first.num_heads, first.head_dim, first.hidden_size) == (3, 3, 9)
    assert (second.num_heads, second.head_dim, second.hidden_size) == (4, 3, 12)
    assert first.norm.normalized_shape == second.mlp_norm.normalized_shape == cut.norm.normalized_shape == (6,)
    assert (cut.embed.embedding_dim, cut.embed.num_embeddings) == (6, 11)
    assert (first.qkv.in_features, first.qkv.out_features) == (6, 27)
    assert (second.up.out_features, second.down.in_features) == (7, 7)


def test_tied_weights_stay_tied_and_are_counted_once():
    module = randomised(Transformer())
    found = pruned(module, tokens(2, 5, below=11), {"blocks.0.norm": [0, 5]})
    assert found.graph.embed.weight.shape == (11, 6)
    cut = own(found)
    with torch.no_grad():
        cut.embed.weight.mul_(2)
        found.graph.embed.weight.mul_(2)
        assert difference(cut(*found.inputs), found.graph(*found.inputs)) < 1e-12


class Tied(nn.Module):
    """Two names of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x)) * self.b(x))


def test_two_names_of_one_parameter_stay_one():
    module = randomised(Tied())
    found = pruned(module, images(2, 4), {"a": [1, 4]})
    check(found)
    cut = own(found)
    assert cut.a.weight is cut.b.weight and cut.a.weight.shape == (4, 4)
    assert found.graph.a.weight is found.graph.b.weight
    assert module.a.weight is module.b.weight and module.a.weight.shape == (6, 4)


class Shared(nn.Module):
    """One module under two names, and called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shared, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.again = self.shared

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.again(torch.relu(self.shared(self.a(x))))))


def test_a_shared_module_is_cut_once():
    found = pruned(randomised(Shared()), images(2, 4), {"a": [0, 3]})
    check(found)
    cut = own(found)
    assert cut.again is cut.shared and cut.shared.weight.shape == (4, 4)


class Gated(nn.Module):
    """A gate whose halves are told by their number."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.c = nn.Linear(4, 12), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = getattr(self.a(x), self.how)(2, -1)
        return self.c(up * torch.sigmoid(gate))


@pytest.mark.parametrize("how", ["chunk", "unsafe_chunk", "tensor_split"])
def test_halves_of_a_gate_follow(how):
    found = pruned(randomised(Gated(how)), images(2, 4), {"a": [0, 3]})
    check(found)
    assert own(found).a.weight.shape == (8, 4)


class Buffers(nn.Module):
    """Buffers that go with the channels, one that isn't saved, and one that has nothing to do with them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.c = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.register_buffer("scale", torch.arange(1.0, 7))
        self.register_buffer("shift", torch.arange(6.0), persistent=False)
        self.register_buffer("other", torch.arange(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.norm(self.a(x)) * self.scale + self.shift) + self.other


def test_buffers_follow():
    module = randomised(Buffers())
    found = pruned(module, images(2, 4), {"a": [0, 2]})
    cut = own(found)
    for name in ("scale", "shift", "norm.running_mean", "norm.running_var"):
        old, new = module.get_buffer(name), cut.get_buffer(name)
        assert torch.equal(new, old[[1, 3, 4, 5]])
    assert cut.other.shape == (2,) and "shift" not in cut.state_dict()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.lstm = nn.Linear(4, 6), nn.LSTM(6, 5, num_layers=2, batch_first=True)
        self.gru, self.c = nn.GRU(5, 4, bidirectional=True, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.gru(self.lstm(self.a(x))[0])[0])


def test_recurrent_layers_follow():
    found = pruned(randomised(Recurrent()), images(2, 3, 4), {"a": [0], "lstm.weight_ih_l0": [1, 2]})
    check(found)
    cut = own(found)
    assert (cut.lstm.input_size, cut.lstm.hidden_size, cut.gru.input_size) == (5, 3, 3)


class Auxiliary(nn.Module):
    """A second head that only training has, and a layer of two names. ``depends``: training branches by an entry."""

    def __init__(self, depends: bool = False) -> None:
        super().__init__()
        self.depends, self.trained = depends, 0
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)
        self.aux, self.again = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), self.b
        self.spare = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.a(x))
        out = self.c(torch.relu(self.b(x)))
        if not self.training:
            return out
        if not self.depends:
            return out, self.aux(x)
        self.trained += 1
        return out, self.aux(x if out.sum() > 0 * torch.rand(()) else -x)


def test_what_only_training_reads_follows_and_keeps_its_own_channels():
    module, inputs = randomised(Auxiliary()), images(2, 4)
    found = pruned(module, inputs, {"a": [1, 4]})
    assert {g.name for g in found.anatomy.groups} == {"a", "b"}
    reasons = {f.name: f.reason for f in found.anatomy.frozen}
    assert reasons["aux.0.weight dim 0"] == reasons["spare dim 0"] == "the traced forward never reads it"
    check(found)
    cut, masked = own(found), zeroed(found)
    assert cut.aux[0].weight.shape == (8, 4) and cut.aux[0].in_features == 4
    with torch.no_grad():
        for theirs, ours in zip(masked.train()(*inputs), cut.train()(*inputs), strict=True):
            assert difference(ours, theirs) < 1e-12
    result = sc.prune(module, example_inputs=inputs, method="spa_l1", sparsity=0.3)
    (note,) = result.report.notes
    assert note.startswith("spare: nothing that was traced reads it, ")


def test_a_head_behind_a_branch_on_values_follows_what_it_reads_on_the_example_inputs():
    module, inputs = randomised(Auxiliary(depends=True)), images(2, 4)
    before = torch.get_rng_state()
    found = pruned(module, inputs, {"a": [1, 4]})
    # it has run in training mode, though not itself
    assert torch.equal(torch.get_rng_state(), before) and module.trained == 0
    check(found)
    cut, masked = own(found), zeroed(found)
    assert cut.aux[0].weight.shape == (8, 4) and cut.aux[0].in_features == 4
    with torch.no_grad():
        for flip in (1, -1):
            for theirs, ours in zip(masked.train()(flip * inputs[0]), cut.train()(flip * inputs[0]), strict=True):
                assert difference(ours, theirs) < 1e-12
    alone, recorded = sc.prune(module, example_inputs=inputs, method="spa_l1", sparsity=0.3).report.notes
    assert alone.startswith("spare: nothing that was traced reads it, ")
    assert recorded.startswith("aux: only training reads it, in a branch that can't be exported, ")


class Single(Auxiliary):
    """Can't be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("only one of me")


def test_a_head_whose_branch_can_neither_be_exported_nor_recorded_stays_and_is_named():
    module, inputs = randomised(Single(depends=True)), images(2, 4)
    traced = trace(module, inputs)
    assert {name.partition(".")[0] for name in traced.alone} == {"aux", "spare"} and traced.recorded == ()
    plan = sc.plan(module, example_inputs=inputs, method="spa_l1", sparsity=0.3)
    (note,) = plan.provenance[0].notes
    assert note.startswith("aux, spare: nothing that was traced reads it, ")


@pytest.mark.filterwarnings("ignore:.*is deprecated in favor of:FutureWarning")
@pytest.mark.parametrize(
    ("norm", "ratios", "rows"),
    [(nn.utils.weight_norm, {"2": 0.4}, 6), (nn.utils.spectral_norm, {"0.bias": 0.5, "2": 0.4}, 3)],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_modules_with_old_norms_of_weights_are_copied(norm, ratios, rows, inplace):
    module = randomised(nn.Sequential(norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)))
    inputs = images(2, 4)
    # leaves a weight behind that autograd made
    before = module(*inputs)
    before.sum().backward()
    plan = sc.plan(module, example_inputs=inputs, method="spa_l1", ratios=ratios, budget="channels", sparsity=0.0)
    masked = sc.apply(plan, module, mask=True)
    assert torch.equal(module(*inputs), before)
    cut = sc.apply(plan, module, inplace=inplace)
    assert cut[0].weight.shape == (rows, 4)
    assert (cut[0].out_features, cut[2].in_features, cut[2].out_features) == (rows, rows, 3)
    with torch.no_grad():
        assert difference(cut(*inputs), masked(*inputs)) < 1e-12
        assert difference(copied(cut)(*inputs), masked(*inputs)) < 1e-12


def test_a_plan_is_applied_where_the_module_is():
    module, inputs = randomised(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))), images(2, 4)
    plan = sc.plan(module, example_inputs=inputs, method="spa_l1", sparsity=0.3)
    kept = sc.apply(plan, module)[0].out_features
    # "meta" stands for a device that isn't the processor
    cut = sc.apply(plan, module.to("meta"))
    assert cut[0].weight.shape == (kept, 4) and kept < 6 and cut[2].weight.device.type == "meta"


class Projected(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 6), nn.Linear(6, 2)
        self.lstm, self.b = nn.LSTM(6, 5, num_layers=2, proj_size=3, batch_first=True, **options), nn.LazyLinear(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.lstm(self.a(x))[0]))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"bidirectional": True}])
def test_projected_hidden_states_stay(options):
    module = Projected(**options)
    module(torch.zeros(2, 3, 4))
    found = pruned(randomised(module), images(2, 3, 4), {"b": [0, 2]})
    check(found)
    assert own(found).lstm.hidden_size == 5
    assert {g.name for g in found.anatomy.groups} == {"b"}
    reasons = {f.name: f.reason for f in found.anatomy.frozen}
    assert "its hidden state is projected" in reasons["a.weight dim 0"]
    assert "its hidden state is projected" in reasons["lstm.weight_hr_l0 dim 0"]


class InitialState(nn.Module):
    """A state to start from is learned."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.c = kind(4, 5, num_layers=2, batch_first=True), nn.Linear(5, 2)
        self.start = nn.Parameter(torch.zeros(2, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        start = self.start.expand(-1, len(x), -1).contiguous()
        return self.c(self.rnn(x, (start, start) if isinstance(self.rnn, nn.LSTM) else start)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_initial_states_keep_their_layers_and_batch(kind):
    found = pruned(randomised(InitialState(kind)), images(3, 3, 4))
    assert {g.name: g.units for g in found.anatomy.groups} == {"rnn.weight_ih_l0": 5}
    check(found)
    assert own(found).start.shape == (2, 1, 3)


class Steps(nn.Module):
    """A cell that is called step by step."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.a, self.cell, self.c = nn.Linear(4, 6), kind(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), self.cell.hidden_size)
        memory = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        for step in self.a(x).unbind(dim=1):
            memory = self.cell(step, memory)
        return self.c(memory[0] if isinstance(memory, tuple) else memory)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_that_are_called_step_by_step_follow(kind):
    found = pruned(randomised(Steps(kind)), images(3, 4, 4), {"a": [0], "cell.weight_ih": [1, 2]})
    assert {g.name: g.units for g in found.anatomy.groups} == {"a": 6, "cell.weight_ih": 5}
    assert all(g.inexact is None for g in found.anatomy.groups)
    check(found)
    cut = own(found)
    assert (cut.cell.input_size, cut.cell.hidden_size) == (5, 3)


class BatchOfChannels(nn.Module):
    """Every channel is a sequence of its own; ``step``: of one step."""

    def __init__(self, step: bool) -> None:
        super().__init__()
        self.step = step
        self.a, self.gru, self.cell = nn.Conv1d(3, 6, 1), nn.GRU(1, 4, batch_first=True), nn.GRUCell(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).flatten(0, 1)
        return self.cell(x).sum(0) if self.step else self.gru(x.unsqueeze(-1))[0].sum(0)


@pytest.mark.parametrize("step", [False, True])
def test_channels_that_are_a_batch_of_sequences_stay(step):
    found = pruned(randomised(BatchOfChannels(step)), images(1, 3, 5))
    assert {g.name for g in found.anatomy.groups} == set()


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.attention, self.c = (
            nn.Linear(4, 12),
            nn.MultiheadAttention(12, 4, batch_first=True),
            nn.Linear(12, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(self.attention(x, x, x, need_weights=False)[0])


class Literal(nn.Module):
    """A size that no attribute holds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).view(-1, 3, 4).transpose(1, 2)
        return self.b(x.reshape(-1, 12))


@pytest.mark.parametrize("network", [TorchAttention, Literal])
def test_what_cannot_follow_is_said_with_its_line(network):
    shape = (2, 5, 4) if network is TorchAttention else (2, 4)
    found = pruned(randomised(network()), images(*shape))
    check(found)
    before = list(found.module.__dict__)
    with pytest.raises(Different, match=r"\.py:\d+") as refusal:
        cut_module(found.cut, found.graph, found.inputs, {})
    assert "\n" not in str(refusal.value)
    if network is Literal:
        assert "test_cutting.py:" in str(refusal.value) and "[-1, 3, 4]" in str(refusal.value)
    assert list(found.module.__dict__) == before


class Arithmetic(nn.Module):
    """Two attributes with the same value, of which one counts channels."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.times = 6, 6
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(x.shape[0], 1, self.width).flatten(1)) * self.times


def test_an_attribute_that_only_looks_like_a_size_is_never_changed_unseen():
    found = pruned(randomised(Arithmetic()), images(2, 4), {"a": [0, 1]})
    try:
        cut = own(found)
    except Different:
        return
    assert (cut.width, cut.times) == (4, 6)


class Schedule(nn.Module):
    """Numbers that are those of channels by chance, some of them read in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.channels, self.warmup, self.num_steps = 6, 6, 6, 6
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).view(-1, self.width)
        return self.b(x * min(1.0, len(x) / self.warmup) if self.training else x)


def test_attributes_that_the_proof_does_not_need_stay_but_for_widths():
    found = pruned(randomised(Schedule()), images(2, 4), {"a": [0, 1]})
    cut = own(found)
    assert (cut.width, cut.channels, cut.warmup, cut.num_steps) == (4, 4, 6, 6)
    assert cut.a.out_features == cut.b.in_features == 4
    with torch.no_grad():
        warm = 2 / 6 * (found.graph(*found.inputs) - cut.b.bias) + cut.b.bias
        assert difference(cut.train()(*found.inputs), warm) < 1e-12


ALL: list[tuple[Any, tuple[Tensor, ...]]] = [
    (Convolutions, images(2, 3, 6, 6)),
    (Transformer, tokens(2, 5, below=11)),
    (Tied, images(2, 4)),
    (Shared, images(2, 4)),
    (Buffers, images(2, 4)),
    (Recurrent, images(2, 3, 4)),
    (TorchAttention, images(2, 5, 4)),
    (Literal, images(2, 4)),
]


def snapshot(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"tensor {n}": (id(t), t.clone(), t.requires_grad) for n, t in module.state_dict(keep_vars=True).items()
    }
    for name, part in module.named_modules():
        plain = {
            k: copy.copy(v) for k, v in part.__dict__.items() if not k.startswith("_") or k == "_flat_weights_names"
        }
        found[f"module {name}"] = (id(part), plain, list(part.__dict__))
        found[f"hooks {name}"] = (len(part._forward_hooks), len(part._forward_pre_hooks))
    return found


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> bool:
    if before.keys() != after.keys():
        return False
    tensors = [n for n in before if n.startswith("tensor")]
    same = all(before[n][::2] == after[n][::2] and torch.equal(before[n][1], after[n][1]) for n in tensors)
    return same and all(before[n] == after[n] for n in before if n not in tensors)


@pytest.mark.parametrize(("network", "inputs"), ALL, ids=[n.__name__ for n, _ in ALL])
def test_the_users_module_is_left_alone_and_the_graph_trains_and_exports_again(network, inputs):
    module = randomised(network())
    # a state that nobody would choose, to see that it is put back
    for number, part in enumerate(module.modules()):
        part.training = number % 2 == 0
    next(module.parameters()).requires_grad_(False)
    before = snapshot(module)
    found = pruned(module, inputs)
    with suppress(Different):
        cut = cut_module(found.cut, found.graph, inputs, {})
        assert [p.training for p in cut.modules()] == [p.training for p in module.modules()]
        assert [p.requires_grad for p in cut.parameters()] == [p.requires_grad for p in module.parameters()]
    assert unchanged(before, snapshot(module))

    graph = found.graph
    frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
    assert {n for n, p in graph.named_parameters() if not p.requires_grad} == frozen
    assert {n for n, _ in graph.named_parameters()} == {n for n, _ in module.named_parameters()}
    for part in module.parameters():
        assert all(part.data_ptr() != other.data_ptr() for other in graph.parameters())
    for parameter in graph.parameters():
        parameter.requires_grad_(True)
    graph(*inputs).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in graph.parameters())
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter -= 0.01 * parameter.grad
    again = torch.export.export(graph, inputs).module()
    with torch.no_grad():
        assert difference(again(*inputs), graph(*inputs)) < 1e-12
    assert unchanged(before, snapshot(module))


def test_a_graph_loads_its_own_state_and_saves_under_the_modules_names():
    module = randomised(Buffers())
    found = pruned(module, images(2, 4), {"a": [0, 2]})
    again = pruned(module, images(2, 4), {"a": [0, 2]}).graph
    state = found.graph.state_dict()
    assert state.keys() == module.state_dict().keys()
    with torch.no_grad():
        state["a.weight"].mul_(2)
        assert again.load_state_dict(state) == ([], [])
        assert difference(again(*found.inputs), found.graph(*found.inputs)) == 0


def test_a_graph_changes_its_mode_and_computes_as_in_evaluation():
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    graph = pruned(randomised(module), images(2, 4)).graph
    with torch.no_grad():
        assert graph.train().training
        trained = graph(*images(2, 4))
        assert not graph.eval().training
        assert torch.equal(graph(*images(2, 4)), trained)


def test_nothing_removed_gives_back_what_was_there():
    module = randomised(Transformer())
    found = pruned(module, tokens(2, 5, below=11), {})
    with torch.no_grad():
        assert torch.equal(found.graph(*found.inputs), module(*found.inputs))
    cut = own(found)
    assert all(torch.equal(a, b) for a, b in zip(cut.parameters(), module.parameters(), strict=True))


def test_a_layer_is_never_emptied():
    module = randomised(Shared())
    found = pruned(module, images(2, 4), {})
    everything = found.anatomy.units_removed({"a": torch.arange(6)})
    with pytest.raises(PlanError, match=r"nothing would be left of a\.weight along dimension 0"):
        cut_graph(Cut(found.trace, everything))
