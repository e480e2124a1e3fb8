"""Several processes that prune one model together, started by torchrun or ``accelerate launch``.

Every process, a rank, walks its own consecutive part of the calibration windows; what they saw is merged in the order
of the ranks after every block, so that all of them decide the same. Rank 0 alone writes and speaks.

Nobody waits for a rank that has given up: ranks meet only in *rounds*, in which each says whether it goes on, and one
that fails says so in a last round, from which all others raise its error. A rank that dies without a word closes its
connections, and that ends the round of the others.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from secateur.errors import RankError, SecateurError, UsageError, first_line

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")
# name → statistic of every module; modules that share an input share one mapping
Seen = Mapping[str, dict[str, Any]]

# rank 0 may write a large checkpoint, or measure it, while the others wait; a rank that dies is noticed at once
_ROUND = timedelta(days=1)
_START = timedelta(minutes=10)
_FAREWELL = timedelta(seconds=30)


class Ranks:
    """One process alone: all work is its own. ``rank`` counts from 0 to ``size`` - 1; ``main`` is rank 0."""

    rank, size = 0, 1

    @property
    def main(self) -> bool:
        """True on the rank that writes and speaks."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this rank where ``name`` is asked for. Raises UsageError."""
        return name

    def part(self, ids: Tensor) -> Tensor:
        """The windows of this rank, [windows, length]: consecutive ones, the first for rank 0. Raises UsageError."""
        return ids

    def merge(self, seen: Seen) -> None:
        """Make every statistic in ``seen`` that of the windows of all ranks."""

    def meet(self) -> None:
        """Go on when all ranks have come here. Raises the error of one that failed."""

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on one rank at least."""
        return flag

    def on_main(self, work: Callable[[], Value]) -> Value:
        """Run ``work`` on rank 0 and give its result, which should be small, to all; errors are raised everywhere."""
        return work()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within the block, an error of one rank becomes an error of all."""
        yield


ALONE = Ranks()


def join() -> Ranks:
    """The ranks of this process, which enters their process group if that hasn't been done: all must call this.

    Without torchrun's environment and without a process group it is alone. Raises UsageError when the environment is
    incomplete, and RankError when the ranks don't find each other.
    """
    size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    import torch.distributed as dist

    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if size == 1 or "RANK" not in os.environ:
            return ALONE
        _enter(rank, size)
    return _group(dist.group.WORLD) if dist.get_world_size() > 1 else ALONE


def started_as_main() -> bool:
    """False when the environment says that this process is one of several ranks, and not the first."""
    with suppress(UsageError):
        return _number("WORLD_SIZE", 1) == 1 or _number("RANK", 0) == 0
    return True


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    if not text.isdecimal():
        raise UsageError(f"{name} in the environment must be a number, got {text!r}: start the ranks with torchrun")
    return int(text)


def _enter(rank: int, size: int) -> None:
    import torch
    import torch.distributed as dist

    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing or rank >= size:
        wrong = f"{missing[0]} is missing" if missing else f"RANK {rank} is not below WORLD_SIZE {size}"
        raise UsageError(f"{wrong} in the environment of rank {rank}: start the ranks with torchrun")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=_START)
    except (RuntimeError, ValueError) as error:
        raise RankError(f"rank {rank} of {size} doesn't find the others: {first_line(error)}") from error
    atexit.register(_leave)


@lru_cache(maxsize=1)
def _group(world: Any) -> _Group:
    """One for a process group, however often it is joined: making it is itself something that all ranks do."""
    return _Group()


def _leave() -> None:
    """Leave the group that was entered here, all ranks at once: torchrun ends the others as soon as one has failed,
    and rank 0 must have said why by then."""
    import torch.distributed as dist

    if dist.is_initialized():
        with suppress(RuntimeError):
            _group(dist.group.WORLD).say_farewell()
        with suppress(RuntimeError):
            dist.destroy_process_group()


@dataclass(frozen=True)
class _Failure:
    """The error of a rank on its way to the others, with the error of the system that caused it."""

    error: BaseException
    cause: BaseException | None

    @classmethod
    def of(cls, error: BaseException, rank: int) -> _Failure:
        if not isinstance(error, (SecateurError, OSError, KeyboardInterrupt)):
            # what other libraries raise can't always be sent
            return cls(RankError(f"rank {rank} failed: {first_line(error)}"), None)
        cause = error.__cause__
        return cls(error, cause if isinstance(cause, OSError) else None)

    def throw(self) -> None:
        raise self.error from self.cause


class _Group(Ranks):
    """The ranks of the default process group. Rounds go over gloo, on the CPU; tensors over what their device needs."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._rounds = dist.new_group(backend="gloo", timeout=_ROUND)
        self._in_step, self._told = True, False

    def device(self, name: str) -> str:
        if not name.startswith("cuda"):
            return name
        if name != "cuda":
            raise UsageError(f"{name} is one GPU for {self.size} ranks: give cuda, and every rank takes its own")
        import torch

        local, count = _number("LOCAL_RANK", self.rank), torch.cuda.device_count()
        if local >= count:
            raise UsageError(f"there is no GPU for rank {self.rank}: start at most {count} ranks on this machine")
        torch.cuda.set_device(local)
        return f"cuda:{local}"

    def part(self, ids: Tensor) -> Tensor:
        if len(ids) < self.size:
            raise UsageError(
                f"{self.size} ranks need a calibration window each, there are {len(ids)}: "
                "add samples, or start fewer ranks"
            )
        return ids.tensor_split(self.size)[self.rank]

    def merge(self, seen: Seen) -> None:
        import torch

        owners = {id(statistics): statistics for statistics in seen.values()}.values()
        places = [(statistics, name) for statistics in owners for name in statistics]
        states = [statistics[name].state() for statistics, name in places]
        outlines = self._round([_outline(state) for state in states])
        # statistics are made in inference mode, and what is made there can be written to only there
        with torch.inference_mode(), self._in_steps():
            for (statistics, name), state, *parts in zip(places, states, *outlines, strict=True):
                statistics[name] = self._folded(type(statistics[name]), state, parts)

    def _folded(self, kind: Callable[[], Any], own: Mapping[str, Tensor], outlines: Sequence[Any]) -> Any:
        """The parts of all ranks, merged in order; at most one part of another rank is here at a time."""
        whole = None
        for rank, outline in enumerate(outlines):
            part = kind()
            part.load_state({entry[0]: self._from(rank, entry, own) for entry in outline})
            if whole is None:
                whole = part
            else:
                whole.merge(part)
        return whole

    def _from(self, rank: int, entry: Any, own: Mapping[str, Tensor]) -> Tensor:
        import torch
        import torch.distributed as dist

        name, shape, dtype, where = entry
        # never the rank's own tensor itself: a merge may write to what it was given
        tensor = own[name].clone() if rank == self.rank else torch.empty(shape, dtype=dtype, device=where)
        tensor = tensor.contiguous()
        with _answered():
            dist.broadcast(tensor, rank, group=self._rounds if where == "cpu" else None)
        return tensor

    def meet(self) -> None:
        self._round()

    def any(self, flag: bool) -> bool:
        return any(self._round(flag))

    def on_main(self, work: Callable[[], Value]) -> Value:
        return self._round(work() if self.main else None)[0]

    @contextmanager
    def together(self) -> Generator[None, None, None]:
        try:
            yield
        except BaseException as error:
            if self._in_step and not self._told:
                self._told = True
                with suppress(RankError):
                    self._round(failure=_Failure.of(error, self.rank))
            raise

    def _round(self, value: Any = None, *, failure: _Failure | None = None) -> list[Any]:
        """The values of all ranks, in order. Raises the error of the first rank that has failed."""
        import torch.distributed as dist

        said: list[Any] = [None] * self.size
        with self._in_steps(), _answered():
            dist.all_gather_object(said, (value, failure), group=self._rounds)
        failures = [theirs for _, theirs in said if theirs is not None]
        if failures and failure is None:
            self._told = True
            failures[0].throw()
        return [value for value, _ in said]

    @contextmanager
    def _in_steps(self) -> Generator[None, None, None]:
        """Around what all ranks do in step: one that stumbles there can't talk to the others any more, only go."""
        self._in_step = False
        yield
        self._in_step = True

    def say_farewell(self) -> None:
        """Wait for the others for a moment."""
        import torch.distributed as dist

        if self._in_step:
            dist.monitored_barrier(self._rounds, timeout=_FAREWELL)


@contextmanager
def _answered() -> Generator[None, None, None]:
    """Around one call of torch.distributed. Raises RankError when another rank doesn't answer."""
    try:
        yield
    except RuntimeError as error:
        raise RankError("another rank has gone without a word: it was killed, or its machine was lost") from error


def _outline(state: Mapping[str, Tensor]) -> list[tuple[str, tuple[int, ...], Any, str]]:
    """(name, shape, dtype, kind of device) of every tensor: what a rank needs to receive them."""
    return [(name, tuple(tensor.shape), tensor.dtype, tensor.device.type) for name, tensor in state.items()]
