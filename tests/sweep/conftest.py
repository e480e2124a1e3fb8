"""Sweeps of a tiny model, and plugins that fail on purpose."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from secateur.methods import plugins, registry
from secateur.sweep.pools import InSequence, Pool
from secateur.sweep.runner import Results, make_job, open_journal, run_sweep
from secateur.sweep.spec import Sweep, make_sweep

QUICK: dict[str, Any] = {"calibration": {"samples": 2, "length": 32}, "windows": 2}

# a magnitude that, at one sparsity and once, ends in the way that HOW says
FAULTY = '''
import os
from dataclasses import dataclass

from secateur.methods import get_method, register

Magnitude = get_method("magnitude")


@register("faulty")
@dataclass(frozen=True, kw_only=True)
class Faulty(Magnitude):
    """Magnitude that fails."""

    def score(self, target, seen):
        if self.sparsity == 0.5 and attempts({marker!r}) < {times}:
            {how}
        return super().score(target, seen)


def attempts(marker):
    """How often this was called before, in whatever process."""
    with open(marker, "a") as file:
        file.write("x")
        file.flush()
        return file.tell() - 1
'''


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """The file of a plugin whose method ``faulty`` runs the statement ``how`` at sparsity 0.5, so many times."""

    def make(how: str, times: int = 1) -> str:
        path = tmp_path / "faulty.py"
        path.write_text(FAULTY.format(marker=str(tmp_path / "attempts"), times=times, how=how), encoding="utf8")
        plugins.load_plugin(str(path))
        return str(path)

    modules = set(sys.modules)
    yield make
    registry._registered.pop("faulty", None)
    for name in set(sys.modules) - modules:
        if name.startswith("secateur_plugin_"):
            del sys.modules[name]


@pytest.fixture
def sweep_of(tiny_checkpoint: Path) -> Callable[..., Sweep]:
    """A sweep of the tiny checkpoint: ``sweep_of(grid={...})``; other arguments are keys of the recipe."""

    def make(grid: Any = None, search: Any = None, **recipe: Any) -> Sweep:
        kind = {"grid": grid} if search is None else {"search": search}
        retries = {"retries": recipe.pop("retries")} if "retries" in recipe else {}
        return make_sweep({"model": str(tiny_checkpoint), **QUICK, **recipe, "sweep": {**kind, **retries}}, "recipe")

    return make


@pytest.fixture
def run_in(tmp_path: Path) -> Callable[..., Results]:
    """Run a sweep in ``tmp_path / "out"``; ``pool`` makes the pool of a job."""

    def run(
        sweep: Sweep, *, resume: bool = False, pool: Callable[..., Pool] = InSequence, plugins: tuple[str, ...] = ()
    ) -> Results:
        folder = tmp_path / "out"
        job = make_job(sweep, folder, trust_remote_code=False, plugins=plugins)
        journal, finished = open_journal(folder, job, resume=resume, overwrite=False)
        opened = pool(job)
        try:
            return run_sweep(sweep, opened, journal, finished, lambda stage, done, total: None)
        finally:
            opened.close()

    return run
