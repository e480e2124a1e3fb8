"""A lottery with several seeds, and what it shows: tickets against their controls."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import UsageError
from secateur.rounds.levels import Entry
from secateur.rounds.rounds import Network, Progress, Rounds
from secateur.rounds.run import EvaluateFunction, TrainFunction


@dataclass(frozen=True)
class Row:
    """One metric of a branch at a level: ``values`` by seed, and the mean fraction of weights that is left."""

    level: int
    branch: str
    remaining: float
    values: dict[int, float]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.values.values())

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for a single one."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Lottery:
    """What ``secateur.lottery`` gives: ``rounds`` by seed hold levels, masks, tickets and trained networks."""

    rounds: dict[int, Rounds]

    @property
    def entries(self) -> list[Entry]:
        """Every training that is done."""
        return [entry for rounds in self.rounds.values() for entry in rounds.entries]

    def rows(self, metric: str = "accuracy") -> list[Row]:
        """One metric by level and branch. Raises UsageError where no training gave it."""
        return rows_of(self.entries, metric)


def rows_of(entries: Sequence[Entry], metric: str) -> list[Row]:
    """See ``Lottery.rows``."""
    known = sorted({name for entry in entries for name in entry.metrics})
    if metric not in known:
        raise UsageError(f"no training gave '{metric}'; there are {', '.join(known) or 'no numbers at all'}")
    found: dict[tuple[int, str], list[Entry]] = {}
    for entry in entries:
        if metric in entry.metrics:
            found.setdefault((entry.level, entry.branch), []).append(entry)
    return [
        Row(level, branch, statistics.fmean(e.remaining for e in same), {e.seed: e.metrics[metric] for e in same})
        for (level, branch), same in sorted(found.items(), key=lambda item: item[0][0])
    ]


def lottery(
    network: Network,
    train: TrainFunction,
    *,
    method: str = "lottery_ticket",
    evaluate: EvaluateFunction | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    seeds: Sequence[int] = (0,),
    controls: Sequence[str] = (),
    at: Sequence[int] | None = None,
    keep_weights: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress | Callable[[str, int, int], Any] = lambda *_: None,
    **options: Any,
) -> Lottery:
    """Train, prune and rewind ``network`` level by level, once per seed, and the controls of every level.

    ``network`` is a function that makes the network, or a network, whose weights then are the first ones for all
    seeds. ``train(network, run)`` is your own training: it trains in place over ``run.steps(total)`` with batches in
    an order that follows from ``run.seed``, and may return numbers by name. Weights that were removed stay zero
    through any optimizer of torch. ``evaluate(network)`` gives numbers by name, such as ``{"accuracy": 97.2}``.

    ``method`` is ``lottery_ticket``, ``lottery_rewind`` or ``sap``, and ``options`` are its own. ``controls`` are some
    of ``reinit`` (the mask on a new draw), ``shuffle`` (places within every layer), ``shuffle_all`` and ``even``;
    ``at`` are the levels that have them. Levels are kept in ``folder``, a folder per seed; ``resume`` goes on after the
    last that is done, also with more levels. Raises UsageError, OptionError or OutputError.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds must be different numbers, at least one, got {list(seeds)}")
    made = {
        seed: Rounds(
            network,
            train,
            method=method,
            evaluate=evaluate,
            folder=Path(folder) / f"seed-{seed}" if folder is not None else None,
            resume=resume,
            keep_weights=keep_weights,
            include=include,
            exclude=exclude,
            seed=seed,
            **options,
        )
        for seed in seeds
    }
    for rounds in made.values():
        rounds.run(controls, at, progress)
    return Lottery(made)
