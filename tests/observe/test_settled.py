"""Parts of a block that are final give what they gave."""

import pytest
import torch
from torch import nn

from secateur.observe.activations import Activations
from secateur.observe.settled import Settled


class Part(nn.Module):
    """Doubles its input, wrapped as it is told; counts how often."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.calls, self.wrap = 0, wrap

    def forward(self, x):
        self.calls += 1
        return self.wrap(2 * x)


def passes(part, settled, inputs):
    """Two passes over all batches, as a walk makes them."""
    found = []
    for _ in range(2):
        for batch, x in enumerate(inputs):
            with settled.in_batch(batch):
                found.append(part(x))
    return found


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: (y,), lambda y: (y, None, None)])
def test_what_it_gave_is_given_again_in_its_own_shape(wrap, limit):
    inputs = [torch.full((1, 2, 3), float(batch)) for batch in range(3)]
    part, outputs = Part(wrap), Activations(limit=limit)
    found = passes(part, Settled(part, outputs), inputs)
    assert part.calls == 3 and outputs.spilled == (limit == 0)
    for first, second in zip(found[:3], found[3:], strict=True):
        first, second = (one if isinstance(one, tuple) else (one,) for one in (first, second))
        assert len(first) == len(second) and first[1:] == second[1:] and torch.equal(first[0], second[0])
    # it is as it was
    assert "forward" not in part.__dict__ and part(inputs[1]) is not None and part.calls == 4


def test_what_gives_more_than_one_tensor_is_computed_every_time():
    part = Part(lambda y: (y, y + 1))
    found = passes(part, Settled(part, Activations()), [torch.ones(1, 2, 3)] * 2)
    assert part.calls == 4 and all(torch.equal(one[1], torch.full((1, 2, 3), 3.0)) for one in found)


def test_a_forward_that_ends_early_leaves_it_as_it_was():
    part = Part(lambda y: y)
    settled = Settled(part, Activations())
    passes(part, settled, [torch.ones(1, 2, 3)])
    with pytest.raises(KeyError), settled.in_batch(0):
        raise KeyError
    assert "forward" not in part.__dict__
