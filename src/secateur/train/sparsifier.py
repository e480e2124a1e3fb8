"""Masks that hold and move while a network is trained, in any loop.

    sparsifier = sc.Sparsifier(model, optimizer, method="gmp", sparsity=0.9, begin=100, end=1000, every=20)
    for x, y in batches:
        loss_of(model(x), y).backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    plan = sparsifier.finish()

Dead weights are zero, and so is what the optimizer remembers of them, after every step. Where masks change, a method
scores weights and the engine keeps what ranks highest; everything that happens follows from weights, gradients, the
number of the step and the seed, so that all ranks of data parallelism do the same, and a resumed training too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from secateur.allocate import Schedule, fewest_kept, kept_counts
from secateur.errors import UsageError
from secateur.methods import StartingMethod, Trained
from secateur.networks.compiled import plainly_named
from secateur.networks.example import Example
from secateur.observe.gradients import Loss
from secateur.plans import Plan, pack_bits
from secateur.ranks import join
from secateur.train import checkpoints, flops
from secateur.train.asked import check_module, check_patterns, checked_schedule, training_method
from secateur.train.channels import Channels
from secateur.train.parts import clear_dead, local, part_of, reshard, whole, whole_like
from secateur.train.starting import Given, starting_masks
from secateur.train.updating import Masks, Update, decides_alone, exchanged, random_mask, scored, thinned
from secateur.train.watching import Watched, mean_over_ranks
from secateur.train.weights import Layer, find_layers, fraction_of_zeros, unwrapped, warn_of_computed

if TYPE_CHECKING:
    from torch.optim import Optimizer

_FLOOR = 0.01
_LEAST = 1e-5
"""Fraction of a group that is one channel, rounded up."""


class Sparsifier:
    """Prunes ``model`` while it is trained; call ``step`` after every ``optimizer.step()``.

    ``method`` is a training method, and ``options`` are its own: ``secateur describe gmp`` lists them. ``include`` and
    ``exclude`` are patterns of parameter or module names (``head.*``): further weights that are pruned, and those that
    stay. ``masks`` are boolean by name, True = live, or a plan that has some: the training begins with them.
    ``resume`` is what ``state_dict`` gave or ``save`` wrote: no masks are made then, and weights that the model has
    from that time stay. ``schedule`` is a function step → sparsity in place of the method's.

    What leaves are single ``weights``, or with ``units="channels"`` coupled channels of the network, traced on
    ``example_inputs``: names are then those of groups, masks are [units], the sparsity counts channels, of which every
    group keeps at least one, and the plan cuts the network.

    Methods that prune before training look at ``data``, batches (inputs, class indices) or of whatever
    ``loss(module, batch)`` takes, or at ``example_inputs``. Over several ranks scores are averaged within
    ``process_group``. Without an ``optimizer`` every call of ``step`` counts, and nothing that optimizers remember is
    known.

    Of weights that are sharded over ranks (FSDP2) each rank holds its part of the masks. All ranks make this object,
    ``step``, and ask for masks, a plan or a state together. Where masks change, one layer is gathered after the other,
    or all of them at once where layers compete (``scope``) or exchange weights (``snfs``).

    Raises UsageError, DataError or NonFiniteError before anything is changed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        method: str = "gmp",
        units: str = "weights",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        masks: Mapping[str, Tensor] | Plan | None = None,
        resume: Mapping[str, Any] | str | Path | None = None,
        schedule: Schedule | None = None,
        data: Any = None,
        loss: Loss | None = None,
        example_inputs: Sequence[Any] | None = None,
        example_kwargs: Mapping[str, Any] | None = None,
        process_group: Any = None,
        **options: Any,
    ) -> None:
        self.method = training_method(method, options)
        check_module(model)
        check_patterns(include=include, exclude=exclude)
        self.model = unwrapped(model)
        # FSDP knows its own modules alone, and names are those of this one
        self._named = plainly_named(self.model)
        reshard(self.model)
        self._group = process_group
        self.sharded = any(isinstance(p, DTensor) for p in self.model.parameters())
        """whether some of the weights are sharded over ranks"""
        self._layers: dict[str, Layer] = {}
        self._channels: Channels | None = None
        if units == "channels":
            if self.sharded:
                raise UsageError("units='channels' traces the network, which is sharded over ranks: use DDP instead")
            example = Example(tuple(example_inputs or ()), example_kwargs)
            self._channels = Channels(self._named, self.method, example, include, exclude)
        elif units == "weights":
            self._layers = find_layers(
                self._named,
                include=include,
                exclude=exclude,
                keep_first=self.method.keep_first,
                depthwise=self.method.depthwise,
                sharded=not isinstance(self.method, StartingMethod),
            )
            warn_of_computed(self._named, (*include, *exclude))
        else:
            raise UsageError(f"units must be weights or channels, got {units!r}")
        self._updates = self.method.updates()
        self._schedule = checked_schedule(schedule) if schedule is not None else self.method.schedule()
        self._needed = set(self.method.needed()) if not isinstance(self.method, StartingMethod) else set()
        if resume is not None:
            # nothing is dead until the state says what is
            masks = {}
        if self._channels is None:
            self._check_target(masks)
        self._watched = None
        self._finished = False
        ones = self._channels.all_live() if self._channels is not None else self._pruned
        self._shapes = {name: tuple(tensor.shape) for name, tensor in ones.items()}
        self._sizes = {name: tensor.numel() for name, tensor in ones.items()}
        first, kept = self._first_masks(masks, Given(data, loss, example_inputs, example_kwargs))
        self._momentum: dict[str, Tensor] = {}
        self._step = 0
        self._dense_steps = 0
        self._kept_steps = dict.fromkeys(first, 0)
        self._log: list[Update] = []
        # the sparsity that masks were made for; what moves afterwards stays where it is until more is asked for
        self._reached = self._schedule(0) if self._begins_sparse else 0.0
        if optimizer is not None:
            self._watched = Watched(optimizer, self._pruned.values(), self._takes_back, self._looks)
        self._set(first, kept)
        self._warn_of_collapse(kept, dict.fromkeys(kept, 1))
        self._hold()
        if resume is not None:
            self._resume(resume)

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def steps_done(self) -> int:
        """How many steps the optimizer has taken."""
        return self._step

    @property
    def sparsity(self) -> float:
        """Fraction of the pruned weights, or channels, that is dead."""
        return 1.0 - sum(self._kept.values()) / sum(self._sizes.values())

    @property
    def sparsities(self) -> dict[str, float]:
        """The same of every weight, or group, by name."""
        return {name: 1.0 - self._kept[name] / size for name, size in self._sizes.items()}

    @property
    def target(self) -> float:
        """The sparsity of the schedule at this step."""
        return self._schedule(self._step)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Boolean masks by name, True = live; copies, on the device of the weight, whole where that is sharded."""
        return {name: self._whole(name, mask).clone() for name, mask in self._masks.items()}

    @property
    def log(self) -> list[Update]:
        """What every update did."""
        return list(self._log)

    # -- in the loop --------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Count a step that the optimizer has taken, keep dead weights dead, and move masks where that is due.

        Returns whether masks may have changed. Nothing happens when the optimizer has taken no step: while gradients
        are accumulated, or when a gradient scaler left it out. Raises NonFiniteError with the name of the layer, and
        UsageError after ``finish``.
        """
        if self._finished:
            raise UsageError(
                "this Sparsifier has given its plan by finish() and holds no masks any more: call plan() for a plan on"
                " the way, or make another one with masks=plan"
            )
        if self._watched is not None and not self._watched.taken():
            return False
        self._step += 1
        due = self._updates.due(self._step)
        if due and self._watched is not None:
            self._watched.take_back()
        self._hold()
        if "momentum" in self._needed:
            self._follow_gradients()
        if due:
            self._update()
        for name, kept in self._kept.items():
            self._kept_steps[name] += kept
        self._dense_steps += "momentum" in self._needed or (due and "gradient" in self._needed)
        if self._watched is not None:
            self._watched.forget()
        return due

    def mask_gradients(self) -> None:
        """Zero the gradients of dead weights, before they are clipped by norm, or seen by an optimizer that mixes
        entries (Adafactor, Muon). In steps whose gradients are needed to grow weights it does nothing."""
        if self._looks():
            return
        for name, weight in self._pruned.items():
            if weight.grad is not None:
                clear_dead(weight.grad, self._entries[name])

    def apply(self, module: nn.Module) -> None:
        """Zero in another module of the same names, such as an average of weights, what is dead here."""
        check_module(module)
        module = unwrapped(module)
        reshard(module)
        named = plainly_named(module)
        own: dict[str, Tensor] = {**dict(named.named_parameters()), **dict(named.named_buffers())}
        pruned = self._pruned
        for name, weight in pruned.items():
            if name not in own or own[name].shape != weight.shape:
                raise UsageError(f"the module has no parameter {name} of shape {list(weight.shape)} to mask")
        with torch.no_grad():
            for name, mask in self._entries.items():
                mine = part_of(whole_like(mask, pruned[name]), own[name])
                clear_dead(own[name], mine.to(own[name].device))

    def finish(self) -> Plan:
        """Let go of the optimizer and give the masks as a plan; weights hold the zeros, and nothing else is left."""
        self._finished = True
        if self._watched is not None:
            self._watched.release()
            self._watched = None
        return self.plan()

    def plan(self) -> Plan:
        """The masks as they are now as a plan of the model; ``secateur.apply`` lays it on any copy of it."""
        note = f"masks after {self._step} steps of training: apply the plan to the trained weights"
        if self._channels is not None:
            inputs = self._channels.example.recorded()
            return checkpoints.cutting_plan_of(self._named, self.method, self._masks, (note,), inputs)
        reshard(self.model)
        return checkpoints.plan_of(self._named, self.method, self.masks, (note,))

    def flops(self, *example_inputs: Any, **example_kwargs: Any) -> flops.Flops:
        """Effective operations on these inputs: of inference with the masks as they are, and of training so far."""
        if self._channels is not None:
            raise UsageError(
                "effective operations are those of sparse weights: apply the plan, and count the cut network's"
            )
        total, per_layer = flops.count(self._named, self._layers, example_inputs, example_kwargs)
        sizes = self._sizes
        now = {name: self._kept[name] / size for name, size in sizes.items()}
        steps = max(self._step, 1)
        mean = {
            name: self._kept_steps[name] / (size * steps) if self._step else now[name] for name, size in sizes.items()
        }
        return flops.effective(total, per_layer, now, mean, self._dense_steps / steps)

    # -- stopping and going on ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs beside model and optimizer; masks take one bit per weight.

        Of weights that are sharded it is the state of the whole, from which any number of ranks goes on.
        Tensors, numbers and text only, which torch reads with ``weights_only``. What is random follows from the seed
        among the options and the step.
        """
        return checkpoints.state_of(
            self.method,
            self._shapes,
            {name: pack_bits(self._whole(name, mask)) for name, mask in self._masks.items()},
            {name: self._whole(name, mean) for name, mean in self._momentum.items()},
            {"step": self._step, "dense_steps": self._dense_steps, "reached": self._reached},
            self._kept_steps,
            [asdict(update) for update in self._log],
            self._pace(),
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave, with the model and the optimizer that were saved with it.

        Load their states afterwards, or make this object with ``resume``: a method that begins at a random mask has
        laid it on the weights already. Raises UsageError when it belongs to another method, schedule or model.
        """
        found = checkpoints.read_state(state, self.method, self._shapes, self._pace())
        self._step, self._dense_steps = int(found.counters["step"]), int(found.counters["dense_steps"])
        self._reached = found.counters["reached"]
        self._kept_steps = dict(found.kept_steps)
        self._log = [Update(**entry) for entry in found.log]
        reshard(self.model)
        self._momentum = {
            name: self._mine(name, tensor.to(self._layers[name].weight.device)).clone()
            for name, tensor in found.momentum.items()
        }
        self._set(
            {name: self._mine(name, mask.to(self._masks[name].device)) for name, mask in found.masks.items()},
            {name: int(mask.sum()) for name, mask in found.masks.items()},
        )
        self._hold()

    def save(self, path: str | Path) -> Path:
        """Write the state to one safetensors file, all or nothing; of sharded weights the first rank does.

        Raises OutputError.
        """
        state = self.state_dict()
        if not self.sharded:
            return checkpoints.write_state(path, state)
        ranks = join()
        with ranks.together():
            ranks.on_main(lambda: str(checkpoints.write_state(path, state)))
        return Path(path)

    def load(self, path: str | Path) -> None:
        """Go on from a file that ``save`` wrote. Raises UsageError, or CorruptFileError."""
        self.load_state_dict(checkpoints.read_state_file(path))

    # -- how ----------------------------------------------------------------------------------------------------------

    def _check_target(self, masks: Mapping[str, Tensor] | Plan | None) -> None:
        if masks is not None:
            return
        final = max(self._schedule(self._updates.end or 0), self._schedule(0))
        zeros = fraction_of_zeros(self._layers)
        # a layer that starts at zero is no sparse network
        if final and zeros > final and zeros > 0.05:
            raise UsageError(
                f"{zeros:.1%} of the weights are zero already, which is more than the sparsity of {final:.1%} that is"
                " asked for: ask for more, or begin with these zeros by masks="
            )

    def _resume(self, given: Mapping[str, Any] | str | Path) -> None:
        try:
            self.load_state_dict(checkpoints.read_state_file(given) if isinstance(given, str | Path) else given)
        except BaseException:
            if self._watched is not None:
                self._watched.release()
            raise

    def _first_masks(self, given: Mapping[str, Tensor] | Plan | None, told: Given) -> tuple[Masks, dict[str, int]]:
        """(this rank's masks, how many entries of each live on all ranks)."""
        ones = {name: torch.ones_like(local(weight), dtype=torch.bool) for name, weight in self._pruned.items()}
        if self._channels is not None:
            ones = self._channels.all_live()
        if given is not None:
            return self._given_masks(ones, given.masks if isinstance(given, Plan) else given)
        if isinstance(self.method, StartingMethod):
            masks = starting_masks(self.method, self._named, self._layers, told, self._reduce)
            return masks, _counted(masks)
        start = self._schedule(0)
        if not self._begins_sparse:
            return ones, dict(self._sizes)
        found: Masks = {}
        kept: dict[str, int] = {}
        drawn = self.method.random_start()
        counts = kept_counts(self._shapes, start, drawn) if drawn else {}
        for names in self._fields(alone=bool(drawn)):
            parts = {name: self._part(name, self._whole(name, ones[name]), 0) for name in names}
            if drawn:
                masks = {name: random_mask(part, counts[name]) for name, part in parts.items()}
            else:
                scores = scored(parts, self.method.score, self._reduce, "scores")
                masks = self._thinned(parts, scores, start)
            found |= {name: self._mine(name, mask) for name, mask in masks.items()}
            kept |= _counted(masks)
        return found, kept

    def _fields(self, *, alone: bool = False) -> list[list[str]]:
        """Names of what is decided together: each layer by itself where it can be, and gathered by itself then."""
        names = list(self._shapes)
        return [[name] for name in names] if alone or decides_alone(self.method) else [names]

    def _mine(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of the whole mask, or of what is shaped like it."""
        return part_of(tensor, self._layers[name].weight) if name in self._layers else tensor

    def _whole(self, name: str, part: Tensor) -> Tensor:
        """Inverse of ``_mine``."""
        return whole_like(part, self._layers[name].weight) if name in self._layers else part

    @property
    def _pruned(self) -> dict[str, Tensor]:
        """What masks lie on, by name."""
        if self._channels is not None:
            return self._channels.tensors
        return {name: layer.weight for name, layer in self._layers.items()}

    @property
    def _begins_sparse(self) -> bool:
        # before the first step there are no gradients to score by
        by_score = self._updates.due(0) and not self._needed
        return self._schedule(0) > 0 and (bool(self.method.random_start()) or by_score)

    def _given_masks(self, ones: Masks, given: Mapping[str, Tensor]) -> tuple[Masks, dict[str, int]]:
        for name, mask in given.items():
            if name not in ones or tuple(mask.shape) != self._shapes[name] or mask.dtype != torch.bool:
                raise UsageError(
                    f"masks: {name} is no weight that is pruned here, or its mask isn't boolean and shaped so"
                )
        masks = {
            name: self._mine(name, given[name].to(one.device)).clone() if name in given else one
            for name, one in ones.items()
        }
        kept = {**self._sizes, **_counted(given)}
        there = 1.0 - sum(kept.values()) / sum(self._sizes.values())
        final = self._schedule(self._updates.end or 0)
        if there > final + 1e-6:
            raise UsageError(
                f"the masks that were given have a sparsity of {there:.1%}, which is more than the {final:.1%} that is"
                " asked for: ask for more"
            )
        return masks, kept

    def _set(self, masks: Masks, kept: Mapping[str, int]) -> None:
        """This rank's masks, and how many entries of each live on all ranks."""
        self._masks = masks
        self._entries = masks if self._channels is None else self._channels.entries(masks)
        # counted once, and not at every step
        self._kept = dict(kept)
        self._thin = [name for name, mask in self._entries.items() if not bool(mask.all())]

    def _hold(self) -> None:
        """Dead weights are zero, and what the optimizer remembers of them."""
        if self.sharded:
            reshard(self.model)
        pruned = self._pruned
        for name in self._thin:
            weight, mask = pruned[name], self._entries[name]
            clear_dead(weight.data, mask)
            if self._watched is not None:
                self._watched.mask(weight, mask)

    def _takes_back(self) -> bool:
        """Whether the next step is one that the method doesn't take."""
        step = self._step + 1
        return self.method.skips and self._updates.due(step) and self.method.rate(step) > 0

    def _looks(self) -> bool:
        """Whether the gradients of the next step are wanted."""
        return "momentum" in self._needed or ("gradient" in self._needed and self._updates.due(self._step + 1))

    def _gradient(self, name: str) -> Tensor:
        weight = self._layers[name].weight
        found = self._seen_gradient(weight)
        if found is None and all(self._seen_gradient(layer.weight) is None for layer in self._layers.values()):
            raise UsageError(
                f"{self.method.name} looks at gradients, and {name} has none at step {self._step}: call"
                " sparsifier.step() after optimizer.step() and before optimizer.zero_grad()"
            )
        # an expert that no token went to, or a layer that was frozen meanwhile
        return torch.zeros_like(local(weight), dtype=torch.float32) if found is None else local(found).float()

    def _seen_gradient(self, weight: Tensor) -> Tensor | None:
        return weight.grad if self._watched is None else self._watched.gradient(weight)

    def _follow_gradients(self) -> None:
        smoothing = self.method.smoothing()
        for name in self._layers:
            mean = self._momentum.setdefault(name, torch.zeros_like(self._gradient(name)))
            mean.mul_(smoothing).add_(self._gradient(name), alpha=1.0 - smoothing)

    def _part(self, name: str, mask: Tensor, step: int) -> Trained:
        """The whole of a layer as methods see it, with its whole mask."""
        if self._channels is not None:
            return self._channels.part(name, mask, step, self.method.seed)
        told: dict[str, Any] = {}
        if step and "gradient" in self._needed:
            told["gradient"] = self._whole(name, self._gradient(name))
        if step and "momentum" in self._needed:
            told["momentum"] = self._whole(name, self._momentum[name])
        weight = whole(self._layers[name].weight)
        weight = weight if weight.dtype == torch.float64 else weight.float()
        return Trained(name, weight, mask, step=step, seed=self.method.seed, **told)

    def _update(self) -> None:
        target = self._schedule(self._step)
        asked = target > self._reached
        # what is sparse enough as a whole has its weights where they are
        thins = asked and sum(self._kept.values()) > fewest_kept(sum(self._sizes.values()), target)
        found: Masks = {}
        staying: Masks = {}
        kept: dict[str, int] = {}
        exchanges = 0
        for names in self._fields():
            parts = {name: self._part(name, self._whole(name, self._masks[name]), self._step) for name in names}
            scores = scored(parts, self.method.score, self._reduce, "scores")
            thin = self._thinned(parts, scores, target) if thins else {name: part.mask for name, part in parts.items()}
            masks, moved = exchanged(self.method, parts, thin, scores, self._step, self._reduce)
            # what grows begins at zero, unless it has left in the same exchange
            staying |= {name: self._mine(name, thin[name] & mask) for name, mask in masks.items()}
            found |= {name: self._mine(name, mask) for name, mask in masks.items()}
            kept |= _counted(masks)
            exchanges += moved
        self._reached = target if asked else self._reached
        self._warn_of_collapse(kept, self._kept)
        self._set(staying, kept)
        self._hold()
        self._set(found, kept)
        self._log.append(Update(self._step, target, self.sparsity, exchanges))

    def _thinned(self, parts: Mapping[str, Trained], scores: Masks, sparsity: float) -> Masks:
        # a network without any channel of a group can't be cut
        least = 0.0 if self._channels is None else _LEAST
        return thinned(self.method, self._layers, parts, scores, sparsity, least)

    def _warn_of_collapse(self, kept: Mapping[str, int], before: Mapping[str, int]) -> None:
        empty = [name for name, count in kept.items() if before[name] and not count]
        if empty:
            warnings.warn(
                f"nothing is left of {', '.join(empty)} after step {self._step}, so that nothing passes there:"
                f" floor={_FLOOR} keeps that fraction of every layer",
                stacklevel=4,
            )

    def _reduce(self, tensor: Tensor) -> Tensor:
        return mean_over_ranks(tensor, self._group)

    def _pace(self) -> list[float]:
        """The schedule at some steps, by which another one is told from it."""
        end = self._updates.end or self._updates.begin
        return [self._schedule(step) for step in (0, self._updates.begin, (self._updates.begin + end) // 2, end)]


def _counted(masks: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}
