"""How stable training is: two copies from one state, trained in different orders, and the line between them.

    theta_k <- training of theta_0 until step k
    W_1, W_2 <- trainings of m * theta_k from k on, with batches in different orders
    instability = barrier between W_1 and W_2; stable below 2 % of error

Networks have lottery tickets from about the step on from which they are stable.

Source: J. Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis", ICML 2020, arXiv:1912.05671.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.criteria import named_generator
from secateur.drawing import seeded
from secateur.errors import CorruptFileError, UsageError
from secateur.files import check_output, write_text
from secateur.plans import Plan
from secateur.reading import read_json
from secateur.rounds.connecting import Curve, Distance, connect, distance
from secateur.rounds.levels import load_masks
from secateur.rounds.run import START, EvaluateFunction, Run, TrainFunction, trained
from secateur.tensorfiles import tensors_of

FORMAT = 1
ABOUT = "stability.json"
STABLE = 2.0
"""Instability below which the paper calls a network stable, in per cent of error."""

Progress = Callable[[str, int, int], Any]


@dataclass(frozen=True)
class Instability:
    """What came of two copies that parted at ``step``: a curve by metric, and how far apart they ended."""

    step: int
    curves: dict[str, Curve]
    l2: float
    angle: float

    @property
    def barriers(self) -> dict[str, float]:
        """The barrier of every metric, in its unit."""
        return {name: curve.barrier for name, curve in self.curves.items()}

    def stable(self, metric: str = "accuracy", within: float = STABLE) -> bool:
        """Whether the barrier is below ``within``, in the unit of the metric."""
        return self.curves[metric].barrier < within


@dataclass(frozen=True)
class Stability:
    """All steps that were looked at, ascending, and how it was done."""

    found: tuple[Instability, ...]
    protocol: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, step: int) -> Instability:
        return next(one for one in self.found if one.step == step)

    def onset(self, metric: str = "accuracy", within: float = STABLE) -> int | None:
        """The first of the steps from which on all are stable; None when the last one isn't."""
        first = None
        for one in reversed(self.found):
            if not one.stable(metric, within):
                break
            first = one.step
        return first


def instability(
    network: nn.Module | Callable[[], nn.Module],
    train: TrainFunction,
    evaluate: EvaluateFunction,
    *,
    at: Sequence[int] = (0,),
    length: int = 0,
    masks: Mapping[str, Tensor] | Plan | str | Path | None = None,
    points: int = 30,
    statistics: str = "recompute",
    data: Iterable[Any] | None = None,
    seed: int = 0,
    orders: tuple[int, int] | None = None,
    higher_is_better: Mapping[str, bool] | None = None,
    about: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> Stability:
    """Train two copies of ``network`` from each of the steps ``at``, and look at the line between them.

    ``network``, ``train(network, run)`` and ``evaluate(network)`` are as for ``secateur.lottery``: a training goes over
    ``run.steps(total)`` with batches in the order of ``run.seed``. ``length`` is that of a whole training, by which it
    is checked that it starts where it should. ``masks`` (boolean by the name of the weight, a plan, or the folder of
    a plan or of a level of a lottery) hold in both copies. ``points``, ``statistics`` (of batch norms, on ``data``) and
    ``higher_is_better`` are those of ``rounds.connecting.connect``. ``orders`` are the seeds of both copies, by default
    such that follow from ``seed`` and the step. Steps that are done are kept in ``folder``; ``resume`` goes on behind
    them, ``overwrite`` begins anew. ``about`` are values for JSON, by name, on which the result depends too: ``resume``
    refuses to go on with others.

    Raises UsageError when steps are no steps, when masks don't fit, or when the training doesn't do what it is told, as
    when copies with different seeds are the same; DataError, OutputError, NonFiniteError.
    """
    steps = _checked_steps(at, length)
    made = _made(network, seed)
    held = _fitting(_masks(masks, made), made)
    protocol = {
        "points": points,
        "statistics": statistics,
        "seed": seed,
        "orders": list(orders) if orders is not None else None,
        "length": length,
        "live": {name: int(mask.sum()) for name, mask in held.items()},
        **(about or {}),
    }
    kept = _Kept(Path(folder), protocol, resume, overwrite) if folder is not None else None
    found = []
    for done, step in enumerate(steps):
        progress("copies", done, len(steps))
        one = kept.read(step) if kept is not None else None
        if one is None:
            start = copy.deepcopy(made)
            if step:
                trained(start, train, Run(seed, 0, START, 0, step))
            copies = _copies(start, train, held, step, length, orders or _orders(seed, step))
            curves = connect(
                *copies, evaluate,
                points=points, statistics=statistics, data=data, higher_is_better=higher_is_better,
            )  # fmt: skip
            apart = _distance(*copies, held)
            one = Instability(step, curves, apart.l2, apart.angle)
            if kept is not None:
                kept.write(one)
        found.append(one)
    progress("copies", len(steps), len(steps))
    return Stability(tuple(found), protocol)


def _copies(
    start: nn.Module, train: TrainFunction, masks: Mapping[str, Tensor], step: int, length: int, orders: tuple[int, int]
) -> tuple[nn.Module, nn.Module]:
    """Both trained copies."""
    first, second = copy.deepcopy(start), start
    taken = 0
    for number, (module, order) in enumerate(zip((first, second), orders, strict=True), start=1):
        run = Run(order, 0, f"copy-{number}", step, length or None, masks)
        _, taken = trained(module, train, run, length)
    mine, theirs = tensors_of(first), tensors_of(second)
    if taken and orders[0] != orders[1] and all(torch.equal(mine[name], theirs[name]) for name in mine):
        raise UsageError(
            "both copies are the same to the bit: the training function must take its batches in an order that follows"
            " from run.seed"
        )
    return first, second


def _distance(first: nn.Module, second: nn.Module, masks: Mapping[str, Tensor]) -> Distance:
    """Between the live weights, or between all parameters of dense networks."""
    if masks:
        return distance(tensors_of(first), tensors_of(second), masks)
    return distance(dict(first.named_parameters()), dict(second.named_parameters()))


def _orders(seed: int, step: int) -> tuple[int, int]:
    first, second = (named_generator(f"copy {n}@{step}", seed).initial_seed() % 2**31 for n in (1, 2))
    return first, second


def _made(network: nn.Module | Callable[[], nn.Module], seed: int) -> nn.Module:
    if isinstance(network, nn.Module):
        return copy.deepcopy(network)
    with seeded(named_generator("first weights", seed).initial_seed()):
        return network()


def _masks(masks: Mapping[str, Tensor] | Plan | str | Path | None, module: nn.Module) -> Mapping[str, Tensor]:
    if isinstance(masks, str | Path):
        return load_masks(masks, module)
    return masks.masks if isinstance(masks, Plan) else masks or {}


def _fitting(masks: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    own = dict(module.named_parameters())
    for name, mask in masks.items():
        if name not in own or own[name].shape != mask.shape or mask.dtype != torch.bool:
            raise UsageError(f"masks: {name} is no weight of this network, or its mask isn't boolean and shaped so")
    return dict(masks)


def _checked_steps(at: Sequence[int], length: int) -> list[int]:
    bad = [step for step in at if step < 0 or (length and step > length)]
    if not at or bad:
        what = f"got {bad[0]}" if bad else "got none"
        raise UsageError(f"copies part at steps from 0 to the end of the training, {what}")
    return sorted(set(at))


class _Kept:
    """A folder with one JSON file per step."""

    def __init__(self, folder: Path, protocol: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
        self._folder = folder
        about = {"format": FORMAT, **protocol}
        if resume and (folder / ABOUT).is_file():
            there = read_json(folder / ABOUT, CorruptFileError)
            for key, value in about.items():
                if not isinstance(there, dict) or there.get(key) != value:
                    raise UsageError(
                        f"{folder} was begun with another {key}: go on with the options that it began with, or choose"
                        " another folder"
                    )
        else:
            # what lies in a folder that isn't ours stays
            if not (overwrite and (folder / ABOUT).is_file()):
                check_output(folder)
            for path in folder.glob("step-*.json"):
                path.unlink()
            write_text(folder / ABOUT, json.dumps(about, indent=1) + "\n")

    def read(self, step: int) -> Instability | None:
        path = self._path(step)
        if not path.is_file():
            return None
        try:
            told = read_json(path, CorruptFileError)
            return Instability(**{**told, "curves": {name: _curve(one) for name, one in told["curves"].items()}})
        except (TypeError, KeyError, AttributeError) as error:
            raise CorruptFileError(f"{path} isn't what was written here: {error}") from None

    def write(self, one: Instability) -> None:
        write_text(self._path(one.step), json.dumps(dataclasses.asdict(one), indent=1) + "\n")

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}.json"


def _curve(told: Mapping[str, Any]) -> Curve:
    return Curve(**{**told, "alphas": tuple(told["alphas"]), "values": tuple(told["values"])})
