"""Activation norm against the channels that hooks see."""

import torch
from torch import nn

import secateur as sc


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.conv, self.pool = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x, image):
        h = torch.relu(self.a(x))
        return self.b(h) + self.c(2 * h), self.pool(torch.relu(self.conv(image)))


def test_scores_are_root_mean_squares_of_what_is_read():
    module = Net().double().eval()
    generator = torch.Generator().manual_seed(1)
    batches = [
        (
            torch.randn(4, 5, dtype=torch.double, generator=generator),
            torch.randn(4, 1, 6, 6, dtype=torch.double, generator=generator),
        )
        for _ in range(3)
    ]
    plan = sc.plan(
        module,
        example_inputs=batches[0],
        method="activation_norm",
        sparsity=0.4,
        budget="channels",
        data=batches,
        options={"normalizer": "none"},
    )
    with torch.no_grad():
        h = torch.relu(module.a(torch.cat([x for x, _ in batches])))
        seen = torch.relu(module.conv(torch.cat([image for _, image in batches])))
    # b reads h and c reads twice as much
    assert torch.allclose(plan.scores["a"], (1.5 * h.square().mean(dim=0).sqrt()).float(), rtol=1e-4)
    assert torch.allclose(plan.scores["conv"], seen.square().mean(dim=(0, 2, 3)).sqrt().float(), rtol=1e-4)
    assert not plan.values


def test_dead_channels_leave_first():
    module = Net().eval()
    with torch.no_grad():
        module.a.bias[[2, 5]] = -100.0
    data = [(torch.randn(64, 5), torch.randn(64, 1, 6, 6))]
    ratios = {"a": 0.25, "conv": 0.0}
    plan = sc.plan(module, example_inputs=data[0], method="activation_norm", sparsity=0.0, data=data, ratios=ratios)
    assert plan.removed("a").tolist() == [2, 5]
