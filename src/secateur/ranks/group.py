"""The ranks of a process group: their rounds, and how statistics go from one to the others."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.errors import RankError, SecateurError, UsageError, first_line
from secateur.ranks.base import Ranks, Seen, Value
from secateur.ranks.start import number

# rank 0 may write a large checkpoint, or measure it, while the others wait; a rank that dies is noticed at once
_ROUND = timedelta(days=1)
_FAREWELL = timedelta(seconds=30)


@lru_cache(maxsize=1)
def group_of(world: Any) -> Group:
    """One for a process group, however often it is joined: making it is itself something that all ranks do."""
    return Group()


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


class Group(Ranks):
    """The ranks of the default process group. Rounds go over gloo, on the CPU; tensors over what their device needs."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._rounds: Any = dist.new_group(backend="gloo", timeout=_ROUND)
        self._in_step, self._told, self._depth = True, False, 0

    @property
    def here(self) -> int:
        # who starts ranks in another way than torchrun doesn't say where they are
        return max(1, number("LOCAL_WORLD_SIZE", 1))

    def device(self, name: str) -> str:
        if not name.startswith("cuda"):
            return name
        if name != "cuda":
            raise UsageError(f"{name} is one GPU for {self.size} ranks: give cuda, and every rank takes its own")
        local, count = number("LOCAL_RANK", self.rank), torch.cuda.device_count()
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
        if not self._depth:
            self._told = False
        self._depth += 1
        try:
            yield
        except BaseException as error:
            if self._in_step and not self._told:
                self._told = True
                with suppress(RankError):
                    self._round(failure=_Failure.of(error, self.rank))
            raise
        finally:
            self._depth -= 1

    def _round(self, value: Any = None, *, failure: _Failure | None = None) -> list[Any]:
        """The values of all ranks, in order. Raises the error of the first rank that has failed."""
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
