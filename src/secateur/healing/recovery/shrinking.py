"""Units that leave a model while its adapters are trained, by what weights and gradients of the adapters tell.

    v_m    what the entries of one projection m add up to for every unit
    s      sum over the projections of a unit of v_m / (||v_m||_2 + 1e-8)
    S     <- beta S + (1 - beta) s             at every step, unless anything in it is NaN

A unit that has left is silent: what reads it sees zeros. O outputs, I inputs of a weight, R rank, U units.
Source: LoRAPrune, arXiv:2305.18403.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.finite import all_finite
from secateur.healing.recovery.adapted import Adapted, adapted
from secateur.loop import Callback
from secateur.structure import Group, Slices

_TINY = 1e-8


Entries = Callable[[Adapted], Tensor]
"""An adapted weight → what every entry of it counts, [outputs, inputs], higher = keep."""
Deciding = Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor] | None]
"""(step from 1, scores by group [units] float64, lowest for what has left) → kept units by group; None: not now."""


class Shrinking(Callback):
    """Scores ``groups`` at every step, and silences the units of which ``deciding`` says that they leave.

    ``beta`` is how much of the scores stays from one step to the next; with ``normalised`` all projections of a unit
    weigh the same. ``gradients`` are those of the frozen weights, which take as much memory as these.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        entries: Entries,
        deciding: Deciding,
        *,
        beta: float,
        normalised: bool = True,
        gradients: bool = False,
    ) -> None:
        self._groups, self._entries, self._deciding = groups, entries, deciding
        self._beta, self._normalised, self._gradients = beta, normalised, gradients
        self.scores = {g.name: torch.zeros(g.units, dtype=torch.float64) for g in groups}
        self.alive = {g.name: torch.ones(g.units, dtype=torch.bool) for g in groups}
        self._layers: dict[str, Any] = {}
        self._pieces: dict[str, list[Slices]] = {}
        self._columns: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    @property
    def kept(self) -> dict[str, Tensor]:
        """The units that are left of every group, ascending int64."""
        return {name: alive.nonzero().flatten() for name, alive in self.alive.items()}

    def begin(self, model: Any) -> None:
        """Find the adapters, and silence what has left. Raises UsageError where a projection has no adapter."""
        for group in self._groups:
            pieces = [piece for piece in group.pieces if model.get_parameter(piece.tensor).dim() == 2]
            self._pieces[group.name] = pieces
            self._layers |= {name: model.get_submodule(name) for name in map(_module, pieces)}
        bare = sorted({m.rpartition(".")[2] for m, layer in self._layers.items() if not hasattr(layer, "lora_A")})
        if bare:
            raise UsageError(
                f"units are scored by the adapters of all their projections, and {', '.join(bare)} would have none: add"
                " them to targets, or leave targets empty"
            )
        if self._gradients:
            for layer in self._layers.values():
                layer.get_base_layer().weight.requires_grad_(True)
        for group in self._groups:
            self._silence(group)
            reader: nn.Module = self._layers[group.reader or ""]
            self._handles.append(reader.register_forward_pre_hook(self._hook(group.name)))

    def end(self) -> None:
        """See ``Callback``."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._layers = [], {}

    def on_pre_optimizer_step(self, step: int) -> None:
        """Score, and let those leave whose turn it is."""
        with torch.no_grad():
            found = {g.name: self._score(g) for g in self._groups}
        # one broken number and the step tells nothing
        if all(all_finite(s) for s in found.values()):
            for name, scores in found.items():
                self.scores[name] = self._beta * self.scores[name] + (1 - self._beta) * scores
        if self._gradients:
            for layer in self._layers.values():
                layer.get_base_layer().weight.grad = None
        # what has left doesn't come back: below all that is there
        ordered = {name: s.masked_fill(~self.alive[name], -1.0) for name, s in self.scores.items()}
        kept = self._deciding(step, ordered)
        if kept is not None:
            for group in self._groups:
                self.alive[group.name] = torch.zeros(group.units, dtype=torch.bool)
                self.alive[group.name][kept[group.name]] = True
                self._silence(group)

    def state(self) -> dict[str, Tensor]:
        """See ``Callback``."""
        found = {f"scores/{name}": scores for name, scores in self.scores.items()}
        return found | {f"alive/{name}": alive for name, alive in self.alive.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See ``Callback``."""
        for group in self._groups:
            self.scores[group.name] = state[f"scores/{group.name}"]
            self.alive[group.name] = state[f"alive/{group.name}"]
            self._silence(group)

    def _silence(self, group: Group) -> None:
        layer = self._layers[group.reader or ""]
        mask = torch.ones(int(group.columns.max()) + 1)
        mask[group.columns[~self.alive[group.name]].flatten()] = 0
        self._columns[group.name] = mask.to(layer.get_base_layer().weight.device)

    def _hook(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0] * self._columns[name].to(args[0].dtype), *args[1:])

        return hook

    def _score(self, group: Group) -> Tensor:
        total = torch.zeros(group.units, dtype=torch.float64)
        by_module: dict[str, list[Slices]] = {}
        for piece in self._pieces[group.name]:
            by_module.setdefault(_module(piece), []).append(piece)
        for module, pieces in by_module.items():
            layer = self._layers[module]
            entries_OI = self._entries(adapted(module, layer))
            stored = entries_OI.T if layer.fan_in_fan_out else entries_OI
            for piece in pieces:
                channels = stored.sum(dim=1 - piece.dim, dtype=torch.float64)
                one_U = channels[piece.index.to(channels.device)].sum(dim=1).cpu()
                total += one_U / (one_U.norm() + _TINY) if self._normalised else one_U
        return total


def _module(piece: Slices) -> str:
    return piece.tensor.rpartition(".")[0]
