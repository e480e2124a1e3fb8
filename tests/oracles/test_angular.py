"""Oracles of angular: a second, plain implementation, and streams that are known to stand still."""

import math

import pytest
import torch

import secateur as sc
from families import make_tiny, tiny_ids
from runs import plan_for
from secateur.observe import angles

IDS = tiny_ids()
BLOCKS = 6


def ends(model):
    """Hidden states at the last token, before every block and behind the last one, [blocks + 1, windows, hidden]."""
    found = []
    hooks = [
        block.register_forward_hook(lambda _, args, output, i=i: found.append((i, args[0][:, -1], output[:, -1])))
        for i, block in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(IDS)
    for hook in hooks:
        hook.remove()
    return torch.stack([before for _, before, _ in found] + [found[-1][2]])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_run_with_the_nearest_ends_leaves(count):
    model = make_tiny("llama", num_hidden_layers=BLOCKS)
    x = ends(model)
    distances = []
    for first in range(BLOCKS - count + 1):
        cosines = torch.nn.functional.cosine_similarity(x[first].double(), x[first + count].double(), dim=-1)
        distances.append(float(cosines.arccos().mean()) / math.pi)
    first = min(range(len(distances)), key=distances.__getitem__)
    plan = plan_for("angular", model, IDS, layers=count)
    assert plan.removed("layers").tolist() == list(range(first, first + count))
    scores = plan.scores["layers"]
    assert scores.min() == pytest.approx(distances[first], rel=1e-5) and len(scores) == BLOCKS


def test_a_stream_that_stands_still_leaves_first_and_the_logits_stay():
    model = make_tiny("llama", num_hidden_layers=5)
    with torch.no_grad():
        for layer in (2, 3):
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    plan = plan_for("angular", model, IDS, layers=2)
    assert plan.removed("layers").tolist() == [2, 3]
    with torch.no_grad():
        torch.testing.assert_close(sc.apply(plan, model)(IDS).logits, model(IDS).logits)


def test_of_equal_runs_the_first_leaves():
    model = make_tiny("llama", num_hidden_layers=4)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    assert plan_for("angular", model, IDS, layers=2).removed("layers").tolist() == [0, 1]


def test_angles_are_fractions_of_pi():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    y = torch.tensor([[2.0, 0.0], [-3.0, 0.0], [0.0, 5.0], [0.0, 1.0]])
    torch.testing.assert_close(angles(x, y), torch.tensor([0.0, 1.0, 0.5, 0.25], dtype=torch.float64))
    assert angles(x[:1], 0 * y[:1]).item() == pytest.approx(1 / 3)
