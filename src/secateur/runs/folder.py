"""The folder of a run: what has been decided, block by block, so that a killed run goes on where it was.

OUT.run/
  run.json               what is being done: recipe, model, calibration, versions; a resumed run must match it
  step-1/
    text.sha256          of the tokens that are observed
    journal.jsonl        one line per finished piece of work; nothing counts that isn't in it
    plan/                block-00000.safetensors, ...: the decision about each block; whole-...: what was decided at
                         the end; refit-...: new values of each block after that
    weights/             block-00000.safetensors, ...: each block as it will be in the checkpoint
    seen/, ranked/       statistics and scores that the end of the run needs, for methods that decide globally; where
                         a search on the whole model is
    hidden/              the activations that enter the next block; those of other ranks than 0 in rank-1/, ..., and
                         those of the dense model, where they are needed too, in dense/
    allocation/          the same once more, for what an allocator measures before the first block is decided
    supernet-0/, ...     the same once more, with all levels of every group in ranked/, for a search over them; until
                         the next search has its own
    heal-1a2b3c4d/       a training of what the step has written; another training has another name
  step-1/out/            the checkpoint, until it takes its own name
  finished.sha256        of the manifest of the output, from right before it takes its name
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.engine.keeping import Decision, Keeper, SeenByModule
from secateur.errors import OutputError
from secateur.files import (
    check_output,
    discard_folder,
    disk_error,
    finish_folder,
    output_folder,
    run_path,
    sync_folder,
    write_text,
)
from secateur.methods import Method
from secateur.observe.driver import BlockWalk
from secateur.observe.store import read_seen, write_seen
from secateur.plans import Plan, plan_of_parts
from secateur.provenance import BudgetAccount, Provenance
from secateur.ranks import ALONE, Ranks
from secateur.remote import is_url
from secateur.runs.cutting import BlockCutter
from secateur.runs.finished import seal
from secateur.runs.signals import Stopped, StopRequest
from secateur.tensorfiles import Stored, read_header, write_tensors

_DTYPES = ("float32", "bfloat16", "float16", "float64")


class Journal:
    """Lines of JSON that are on the disk before the work after them begins; a torn last line is dropped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: list[dict[str, Any]] = []
        if path.is_file():
            whole = path.read_bytes()
            for line in whole.split(b"\n")[:-1]:
                self.entries.append(json.loads(line))
            keep = whole.rfind(b"\n") + 1
            if keep != len(whole):
                os.truncate(path, keep)

    def add(self, **entry: Any) -> None:
        """Append a line, durable when this returns."""
        with open(self._path, "ab") as file:
            file.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)

    def of(self, what: str) -> dict[Any, dict[str, Any]]:
        """The entries of one kind by the thing that they are about."""
        return {entry[what]: entry for entry in self.entries if what in entry}


class StepFolder:
    """The rooms and the journal of one step; ``stop`` is asked between pieces of work, ``hint`` says how to go on."""

    ROOMS = ("plan", "weights", "seen", "ranked", "hidden", "out")

    def __init__(self, path: Path, stop: StopRequest, hint: str) -> None:
        self.path, self._stop, self._hint = path, stop, hint
        for room in self.ROOMS:
            (path / room).mkdir(parents=True, exist_ok=True)
        self.journal = Journal(path / "journal.jsonl")

    @property
    def out(self) -> Path:
        """Where the checkpoint is put together."""
        return self.path / "out"

    def emptied(self) -> Path:
        """``out``, without what a run that died while it wrote has left there."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        return self.out

    def aside(self, name: str) -> StepFolder:
        """A folder within this one, for work that comes before its blocks."""
        return StepFolder(self.path / name, self._stop, self._hint)

    @property
    def stopping(self) -> bool:
        """Whether a signal has come."""
        return self._stop.made

    def reads(self, sha256: str) -> None:
        """Note what text is worked on. Raises OutputError where an earlier sitting has read another one."""
        note = self.path / "text.sha256"
        if note.is_file() and note.read_text(encoding="utf8") != sha256:
            raise OutputError(f"the run in {self.path.parent} can't go on: its text has changed since it began")
        write_text(note, sha256)

    def reopen(self) -> None:
        """Read the journal again, which another rank has written to."""
        self.journal = Journal(self.path / "journal.jsonl")

    def file(self, room: str, layer: int) -> Path:
        """What a room holds about one block."""
        return self.path / room / f"block-{layer:05d}.safetensors"

    def written(self) -> set[int]:
        """The blocks that are cut and written."""
        early = {layer for layer, entry in self.journal.of("block").items() if entry["final"]}
        return early | set(self.journal.of("cut"))

    def add(self, **entry: Any) -> None:
        """Note a finished piece of work, once everything that belongs to it is durable."""
        for room in self.ROOMS:
            sync_folder(self.path / room)
        self.journal.add(**entry)

    def check_stop(self, where: str, ranks: Ranks = ALONE) -> None:
        """Raise Stopped when a signal has come, to one of ``ranks`` at least."""
        if ranks.any(self._stop.made):
            raise Stopped(f"stopped after {where}; {self._hint}")


class DiskKeeper(Keeper):
    """Keeps every finished block in a folder; see the module's docstring.

    ``cutter`` writes blocks as they will be in the checkpoint, unless ``cut`` is false. Of several ranks, which share a
    file system, each keeps its activations in ``hidden``, and the first one keeps all the rest. Raises Stopped after a
    block when a signal has come.
    """

    def __init__(
        self, step: StepFolder, method: Method, cutter: BlockCutter, ranks: Ranks = ALONE, *, cut: bool = True
    ) -> None:
        super().__init__()
        self._step, self._method, self._cutter, self._ranks, self._cut = step, method, cutter, ranks, cut
        self.hidden.mkdir(exist_ok=True)
        self.finished, self.refitted = len(step.journal.of("block")), len(step.journal.of("refit"))
        self._scores: dict[str, Tensor] = {}
        self._ranked_files: dict[str, Stored] = {}
        for layer in range(self.finished):
            self._remember(layer)
        self.closed = bool(step.journal.of("closed"))

    @property
    def hidden(self) -> Path:
        folder = self._step.path / "hidden"
        return folder if self._ranks.main else folder / f"rank-{self._ranks.rank}"

    def aside(self, name: str) -> DiskKeeper:
        return DiskKeeper(self._step.aside(name), self._method, self._cutter, self._ranks, cut=False)

    def discard(self, name: str) -> None:
        shutil.rmtree(self._step.path / name, ignore_errors=True)

    def allocated(self) -> dict[str, float] | None:
        done = self._step.journal.of("allocated")
        return done[True]["sparsities"] if done else None

    def allocate(self, sparsities: dict[str, float]) -> None:
        self._step.add(allocated=True, sparsities=sparsities)

    def note(self, name: str, number: int, value: Any) -> None:
        self._step.add(**{name: number, "value": value})
        self._step.check_stop(f"{name} {number + 1}", self._ranks)

    def noted(self, name: str) -> Mapping[int, Any]:
        return {number: entry["value"] for number, entry in self._step.journal.of(name).items()}

    @property
    def complete(self) -> bool:
        """True when nothing is left to decide or to refit."""
        return self.closed and (not self._method.refits_later or self.refitted == self._cutter.layers)

    def resume(self, walk: BlockWalk) -> bool:
        done = self.refitted if self.closed else self.finished
        # nothing is kept to go on from behind the last block
        if not 0 < done < self._cutter.layers:
            return True
        states = self._states(walk, done)
        if not all(path.is_file() for path in states):
            return False
        for stream, path in zip(walk.streams, states, strict=True):
            stream.restore(path)
        return True

    def keep(
        self,
        layer: int,
        part: Decision,
        *,
        final: bool,
        walk: BlockWalk | None = None,
        seen: SeenByModule | None = None,
        ranked: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._store(layer, walk)
        if self._ranks.main:
            self._write(layer, part, final, seen, ranked)
        self.finished = layer + 1
        self._step.check_stop(f"block {layer + 1} of {self._cutter.layers}", self._ranks)

    def _store(self, layer: int, walk: BlockWalk | None) -> None:
        """Keep what enters the next block; a block counts as finished only when every rank can go on from there."""
        if walk is not None and layer + 1 < self._cutter.layers:
            for stream, path in zip(walk.streams, self._states(walk, layer + 1), strict=True):
                path.parent.mkdir(exist_ok=True)
                stream.store(path)
                sync_folder(path.parent)
            sync_folder(self.hidden)
        self._ranks.meet()

    def _write(
        self,
        layer: int,
        part: Decision,
        final: bool,
        seen: SeenByModule | None,
        ranked: Mapping[str, Tensor] | None,
    ) -> None:
        write_tensors(self._step.file("plan", layer), _part_tensors(part, self._cutter.provenance), durable=True)
        if seen:
            write_seen(self._step.file("seen", layer), seen)
        if ranked:
            write_tensors(self._step.file("ranked", layer), ranked, durable=True)
        if final and self._cut:
            self._cutter.write(layer, part, self._step.file("weights", layer))
        self._step.add(block=layer, final=final and self._cut, **_part_document(part))
        self._forget(layer)
        self._remember(layer)

    def _forget(self, layer: int) -> None:
        """Remove the activations of all ranks that enter a block which is finished."""
        for state in self._step.path.joinpath("hidden").rglob(self._step.file("hidden", layer).name):
            state.unlink(missing_ok=True)

    def _states(self, walk: BlockWalk, layer: int) -> list[Path]:
        """The files of the activations that enter a block, one for every stream of the walk."""
        name = self._step.file("hidden", layer).name
        return [self.hidden / name, self.hidden / "dense" / name][: len(walk.streams)]

    def seen(self, layer: int) -> SeenByModule:
        path = self._step.file("seen", layer)
        if not path.is_file():
            return {}
        return read_seen(path, self._method.observed_statistics(), self._cutter.source.device_of(layer))

    def ranked(self, name: str) -> Tensor:
        return self._ranked_files[name].read()

    def scores(self) -> Mapping[str, Tensor]:
        return self._scores

    def close(self, parts: Iterator[Decision]) -> None:
        self.closed = True
        if not self._ranks.main:
            return
        documents = []
        for number, part in enumerate(parts):
            path = self._step.path / "plan" / f"whole-{number:05d}.safetensors"
            write_tensors(path, _part_tensors(part, self._cutter.provenance), durable=True)
            documents.append(_part_document(part))
        self._step.add(closed=True, parts=documents)

    def search(self, state: Mapping[str, Tensor], step: int) -> None:
        write_tensors(self._state_file(step), state, durable=True)
        self._step.add(searched=step)
        for older in self._state_file(step).parent.glob("search-*.safetensors"):
            if older != self._state_file(step):
                older.unlink(missing_ok=True)
        self._step.check_stop(f"step {step} of the search", self._ranks)

    def searched(self) -> Mapping[str, Tensor] | None:
        steps = self._step.journal.of("searched")
        if not steps:
            return None
        return {name: stored.read() for name, stored in read_header(self._state_file(max(steps))).items()}

    def _state_file(self, step: int) -> Path:
        return self._step.path / "ranked" / f"search-{step:07d}.safetensors"

    def decided(self) -> Plan:
        # what one rank has written, all of them read
        self._ranks.meet()
        if not self._ranks.main:
            self._step.reopen()
        return self._whole()

    def refit(self, layer: int, part: Decision, walk: BlockWalk | None) -> None:
        self._store(layer, walk)
        if self._ranks.main:
            path = self._step.path / "plan" / f"refit-{layer:05d}.safetensors"
            write_tensors(path, _part_tensors(part, self._cutter.provenance), durable=True)
            self._step.add(refit=layer, **_part_document(part))
            self._forget(layer)
        self.refitted = layer + 1
        self._step.check_stop(f"refitting block {layer + 1} of {self._cutter.layers}", self._ranks)

    def finish(self) -> Plan:
        """The whole plan, its large parts still on disk."""
        if not self.closed:
            self.close(iter(()))
        return self._whole()

    def _whole(self) -> Plan:
        journal = self._step.journal
        entries = [*journal.of("block").values(), *journal.of("closed")[True]["parts"], *journal.of("refit").values()]
        tensors: dict[str, Stored] = {}
        # a part that was refitted replaces what was decided before; what no line tells of doesn't count
        refits = [self._step.path / "plan" / f"refit-{layer:05d}.safetensors" for layer in journal.of("refit")]
        others = [f for kind in ("block", "whole") for f in (self._step.path / "plan").glob(f"{kind}-*.safetensors")]
        for file in [*sorted(others), *refits]:
            tensors |= read_header(file)
        groups, shapes, kept, notes, budgets = {}, {}, {}, [], {}
        for entry in entries:
            groups |= entry["groups"]
            shapes |= {name: tuple(shape) for name, shape in entry["masks"].items()}
            kept |= entry["kept"]
            notes += entry["notes"]
            budgets |= entry["budgets"]
        accounts = {name: BudgetAccount(**account) for name, account in budgets.items()}
        about = {"notes": tuple(notes), "budgets": accounts}
        provenance = self._cutter.provenance.model_copy(update=about).allocated(self.allocated())
        return plan_of_parts(provenance, groups, shapes, tensors, kept)

    def _remember(self, layer: int) -> None:
        stored = read_header(self._step.file("plan", layer))
        self._scores |= {n.removeprefix("scores/"): t.read() for n, t in stored.items() if n.startswith("scores/")}
        if self._step.file("ranked", layer).is_file():
            self._ranked_files |= read_header(self._step.file("ranked", layer))


def _part_tensors(part: Decision, provenance: Provenance) -> dict[str, Any]:
    return part.plan(provenance).tensors()


def _part_document(part: Decision) -> dict[str, Any]:
    return {
        "groups": part.groups,
        "masks": {n: list(m.shape) for n, m in part.masks.items()},
        "kept": {n: int(m.count_nonzero()) for n, m in part.masks.items()},
        "notes": part.notes,
        "budgets": {name: account.model_dump() for name, account in part.budgets.items()},
    }


class RunFolder:
    """``OUT.run`` beside the output: made for a new run, opened again to go on with one that was stopped.

    ``document`` says what is being done. Raises OutputError when there is nothing to resume, when the run on disk is
    another one, or when an unfinished run is there and neither ``resume`` nor ``overwrite`` is given. Of several
    ranks the first makes and removes the folder, and the others open it. Of a run that goes on, ``steps`` in which
    nothing is finished may be others, more or fewer, and so may ``trainings``, one for every step, as long as no step
    has begun behind them. ``finished`` is the number of steps that are done, ``training`` is set while what a step has
    pruned is trained, and ``complete`` when nothing is left but to measure and to write the output.
    """

    def __init__(
        self, out: str | Path, document: Mapping[str, Any], *, resume: bool, overwrite: bool, ranks: Ranks = ALONE
    ) -> None:
        self.path = run_path(out)
        self.out = out
        self.complete = self.training = False
        self.finished = 0
        self.document = json.loads(json.dumps(document))
        self._parents = [parent for parent in self.path.parents if not parent.exists()]
        self._ranks = ranks
        self._overwrite = overwrite
        ranks.on_main(lambda: self._open() if resume else self._make(overwrite))
        if not ranks.main:
            self._open()

    def _open(self) -> None:
        theirs = read_document(self.path)
        others = self._check_same(theirs)
        if self._ranks.main:
            # what a kill left half written would be taken for a file of the output
            for left in self.path.rglob("*.part"):
                left.unlink()
        if theirs != self.document and self._ranks.main:
            for number in others:
                shutil.rmtree(self._step(number), ignore_errors=True)
            self._write_document()

    def _make(self, overwrite: bool) -> None:
        head = self.path / "run.json"
        if head.is_file() and not overwrite:
            raise OutputError(
                f"{self.path} holds an unfinished run: add --resume to go on with it, or --overwrite to begin again"
            )
        if self.path.exists() and not head.is_file() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise OutputError(
                f"{self.path} is where the run of {self.out} would be kept, and holds something else: rename it, or"
                " choose another output"
            )
        discard_folder(self.path)
        try:
            # it appears together with what makes it a run, so that a kill leaves nothing that isn't one
            with output_folder(self.path) as temporary:
                (temporary / "run.json").write_text(self._text(), encoding="utf8")
        except OutputError as error:
            if reason := disk_error(error):
                raise OutputError(f"can't write to {self.out}: {reason}") from None
            raise

    def _write_document(self) -> None:
        write_text(self.path / "run.json", self._text())

    def _text(self) -> str:
        return json.dumps(self.document, indent=1, sort_keys=True)

    def step(self, number: int) -> Path:
        """The folder of one step, from 1."""
        path = self._step(number)
        path.mkdir(exist_ok=True)
        return path

    def _step(self, number: int) -> Path:
        return self.path / f"step-{number}"

    @property
    def begun(self) -> bool:
        """Whether anything is finished in it."""
        return _begun(self.path)

    @property
    def between(self) -> bool:
        """Whether a step is done, and nothing of the next one is."""
        return self.finished > 0 and not (self.complete or self.training or _begun(self._step(self.finished + 1)))

    def drop_unfinished(self) -> None:
        """Delete what there is of the step behind those that are done, unless it is pruned or nothing is left to do."""
        if self._ranks.main and not (self.training or self.complete):
            shutil.rmtree(self._step(self.finished + 1), ignore_errors=True)

    def finish(self, folder: Path) -> None:
        """The complete output takes its name, and the folder of the run goes; see ``is_finished``.

        Raises OutputError where something has taken that name meanwhile, unless it may be overwritten.
        """
        if not is_url(self.out):
            check_output(self.out, self._overwrite)
        # what can be renamed is sealed before: a kill behind the renaming finds a run without its output in it
        if not is_url(self.out):
            seal(self.path, folder)
        finish_folder(folder, self.out)
        if is_url(self.out):
            seal(self.path)
        self.remove()

    def remove(self) -> None:
        """Delete the folder, and those above it that were made for it and hold nothing else."""
        if not self._ranks.main:
            return
        discard_folder(self.path)
        for parent in self._parents:
            with suppress(OSError):
                parent.rmdir()

    def _check_same(self, theirs: Mapping[str, Any]) -> list[int]:
        """The numbers of the steps that are other ones now, in which nothing is finished."""
        for key in sorted({*theirs, *self.document} - {"steps", "trainings"}):
            if theirs.get(key) != self.document.get(key):
                how = _difference(theirs.get(key), self.document.get(key))
                raise OutputError(f"the run in {self.path} can't go on: its {key} {how}")
        others = []
        steps = zip_longest(theirs.get("steps", ()), self.document.get("steps", ()))
        for number, (then, now) in enumerate(steps, start=1):
            if then == now:
                continue
            if _begun(self._step(number)):
                how = _difference(then, now) if now is not None else "isn't asked for any more"
                remedy = f"; remove {self._step(number)} to have it as asked" if number > 1 else ""
                raise OutputError(f"the run in {self.path} can't go on: its step {number} {how}{remedy}")
            others.append(number)
        # one for each of the same steps
        pairs = zip(theirs.get("trainings", ()), self.document.get("trainings", ()), strict=False)
        for number, (then, now) in enumerate(pairs, start=1):
            if then != now and _begun(self._step(number + 1)):
                raise OutputError(
                    f"the run in {self.path} can't go on: step {number + 1} has begun behind another training of step"
                    f" {number}"
                )
        return others


def _begun(path: Path) -> bool:
    """Whether a journal in a folder tells of finished work."""
    try:
        return any(journal.stat().st_size for journal in path.glob("**/journal.jsonl"))
    except FileNotFoundError:
        # another rank is removing it right now
        return False


def read_document(path: Path) -> dict[str, Any]:
    """What the run in this folder is about. Raises OutputError when there is none."""
    try:
        document = json.loads((path / "run.json").read_text(encoding="utf8"))
    except FileNotFoundError:
        raise OutputError(f"there is nothing to resume: {path} doesn't exist or holds no run") from None
    except (OSError, ValueError):
        document = None
    # the name of an attribute of torch is taken from it
    if not isinstance(document, dict) or document.get("dtype") not in (None, *_DTYPES):
        raise OutputError(f"{path} is damaged: its run.json can't be read; remove the folder and begin again")
    return document


def _difference(then: Any, now: Any) -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}, key=str):
            if then.get(key) != now.get(key):
                return f"differs in {key} ({then.get(key)} then, {now.get(key)} now)"
    return f"was {then} and is {now} now"
