"""What the ranks of the data-parallel tests do; every function here runs in a process group (see ``ranks.py``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import secateur as sc
from secateur.errors import NonFiniteError, OutputError, RankError, SecateurError, UsageError
from secateur.observe import Cross, Gram, Lost, Moments, SequenceMoments, Similarity, SumSquares
from secateur.observe.driver import BlockWalk
from secateur.ranks import Ranks, join
from secateur.runs.folder import DiskKeeper

STATISTICS = {
    "cross": Cross,
    "gram": Gram,
    "lost": Lost,
    "moments": Moments,
    "sequences": SequenceMoments,
    "pair": Similarity,
    "squares": SumSquares,
}


@contextmanager
def counted_windows() -> Iterator[list[int]]:
    """The number of windows in every call of a block, the first call left out: it only asks what blocks return."""
    calls: list[int] = []
    real = LlamaDecoderLayer.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(hidden_states))
        return real(self, hidden_states, *args, **kwargs)

    LlamaDecoderLayer.forward = forward
    try:
        yield calls
        del calls[:1]
    finally:
        LlamaDecoderLayer.forward = real


def prune(rank: int, recipes: Mapping[str, dict[str, Any]], notes: Path, statistics: Path | None = None) -> None:
    """Run every recipe on the ranks together, and note what this one did."""
    for name, recipe in recipes.items():
        with counted_windows() as calls:
            report = sc.run(recipe, statistics=statistics)
        note = {"windows": sum(calls), "largest": max(calls, default=0), "achieved": report.achieved}
        (notes / f"{name}-{rank}.json").write_text(json.dumps(note), encoding="utf8")


def merge(rank: int, out: Path) -> None:
    """Statistics of one half of the data become those of the whole; then all else that a group offers."""
    x_BTC = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
    ranks = join()
    mine = {name: kind() for name, kind in STATISTICS.items()}
    for statistic in mine.values():
        for batch in ranks.part(x_BTC).split(2):
            statistic.update(batch)
    seen = {"q": mine, "k": mine, "unseen": {"squares": SumSquares()}}
    ranks.merge(seen)
    assert seen["q"] is seen["k"]
    torch.save({name: statistic.state() for name, statistic in mine.items()}, out / f"{rank}.pt")
    torch.save(x_BTC, out / "x.pt")
    assert seen["unseen"]["squares"].tokens == 0
    agree(rank)
    for kind in ("ours", "other", "disk", "interrupt"):
        raised_by_one(rank, kind)


def agree(rank: int) -> None:
    """What the ranks of a group tell each other."""
    ranks = join()
    assert join() is ranks and (ranks.rank, ranks.size, ranks.main) == (rank, 2, rank == 0)
    assert ranks.device("cpu") == "cpu"
    with pytest.raises(UsageError, match="cuda:0 is one GPU for 2 ranks: give cuda"):
        ranks.device("cuda:0")
    with pytest.MonkeyPatch.context() as patch:
        taken: list[int] = []
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "set_device", taken.append)
        if rank == 0:
            assert ranks.device("cuda") == "cuda:0" and taken == [0]
        else:
            with pytest.raises(UsageError, match="there is no GPU for rank 1: start at most 1 ranks"):
                ranks.device("cuda")
    ids = torch.arange(14).reshape(7, 2)
    assert torch.equal(ranks.part(ids), ids[:4] if rank == 0 else ids[4:])
    assert ranks.any(rank == 1) and not ranks.any(False)
    assert ranks.on_main(lambda: f"from {rank}") == "from 0"
    ranks.meet()


def raised_by_one(rank: int, kind: str) -> None:
    """The error of rank 1, whatever rank 0 is about to do with the others, is raised on rank 0."""
    ranks = join()
    errors = {
        "ours": NonFiniteError("layer 1 gives NaN"),
        "other": RuntimeError("broken\nlines"),
        "disk": OSError(28, "No space left on device"),
        "interrupt": KeyboardInterrupt("stopped after block 1"),
    }
    expected = {"other": (RankError, "rank 1 failed: broken")}.get(kind, (type(errors[kind]), str(errors[kind])))
    waits: dict[str, Callable[[], Any]] = {
        "ours": lambda: ranks.merge({"q": {"squares": SumSquares()}}),
        "other": ranks.meet,
        "disk": lambda: ranks.on_main(lambda: None),
        "interrupt": lambda: ranks.any(False),
    }
    with pytest.raises(BaseException) as caught, ranks.together(), ranks.together():
        if rank == 1:
            raise errors[kind]
        waits[kind]()
    if rank == 0:
        assert (type(caught.value), str(caught.value)) == expected
    else:
        assert caught.value is errors[kind]


def fail_in_runs(rank: int, recipes: Mapping[str, dict[str, Any]]) -> None:
    """Rank 1 fails in the middle of runs, in several ways; then the runs go on, or begin again, to their end."""
    for where, recipe in recipes.items():
        fail_in_a_run(rank, recipe, where)


def fail_in_a_run(rank: int, recipe: dict[str, Any], where: str) -> None:
    """Both ranks raise, and the folder of the run is kept or not, as it should."""
    patch = pytest.MonkeyPatch()
    if rank == 1:
        patch.setattr(*_failing(where))
    error, message = {
        "nan": (NonFiniteError, "layer 1 gives NaN"),
        "disk": (OutputError, "No space left on device; .*out.run holds what is done"),
        "bug": (RankError, "rank 1 failed: oops; .*out.run holds what is done"),
    }[where]
    with pytest.raises(error if rank == 0 or where == "nan" else Exception) as caught:
        sc.run(recipe)
    patch.undo()
    if rank == 0:
        caught.match(message)
    join().meet()
    kept = Path(recipe["out"] + ".run")
    assert kept.exists() == (where != "nan")
    assert not Path(recipe["out"]).exists()
    if kept.exists():
        assert join().on_main(lambda: len(list(kept.glob("step-1/hidden/**/*.safetensors")))) >= 2
        sc.run(recipe, resume=True)
    else:
        sc.run(recipe)


def _failing(where: str) -> tuple[Any, str, Any]:
    """What to replace on a rank, so that it fails after the first block."""
    if where == "nan":
        real_run = BlockWalk._run

        def run(self: BlockWalk, block: Any, layer: int, *args: Any) -> torch.Tensor:
            if layer == 1:
                raise NonFiniteError("layer 1 gives NaN")
            return real_run(self, block, layer, *args)

        return BlockWalk, "_run", run
    real_keep = DiskKeeper.keep

    def keep(self: DiskKeeper, layer: int, *args: Any, **kwargs: Any) -> None:
        if layer == 1:
            raise OSError(28, "No space left on device") if where == "disk" else RuntimeError("oops")
        real_keep(self, layer, *args, **kwargs)

    return DiskKeeper, "keep", keep


def stop_by_signal(rank: int, recipe: dict[str, Any]) -> None:
    """A signal to one rank stops both after the same block, and both go on from there."""
    import os
    import signal

    real = DiskKeeper.keep
    patch = pytest.MonkeyPatch()

    def keep(self: DiskKeeper, layer: int, *args: Any, **kwargs: Any) -> None:
        if layer == 1 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, layer, *args, **kwargs)

    patch.setattr(DiskKeeper, "keep", keep)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after block 2 of 3; .*--resume goes on"):
        sc.run(recipe)
    patch.undo()
    if rank == 0:
        # one process can't go on where two were
        with pytest.MonkeyPatch.context() as alone:
            alone.setattr("secateur.runs.run.join", Ranks)
            with pytest.raises(OutputError, match="number of ranks was 2 and is 1 now"):
                sc.run(recipe, resume=True)
    join().meet()
    sc.run(recipe, resume=True)


def too_few(rank: int, recipe: dict[str, Any]) -> None:
    """A window for one rank of two, and several devices for each: refused, and nothing is left behind."""
    with pytest.raises(UsageError, match="2 ranks need a calibration window each, there are 1: add samples"):
        sc.run({**recipe, "calibration": {"samples": 1, "length": 64}})
    with pytest.raises(UsageError, match="several devices are for one process"):
        sc.run({**recipe, "devices": ["cpu", "cpu"]})
    with pytest.raises(SecateurError, match="there is no model at"):
        sc.run({**recipe, "model": "./nowhere"})
    assert list(Path(recipe["out"]).parent.iterdir()) == []


def say(rank: int, commands: Sequence[Sequence[str]], notes: Path) -> None:
    """Run command lines one after the other, and note the exit codes and what this rank said."""
    from secateur.cli import main
    from secateur.ranks import start

    # nobody ends these ranks when one has failed
    start._SILENCE = 0.0
    said = []
    for command in commands:
        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
            main(command)
        said.append({"code": stop.value.code, "out": out.getvalue(), "err": err.getvalue()})
    (notes / f"said-{rank}.json").write_text(json.dumps(said), encoding="utf8")


def train(rank: int, recipe: Mapping[str, Any], out: Path) -> None:
    """Train from a recipe on the ranks together."""
    from secateur.trainer import make_train_recipe, run_training

    run_training(make_train_recipe(recipe, "the recipe"), out=out)


def heal(rank: int, source: Path, folder: Path, ways: Mapping[str, Mapping[str, Any]]) -> None:
    """Train a checkpoint on the ranks together, in several ways; note how much of it this rank has meanwhile."""
    from secateur.loop import Loop
    from secateur.rowmasks import local

    real = Loop._step
    for name, how in ways.items():
        note: dict[str, int] = {}

        def step(self: Loop, number: int, note: dict[str, int] = note) -> float:
            loss = real(self, number)
            note["trained"] = sum(p.numel() for p in self._parameters.values())
            note["all weights"] = sum(p.numel() for p in self._model.parameters())
            note["weights"] = sum(local(p).numel() for p in self._model.parameters())
            states = [state for state in self._optimizer.state.values()]
            note["remembered"] = sum(local(state[key]).numel() for state in states for key in ("exp_avg", "exp_avg_sq"))
            return loss

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Loop, "_step", step)
            sc.heal(source, out=folder / name, **how)
        (folder / f"{name}-{rank}.json").write_text(json.dumps(note), encoding="utf8")


def heal_in_two_sittings(rank: int, source: Path, folder: Path, ways: Mapping[str, Mapping[str, Any]]) -> None:
    """Train a checkpoint at one go, and once more with a signal to one rank behind the second step."""
    import os
    import signal

    from secateur.runs.signals import Stopped
    from secateur.runs.states import StateKeeper

    real = StateKeeper.finished

    def finished(self: StateKeeper, curve: Any, *args: Any, **kwargs: Any) -> None:
        if curve.steps == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        real(self, curve, *args, **kwargs)

    for name, how in ways.items():
        sc.heal(source, out=folder / name, **how)
        again = folder / f"{name}, again"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StateKeeper, "finished", finished)
            with pytest.raises(Stopped, match="stopped after step 2 of the training"):
                sc.heal(source, out=again, **how)
        sc.heal(source, out=again, resume=True, **how)
