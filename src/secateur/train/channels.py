"""Coupled channels as what is pruned while a network is trained: units that leave everywhere at once.

A unit is scored by the sum of |w| of all that leaves with it, relative to the mean of its group; dead units have zeros
in every parameter that they visit, norms and biases too. So the masks are a plan that really cuts the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.criteria.groups import NORMALIZERS, reduce_slices
from secateur.errors import UsageError
from secateur.methods import GradualMethod, Trained, TrainingMethod
from secateur.networks.applying import module_anatomy
from secateur.networks.example import Example
from secateur.structure import Group
from secateur.train.updating import Masks


class Channels:
    """The groups of a module whose units may leave; those that a norm runs over stay, since zeros aren't absence there.

    Raises UsageError when there are none, or when the method prunes single weights alone.
    """

    def __init__(
        self,
        module: nn.Module,
        method: TrainingMethod,
        example: Example,
        include: Sequence[str],
        exclude: Sequence[str],
    ) -> None:
        if not example.leaves():
            raise UsageError("units='channels' traces the network: give example_inputs=(x,), what it is called with")
        check_method(method, include)
        anatomy = module_anatomy(module, example, ignore=exclude)
        self.example = example
        self._parameters = dict(module.named_parameters())
        trained = {name for name, parameter in self._parameters.items() if parameter.requires_grad}
        self.groups: dict[str, Group] = {
            group.name: group
            for group in anatomy
            if group.frozen is None and group.inexact is None and any(s.tensor in trained for s in group.slices)
        }
        if not self.groups:
            raise UsageError(
                f"{type(module).__name__} has no channels that can leave: secateur inspect says what is in the way"
            )
        visited = dict.fromkeys(s.tensor for group in self.groups.values() for s in group.slices)
        places = {name: name.rpartition(".") for name in visited}
        self._visited = {name: (module.get_submodule(path), leaf) for name, (path, _, leaf) in places.items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the units visit, by name, as it is now: moving or casting a module replaces its buffers.

        These are also statistics of norms and what isn't trained: a constant that a dead unit leaves behind would be
        gone from the cut network.
        """
        return {name: getattr(owner, leaf) for name, (owner, leaf) in self._visited.items()}

    def all_live(self) -> Masks:
        """A mask of ones for every group, on the device of the network."""
        device = next(iter(self._parameters.values())).device
        return {name: torch.ones(g.units, dtype=torch.bool, device=device) for name, g in self.groups.items()}

    def part(self, name: str, mask: Tensor, step: int, seed: int) -> Trained:
        """A group as methods see it: the magnitude of every unit in place of a weight, [units] float32."""
        found = torch.zeros(self.groups[name].units, dtype=torch.float64, device=mask.device)
        for one in self.groups[name].slices:
            weight = self._parameters.get(one.tensor)
            if weight is not None and weight.dim() > 1:
                found += reduce_slices(weight.detach().abs(), one.dim, one.index, "sum").to(found.device)
        return Trained(name, NORMALIZERS["mean"](found).float(), mask, step=step, seed=seed)

    def entries(self, masks: Mapping[str, Tensor]) -> Masks:
        """Boolean masks of the tensors, False for whatever leaves with a dead unit."""
        found = {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in self.tensors.items()}
        for name, group in self.groups.items():
            dead = ~masks[name]
            for one in group.slices:
                if one.tensor in found:
                    gone = one.index.to(dead.device)[dead].reshape(-1)
                    found[one.tensor].index_fill_(one.dim, gone, False)
        return found


def check_method(method: TrainingMethod, include: Sequence[str]) -> None:
    """Raises UsageError when a method prunes single weights alone, with its options and these ``include``."""
    moves = getattr(method, "fraction", 0.0)
    alone = getattr(method, "pattern", "") or getattr(method, "block", "")
    if not isinstance(method, GradualMethod) or moves or alone or method.needed() or method.random_start():
        raise UsageError(
            f"{method.name} with these options prunes single weights: units='channels' goes with gmp, or granet with"
            " fraction=0, and a criterion that needs no gradient"
        )
    if include or method.keep_first or method.depthwise:
        raise UsageError(
            "units='channels' finds all channels by itself: leave out include, keep_first and depthwise, and name what"
            " stays with exclude"
        )
