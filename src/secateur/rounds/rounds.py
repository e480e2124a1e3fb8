"""Train, prune, rewind, over and over: one lottery with one seed, level by level.

    rounds = Rounds(network, train, method="lottery_ticket", evaluate=accuracy, folder="tickets", levels=12)
    for level in range(13):
        rounds.level(level), rounds.control(level, "reinit")
    ticket = rounds.ticket(12)

Every level, and every control of one, is a training of its own that follows from the folder and the seed alone: they
may run in any process, controls in any order and at the same time.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.criteria import named_generator
from secateur.criteria.sparsity import pq_index
from secateur.drawing import seeded
from secateur.errors import UsageError, nearest
from secateur.methods import RoundsMethod, get_method, list_methods, make_method
from secateur.plans import Plan
from secateur.rounds.controls import CONTROLS, control_masks
from secateur.rounds.levels import FORMAT, TICKET, Entry, Levels
from secateur.rounds.pruning import next_masks, parts_of
from secateur.rounds.run import START, EvaluateFunction, Run, TrainFunction, numbers, trained
from secateur.rowmasks import clear_dead
from secateur.structure.exporting import evaluation_mode
from secateur.tensorfiles import tensors_of
from secateur.train.checkpoints import plan_of
from secateur.train.updating import Masks
from secateur.train.weights import find_layers, warn_of_computed

Network = nn.Module | Callable[[], nn.Module]
Progress = Callable[[str, int, int], None]


class Rounds:
    """Levels of one lottery, in ``folder``, or in a temporary one that goes with this object.

    ``network`` is a function that makes the network, whose first weights follow from the seed, or a network, whose
    weights are the first ones. ``train(network, run)`` trains it in place, see ``Run``; ``evaluate(network)`` gives
    numbers by name, on the network in evaluation mode. ``options`` are those of the method, ``include`` and
    ``exclude`` as for ``Sparsifier``. ``resume`` goes on in a folder that holds some of it. Of trained networks
    the last level's is kept, with ``keep_weights`` those of all levels.

    Raises UsageError, OptionError or OutputError before anything is trained.
    """

    def __init__(
        self,
        network: Network,
        train: TrainFunction,
        *,
        method: str = "lottery_ticket",
        evaluate: EvaluateFunction | None = None,
        folder: str | Path | None = None,
        resume: bool = False,
        keep_weights: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.method = rounds_method(method, options)
        self._network, self._train, self._evaluate = network, train, evaluate
        self._keep = keep_weights or not self.method.rewinds()
        self._made = self._make("first weights")
        self._layers = find_layers(self._made, include=include, exclude=exclude, depthwise=self.method.depthwise)
        warn_of_computed(self._made, (*include, *exclude))
        self._kinds = _kinds(self._made, self._layers)
        self._shapes = {name: tuple(layer.weight.shape) for name, layer in self._layers.items()}
        if folder is None:
            folder = tempfile.mkdtemp(prefix="secateur-rounds-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        about = {
            "format": FORMAT,
            "method": self.method.name,
            "seed": self.method.seed,
            "options": self.method.options(),
            "weights": {name: list(shape) for name, shape in self._shapes.items()},
        }
        self._levels = Levels(Path(folder), about, resume)

    @property
    def folder(self) -> Path:
        """Where the levels are."""
        return self._levels.folder

    @property
    def entries(self) -> list[Entry]:
        """What is done so far, by level, the ticket before its controls."""
        branches = (TICKET, *CONTROLS)
        found = [self._levels.entry(n, b) for n in range(self.method.levels + 1) for b in branches]
        return [entry for entry in found if entry is not None]

    # -- trainings ----------------------------------------------------------------------------------------------------

    def run(
        self, controls: Sequence[str] = (), at: Sequence[int] | None = None, progress: Progress = lambda *_: None
    ) -> list[Entry]:
        """All levels that aren't done, and the controls of those ``at`` which they are wanted (all but the dense)."""
        for name in controls:
            self._check_control(name)
        last = self.method.levels
        wanted = range(1, last + 1) if at is None else at
        jobs = [(n, b) for n in range(last + 1) for b in (TICKET, *(controls if n and n in wanted else ()))]
        for done, (level, branch) in enumerate(jobs):
            progress("levels", done, len(jobs))
            self.level(level) if branch == TICKET else self.control(level, branch)
        progress("levels", len(jobs), len(jobs))
        return self.entries

    def level(self, level: int) -> Entry:
        """Train a level, and those before it that aren't done; what is done already is read. Raises UsageError."""
        self._check_level(level)
        for number in range(level):
            if self._levels.entry(number) is None:
                self._ticket(number)
        return self._levels.entry(level) or self._ticket(level)

    def control(self, level: int, name: str) -> Entry:
        """The same of a control, one of ``CONTROLS``, whose level has masks already or is made first."""
        self._check_control(name)
        self._check_level(level)
        done = self._levels.entry(level, name)
        if done is not None:
            return done
        module, masks = self._control(level, name)
        return self._trained(module, masks, level, name)

    # -- what there is ------------------------------------------------------------------------------------------------

    def masks(self, level: int) -> Masks:
        """Boolean masks of a level by the name of the weight, True = live."""
        self._check_level(level)
        found = self._levels.masks(level, self._shapes)
        if found is None:
            found = self._next_masks(level)
            self._levels.put_masks(level, found)
        return found

    def ticket(self, level: int, control: str = TICKET) -> nn.Module:
        """The network with which a level, or a control of it, begins: weights that were removed are zero."""
        if control == TICKET:
            module, masks = self._filled(self._start(level)), self.masks(level)
        else:
            self._check_control(control)
            module, masks = self._control(level, control)
        for name, mask in masks.items():
            weight = module.get_parameter(name)
            clear_dead(weight, mask.to(weight.device))
        return module

    def trained(self, level: int) -> nn.Module:
        """The trained network of a level. Raises UsageError where it wasn't kept."""
        return self._filled(self._trained_tensors(level))

    def plan(self, level: int) -> Plan:
        """The masks of a level as a plan of the network, see ``secateur.apply``."""
        note = f"masks of level {level}, for the first weights of the network or those of any training"
        return plan_of(self._made, self.method, self.masks(level), (note,))

    # -- how ----------------------------------------------------------------------------------------------------------

    def _ticket(self, level: int) -> Entry:
        entry = self._trained(self._filled(self._start(level)), self.masks(level), level, TICKET)
        # what later levels are made from stays
        if level and not self._keep and not (self.method.one_shot and level == 1):
            self._levels.forget_trained(level - 1)
        return entry

    def _trained(self, module: nn.Module, masks: Masks, level: int, branch: str) -> Entry:
        # with weights that stay what they are, the dense network is trained from its first step
        first = self.method.start() if level or self.method.rewinds() else 0
        run = Run(self._seed(level), level, branch, first, self.method.length() or None, masks)
        metrics, steps = trained(module, self._train, run, self.method.length())
        if self._evaluate is not None:
            with evaluation_mode(module), torch.no_grad(), seeded(self._seed(level)):
                metrics |= numbers(self._evaluate(module))
        if branch == TICKET:
            self._levels.put_trained(level, tensors_of(module))
        live = {name: int(mask.sum()) for name, mask in masks.items()}
        entry = Entry(
            seed=self.method.seed,
            level=level,
            branch=branch,
            sparsity=1.0 - sum(live.values()) / sum(mask.numel() for mask in masks.values()),
            weights=sum(live.values()),
            metrics=metrics,
            steps=steps,
            pq_index=_index(module, masks),
            layers=live,
        )
        self._levels.finish(entry)
        return entry

    def _control(self, level: int, name: str) -> tuple[nn.Module, Masks]:
        masks = self.masks(level)
        seed = named_generator(f"{name}@{level}", self.method.seed).initial_seed()
        module = self._make(f"reinit@{level}") if name == "reinit" else self._filled(self._start(level))
        return module, control_masks(name, masks, seed)

    def _start(self, level: int) -> dict[str, Tensor]:
        """All tensors with which the trainings of a level begin."""
        if level and not self.method.rewinds():
            return self._trained_tensors(self._before(level))
        found = self._levels.start()
        if found is None:
            module = self._filled(tensors_of(self._made))
            if self.method.start() and self.method.rewinds():
                ones = {name: torch.ones(shape, dtype=torch.bool) for name, shape in self._shapes.items()}
                run = Run(self.method.seed, 0, START, 0, self.method.start(), ones)
                trained(module, self._train, run)
            found = {name: tensor.detach().clone() for name, tensor in tensors_of(module).items()}
            self._levels.put_start(found)
        return found

    def _next_masks(self, level: int) -> Masks:
        if level == 0:
            return {name: torch.ones(shape, dtype=torch.bool) for name, shape in self._shapes.items()}
        masks = self.masks(level - 1)
        weights = self._trained_tensors(self._before(level))
        parts = parts_of(self._layers, self._kinds, weights, masks, level - 1, self.method.seed)
        return next_masks(self.method, self._layers, parts)

    def _before(self, level: int) -> int:
        """The level that this one is made from."""
        return 0 if self.method.one_shot else level - 1

    def _trained_tensors(self, level: int) -> dict[str, Tensor]:
        if self._levels.entry(level) is None:
            self.level(level)
        found = self._levels.trained(level)
        if found is None:
            raise UsageError(
                f"the trained network of level {level} wasn't kept: keep_weights=True keeps those of all levels"
            )
        return found

    def _make(self, what: str) -> nn.Module:
        if isinstance(self._network, nn.Module):
            return copy.deepcopy(self._network)
        if not callable(self._network):
            raise UsageError(
                f"network must be a module, or a function that makes one, got {type(self._network).__name__}"
            )
        with seeded(named_generator(what, self.method.seed).initial_seed()):
            made = self._network()
        if not isinstance(made, nn.Module):
            raise UsageError(
                f"the function that makes the network gave {type(made).__name__}, which is no torch module"
            )
        return made

    def _filled(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the network that holds these tensors."""
        module = copy.deepcopy(self._made)
        own = tensors_of(module)
        if own.keys() != tensors.keys():
            other = sorted(own.keys() ^ tensors.keys())[0]
            raise UsageError(f"{self.folder} holds the levels of another network: {other} isn't in both")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        return module

    def _seed(self, level: int) -> int:
        """What decides the order of batches: a control has that of its ticket."""
        if self.method.order == "same" or not level:
            return self.method.seed
        return named_generator(f"order@{level}", self.method.seed).initial_seed() % 2**31

    def _check_level(self, level: int) -> None:
        if not 0 <= level <= self.method.levels:
            raise UsageError(f"there are levels 0 (dense) to {self.method.levels}, got {level}")

    def _check_control(self, name: str) -> None:
        if name not in CONTROLS:
            raise UsageError(f"controls are {', '.join(CONTROLS)}; got '{name}'{nearest(name, CONTROLS)}")
        if name == "reinit" and isinstance(self._network, nn.Module):
            raise UsageError(
                "the control reinit draws the network anew: give a function that makes the network in place of one"
            )


def rounds_method(name: str, options: Mapping[str, Any]) -> RoundsMethod:
    """The method of that name with these options. Raises UsageError when it doesn't go by rounds."""
    method = make_method(name, options)
    if not isinstance(method, RoundsMethod):
        raise UsageError(f"{name} doesn't train in rounds: take one of {', '.join(rounds_methods())}")
    return method


def rounds_methods() -> list[str]:
    """Names of all methods that go by rounds."""
    return [name for name in list_methods(object="weights") if issubclass(get_method(name), RoundsMethod)]


def _kinds(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, str]:
    # the last one of the network, also where it is left out
    last = list(find_layers(model))[-1]
    return {
        name: "output" if name == last else "convolution" if layer.weight.dim() > 2 else "linear"
        for name, layer in layers.items()
    }


def _index(module: nn.Module, masks: Masks) -> float:
    live = [module.get_parameter(name).detach().cpu()[mask] for name, mask in masks.items()]
    joined = torch.cat([values.double() for values in live])
    return float(pq_index(joined)) if joined.numel() else 0.0
