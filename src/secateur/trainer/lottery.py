"""Lottery tickets from a recipe: levels x seeds x controls, each a training of its own, wherever there is room.

A recipe of a training with one more key:

    lottery: {levels: 12, seeds: [0, 1, 2], controls: [reinit, shuffle]}

``method`` is ``lottery_ticket``, ``lottery_rewind`` or ``sap``; every other key is one of its options. A level begins
when the one before it is done, and its controls when it is done itself; seeds know nothing of each other.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from secateur.errors import OutputError, RecipeError, SecateurError, SweepError, UsageError, nearest, unforeseen
from secateur.files import write_text
from secateur.loop import Progress
from secateur.methods import get_method
from secateur.reading import read_json
from secateur.recipes import read_recipe
from secateur.rounds import CONTROLS, Entry, Rounds, Run, rounds_methods
from secateur.rounds.rounds import rounds_method
from secateur.sweep.pools import Pool, Task
from secateur.sweep.worker import Failure
from secateur.train.weights import find_layers
from secateur.trainer.examples import Examples, load_examples
from secateur.trainer.networks import first_network, open_network
from secateur.trainer.recipe import Open, TrainRecipe, checked_recipe, trusted
from secateur.trainer.training import train

TICKET = "ticket"
ABOUT = "lottery.json"
"""what was asked for, in the folder of a lottery; by it one is known"""
RESULTS = ("results.json", "results.csv", "lottery.html")
RETRIES = 2


class LotterySpec(Open):
    """The value of ``lottery``; every key that isn't here is an option of the method."""

    method: str = "lottery_ticket"
    levels: int = Field(default=10, ge=1)
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    controls: list[str] = Field(default_factory=list)
    at: list[int] | None = None
    include: list[str] = Field(default_factory=list)
    exclude: list[str] = Field(default_factory=list)

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("seeds are different numbers from 0 on")
        return seeds

    @model_validator(mode="after")
    def _known(self) -> LotterySpec:
        for name in self.controls:
            if name not in CONTROLS:
                raise ValueError(f"controls are {', '.join(CONTROLS)}, got '{name}'{nearest(name, CONTROLS)}")
        if self.method not in rounds_methods():
            raise ValueError(
                f"method is one of {', '.join(rounds_methods())}, got '{self.method}'"
                f"{nearest(self.method, rounds_methods())}"
            )
        for level in self.at or ():
            if not 0 < level <= self.levels:
                raise ValueError(f"at are levels from 1 to {self.levels}, got {level}")
        if "seed" in self.options:
            raise ValueError("seeds says which seeds there are: leave seed out")
        return self

    def method_options(self, steps: int) -> dict[str, Any]:
        """The options of the method, which knows the length of a training where it asks for it."""
        told = {"steps": steps} if "steps" in get_method(self.method).option_fields() else {}
        return {**told, **self.options, "levels": self.levels}


class LotteryRecipe(TrainRecipe):
    """A training, and how often."""

    lottery: LotterySpec

    @model_validator(mode="after")
    def _one_way(self) -> LotteryRecipe:
        self.check_repeated("a lottery removes weights between trainings")
        pretrained = self.data.text is not None and self.model.start != "random"
        if "reinit" in self.lottery.controls and (pretrained or self.model.start == "pretrained"):
            raise ValueError("the control reinit draws the network anew, and this one starts pretrained")
        return self

    def check(self) -> None:
        super().check()
        # where the length isn't known yet it is long
        rounds_method(self.lottery.method, self.lottery.method_options(self.steps or 1_000_000_000))


def load_lottery_recipe(path: str | Path, *, trust_remote_code: bool = False, **given: Any) -> LotteryRecipe:
    """Read and validate a recipe; ``given`` replaces keys of it. Raises UsageError with the file and the place.

    Code that the file names is refused unless ``trust_remote_code`` is set.
    """
    return trusted(make_lottery_recipe({**read_recipe(path), **given}, str(path)), path, trust_remote_code)


def make_lottery_recipe(data: Mapping[str, Any], where: str) -> LotteryRecipe:
    """A validated recipe from plain values; ``where`` names their origin in errors. Raises UsageError."""
    if "lottery" not in data:
        raise RecipeError(f"{where} has no key 'lottery', which says how many levels, seeds and controls there are")
    return checked_recipe(LotteryRecipe, data, where)


@dataclass(frozen=True)
class Trial:
    """One training: the ticket of a level, or a control of it."""

    seed: int
    level: int
    branch: str = TICKET

    @property
    def name(self) -> str:
        return f"seed {self.seed}, level {self.level}, {self.branch}"


@dataclass(frozen=True)
class LotteryJob:
    """What every worker is told. ``folder`` is that of the lottery, seen from ``directory``."""

    recipe: LotteryRecipe
    folder: str
    directory: str
    plugins: tuple[str, ...] = ()
    trust_remote_code: bool = False

    @property
    def device(self) -> str:
        """Where workers compute."""
        return self.recipe.device


class LotteryWorker:
    """Runs trials in this process; data are read when the first one comes."""

    def __init__(self, job: LotteryJob) -> None:
        self._job = job
        self._opened: tuple[Any, Examples] | None = None
        self._rounds: dict[int, Rounds] = {}

    def run(self, trial: Trial) -> Entry | Failure:
        """What came of a trial. Never raises what a trial may do wrong."""
        try:
            rounds = self.rounds(trial.seed)
            return rounds.level(trial.level) if trial.branch == TICKET else rounds.control(trial.level, trial.branch)
        except SecateurError as error:
            return Failure(str(error), final=not isinstance(error, OutputError))
        except Exception as error:
            return Failure(unforeseen(error), final=False)

    def check(self) -> None:
        """Read data and network, and see that there is something to prune, before anything is written.

        Raises UsageError, DataError or ModelError.
        """
        recipe, spec = self._job.recipe, self._job.recipe.lottery
        examples = self._open()[1]
        rounds_method(spec.method, spec.method_options(recipe.length(examples.count)))
        find_layers(self._open()[0], include=spec.include, exclude=spec.exclude)

    def _open(self) -> tuple[Any, Examples]:
        """(the network, what it is trained on)."""
        if self._opened is None:
            recipe = self._job.recipe
            opened = open_network(recipe, trust_remote_code=self._job.trust_remote_code)
            self._opened = opened.module, load_examples(recipe, opened.module, opened.tokenizer)
        return self._opened

    def rounds(self, seed: int) -> Rounds:
        """The rounds of a seed, as far as they are done. Raises what ``check`` raises."""
        if seed not in self._rounds:
            recipe, spec = self._job.recipe, self._job.recipe.lottery
            network, examples = self._open()
            self._rounds[seed] = Rounds(
                first_network(recipe, network, trust_remote_code=self._job.trust_remote_code),
                lambda network, run: _train(network, run, recipe, examples),
                method=spec.method,
                folder=Path(self._job.folder) / f"seed-{seed}",
                resume=True,
                include=spec.include,
                exclude=spec.exclude,
                seed=seed,
                **spec.method_options(recipe.length(examples.count)),
            )
        return self._rounds[seed]


def _train(network: Any, run: Run, recipe: LotteryRecipe, examples: Examples) -> dict[str, float]:
    """The training of a run; what was measured at its end, and when the loss on the test was lowest."""
    curve = train(network, examples, recipe, first=run.first_step, last=run.last_step, seed=run.seed).curve
    step, lowest = min(((step, numbers["loss"]) for step, numbers in curve.measured), key=lambda pair: pair[1])
    return {**curve.measured[-1][1], "lowest loss": lowest, "step of the lowest loss": run.first_step + step}


@dataclass
class Tickets:
    """What a lottery has given so far; ``failed`` are trials that failed for good, with the reason."""

    recipe: LotteryRecipe
    entries: list[Entry] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    reused: int = 0

    @property
    def quality(self) -> str:
        """The number that counts."""
        return "perplexity" if self.recipe.data.text is not None else "accuracy"


def trials_of(spec: LotterySpec) -> list[Trial]:
    """All trainings, in the order in which they are wanted."""
    at = range(1, spec.levels + 1) if spec.at is None else spec.at
    return [
        Trial(seed, level, branch)
        for level in range(spec.levels + 1)
        for seed in spec.seeds
        for branch in (TICKET, *(spec.controls if level in at else ()))
    ]


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds something else, or a lottery of which nothing was said. Raises OutputError."""
    if (folder / ABOUT).is_file():
        if not (resume or overwrite):
            raise OutputError(f"{folder} holds a lottery: pass --resume to go on with it, or --overwrite to begin anew")
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        # not even --overwrite: what lies there is not ours
        raise OutputError(f"{folder} exists and holds no lottery: choose another folder")


def open_folder(recipe: LotteryRecipe, folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the folder of a lottery, or go on with it. Raises OutputError, before anything is trained."""
    check_folder(folder, resume=resume, overwrite=overwrite)
    changing = {"levels", "seeds", "controls", "at"}
    asked = recipe.model_dump(mode="json", exclude={"out": True, "lottery": changing})
    if (folder / ABOUT).is_file() and resume:
        before = read_json(folder / ABOUT, OutputError)
        for key in sorted({*before, *asked}):
            if before.get(key) != asked.get(key):
                raise OutputError(
                    f"{folder} holds a lottery with another {key} ({before.get(key)!r} then, {asked.get(key)!r} now):"
                    " choose another folder, or pass --overwrite"
                )
        return
    for path in [*folder.glob("seed-*"), *(folder / name for name in (ABOUT, *RESULTS))]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_text(folder / ABOUT, json.dumps(asked, indent=1) + "\n")


def run_lottery(recipe: LotteryRecipe, pool: Pool, worker: LotteryWorker, progress: Progress) -> Tickets:
    """Run what isn't done. A trial that fails is tried again, at most twice; what waits for it is left then.

    ``worker`` is one of this process, which reads what is there. Raises what makes all trials impossible.
    """
    wanted = trials_of(recipe.lottery)
    entries = [entry for seed in recipe.lottery.seeds for entry in worker.rounds(seed).entries]
    there = {Trial(entry.seed, entry.level, entry.branch): entry for entry in entries}
    schedule = _Schedule(wanted, {trial: there[trial] for trial in wanted if trial in there})
    found = Tickets(recipe, reused=len(schedule.done))
    busy = 0
    while True:
        progress("trainings", len(schedule.done), len(wanted))
        while pool.free and (task := schedule.next()) is not None:
            pool.submit(task)
            busy += 1
        if not busy:
            break
        task, outcome = pool.next()
        busy -= 1
        if not isinstance(outcome, Failure):
            schedule.done[task.point] = outcome
        elif outcome.final or task.attempt > RETRIES:
            found.failed[task.point.name] = outcome.error
        else:
            found.notes.append(f"{task.point.name} is tried again: {outcome.error}")
            schedule.again.append(Task(task.point, task.attempt + 1))
    found.entries = [schedule.done[trial] for trial in wanted if trial in schedule.done]
    return found


class _Schedule:
    """Which trial is next: what failed comes first, then in their order those for which all is there."""

    def __init__(self, wanted: Sequence[Trial], done: dict[Trial, Entry]) -> None:
        self.done, self.again = done, list[Task]()
        self._left = [trial for trial in wanted if trial not in done]

    def next(self) -> Task | None:
        """The task that may start now, if there is one."""
        if self.again:
            return self.again.pop(0)
        trial = next((trial for trial in self._left if self._ready(trial)), None)
        if trial is None:
            return None
        self._left.remove(trial)
        return Task(trial)

    def _ready(self, trial: Trial) -> bool:
        # a ticket needs the level before, a control its ticket
        before = Trial(trial.seed, trial.level - (trial.branch == TICKET))
        return before.level < 0 or before in self.done


def make_job(recipe: LotteryRecipe, folder: Path, *, plugins: tuple[str, ...], trust_remote_code: bool) -> LotteryJob:
    """What the workers are told."""
    return LotteryJob(recipe, str(folder.absolute()), os.getcwd(), plugins, trust_remote_code)


def check_complete(found: Tickets) -> None:
    """Say after everything else what is missing. Raises SweepError."""
    if found.failed:
        name, error = next(iter(found.failed.items()))
        raise SweepError(
            f"{len(found.failed)} training{'s' if len(found.failed) > 1 else ''} failed, the first of them {name}:"
            f" {error.rstrip('.')}; --resume tries again"
        )
    if not found.entries:
        raise UsageError("nothing was trained")
