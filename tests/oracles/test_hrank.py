"""HRank against maps whose ranks are known, and against hooks where the official code has them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur.errors import NonFiniteError, UnsupportedModelError
from secateur.observe import MapRanks, Statistic
from secateur.structure.featuremaps import find_maps
from secateur.structure.trace import describe, trace

RANKS = [[3, 1, 0, 5], [3, 2, 5, 4], [2, 1, 1, 5]]
"""Of the maps of every image."""


def image(ranks, rows=5, columns=7):
    """One map per rank, none of whose entries is negative."""
    return torch.stack([torch.eye(rows, columns) * (torch.arange(columns) < rank) for rank in ranks])


IMAGES = torch.stack([image(ranks) for ranks in RANKS])


class Selecting(nn.Module):
    """The channels are those of the input in another order; a convolution reads them where ``behind`` puts them."""

    def __init__(self, order, behind: Any = nn.Identity):
        super().__init__()
        self.first = nn.Conv2d(4, len(order), 1, bias=False)
        self.behind: Any = behind()
        self.second = nn.Conv2d(len(order), 2, 1)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(4)[order][:, :, None, None])

    def forward(self, x):
        return self.second(self.behind(self.first(x)))


def planned(module, data, **arguments):
    given = {"method": "hrank", "sparsity": 0.25, "budget": "channels", "options": {"normalizer": "none"}, **arguments}
    batch = data[0] if isinstance(data, list) else data
    return sc.plan(module.eval(), example_inputs=(batch,), data=data if isinstance(data, list) else [data], **given)


# -- the statistic -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ranks_of_constructed_maps_are_exact(dtype):
    ranks = MapRanks()
    ranks.update(IMAGES.to(dtype))
    assert ranks.total_C.tolist() == torch.tensor(RANKS).sum(dim=0).tolist() and ranks.images == 3
    assert torch.equal(ranks.mean_C(), torch.tensor(RANKS, dtype=torch.float64).mean(dim=0))


@given(cuts=st.lists(st.integers(0, 6), max_size=3), seed=st.integers(0, 99))
def test_any_split_merged_equals_the_whole(cuts, seed):
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 2, (6, 3, 4, 4), generator=generator).float()
    whole, merged = MapRanks(), MapRanks()
    whole.update(low)
    assert isinstance(whole, Statistic)
    bounds = [0, *sorted(cuts), 6]
    for start, end in itertools.pairwise(bounds):
        if start < end:
            part, stored = MapRanks(), MapRanks()
            part.update(low[start:end])
            stored.load_state(part.state())
            merged.merge(stored)
    assert torch.equal(merged.total_C, whole.total_C) and merged.images == whole.images == 6


# -- the scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "behind", [nn.Identity, nn.ReLU, lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, return_indices=False))]
)
@pytest.mark.parametrize("data", [IMAGES, list(IMAGES.split([1, 2]))])
def test_scores_are_average_ranks_before_anything_is_pooled(behind, data):
    plan = planned(Selecting([3, 2, 1, 0], behind), data)
    assert plan.scores["first"].tolist() == pytest.approx([14 / 3, 2.0, 4 / 3, 8 / 3])
    assert plan.removed("first").tolist() == [2]


def test_ranks_are_those_behind_norms_and_activations():
    """A map of rank one, of which a shift and a ReLU make others; and one that they switch off."""
    module = Selecting([0, 0, 0, 0], lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    with torch.no_grad():
        module.behind[0].bias.copy_(torch.tensor([0.0, -2.5, -25.0, -4.5]))
    products = torch.arange(1.0, 5).outer(torch.arange(1.0, 6)).expand(2, 4, 4, 5)
    plan, seen = planned(module, products), []
    module.behind[1].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        module(products)
    # as get_feature_hook of rank_generation.py, image by image and channel by channel
    expected = torch.tensor([[torch.linalg.matrix_rank(one).item() for one in maps] for maps in seen[0]]).double()
    assert plan.scores["first"].tolist() == expected.mean(dim=0).tolist() and expected[0].tolist() == [1, 4, 0, 4]
    assert plan.removed("first").tolist() == [2]


def test_channels_that_are_read_in_several_places_have_the_mean_rank():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 3, padding=1)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            x = torch.relu(x + self.inner(x))
            return self.head(x.mean(dim=(2, 3)))

    torch.manual_seed(0)
    module, x = Residual().eval(), torch.randn(3, 4, 5, 5).round()
    plan = planned(module, x)
    with torch.no_grad():
        first = torch.relu(module.stem(x))
        second = torch.relu(first + module.inner(first))
        ranks = [torch.linalg.matrix_rank(maps).double().mean(dim=0) for maps in (first, second)]
    assert torch.allclose(plan.scores["stem"], ((ranks[0] + ranks[1]) / 2).float())


def test_channels_may_come_last():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
            with torch.no_grad():
                self.first.weight.copy_(torch.eye(4))

        def forward(self, x):
            return self.second(torch.relu(self.first(x.permute(0, 2, 3, 1))))

    assert planned(Last(), IMAGES).scores["first"].tolist() == pytest.approx([8 / 3, 4 / 3, 2.0, 14 / 3])


def test_a_single_image_without_a_batch_will_do():
    plan = planned(Selecting([0, 1, 2, 3]), IMAGES[0])
    assert plan.scores["first"].tolist() == RANKS[0]


def test_low_ranks_leave_first_and_every_group_loses_the_same_share():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(4, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(120, 2)
    )
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(4).repeat(2, 1)[:, :, None, None])
    plan = planned(module, IMAGES, sparsity=0.5)
    # rank 4/3 and 2, twice each
    assert plan.removed("0").tolist() == [1, 2, 5, 6] and len(plan.removed("2")) == 4


# -- where there are no maps -------------------------------------------------------------------------------------------


def test_groups_whose_channels_are_no_maps_stay_and_a_note_says_so():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gate = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 1)
            self.hidden, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x):
            x = torch.relu(self.conv(x))
            x = x * torch.sigmoid(self.gate(x.mean(dim=(2, 3), keepdim=True)))
            return self.head(torch.relu(self.hidden(x.mean(dim=(2, 3)))))

    plan = planned(Classifier(), IMAGES)
    assert list(plan.keep) == ["conv"]
    assert plan.provenance[0].notes == ("hidden stays: no weight reads their channels as feature maps",)
    rows = torch.rand(2, 4, 3, 9)  # of which the convolution leaves one row
    with pytest.raises(UnsupportedModelError, match="Classifier has no feature maps whose ranks could be taken"):
        planned(Classifier(), rows)


def test_attention_and_sequences_are_no_maps():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert not find_maps(trace(layer, (torch.randn(2, 3, 8),)))
    sound = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3)).eval()
    assert not find_maps(trace(sound, (torch.randn(2, 2, 9),)))


def test_what_is_averaged_over_channels_is_no_map_of_theirs():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.gate, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = torch.relu(self.first(x))
            return self.second(x * torch.sigmoid(self.gate(x.mean(dim=1, keepdim=True))))

    assert [describe(p.node).split()[0] for p in find_maps(trace(Gated().eval(), (IMAGES,)))] == ["aten::mul"]


def test_a_norm_that_was_taken_apart_is_not_taken_for_a_pool():
    """It gives several results, as pools with indices do."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.second = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.norm(self.first(x))
            y, _ = nn.functional.max_pool2d(x, 2, return_indices=True)
            y = self.second(y)
            y[:, 0] += 1  # writing into a part of a tensor has torch take the network apart
            return y

    traced = trace(Net().eval(), (IMAGES,))
    (place,) = find_maps(traced)
    assert traced.exported.decomposed and describe(place.node).startswith("getitem (norm")


def test_nan_is_refused():
    module = Selecting([0, 1, 2, 3])
    with torch.no_grad():
        module.first.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"aten::conv2d \(first.* gives NaN or inf"):
        planned(module, IMAGES)
