"""Where work is done: one piece after the other in this process, or on the workers of a Ray.

The pieces are the points of a sweep, unless another ``worker`` is named: what makes, of the job, something whose
``run`` takes the ``point`` of a task and returns an outcome. A job knows its ``device``, ``directory`` and ``plugins``.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from secateur.errors import UsageError, require_extra
from secateur.sweep.worker import Failure, Worker

# Ray's smallest object store is 75 MiB; what we send around is a few kilobytes
_OBJECT_STORE_BYTES = 80 * 2**20


@dataclass(frozen=True)
class Task:
    """A point (None is the dense model), or what else workers take, for the ``attempt``-th time."""

    point: Any
    attempt: int = 1


class Pool(Protocol):
    """Takes tasks while it is ``free`` and gives each back once, in any order."""

    @property
    def free(self) -> bool:
        """True when another task would start at once."""
        ...

    def submit(self, task: Task) -> None:
        """Start a task."""
        ...

    def next(self) -> tuple[Task, Any]:
        """Wait until a task has ended; gives its outcome, a ``Failure`` where it has failed."""
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...


class InSequence:
    """One piece after the other, in this process."""

    def __init__(self, job: Any, worker: Callable[[Any], Any] = Worker) -> None:
        self.worker = worker(job)
        self._waiting: deque[Any] = deque()

    @property
    def free(self) -> bool:
        return not self._waiting

    def submit(self, task: Task) -> None:
        self._waiting.append(task)

    def next(self) -> tuple[Task, Any]:
        task = self._waiting.popleft()
        return task, self.worker.run(task.point)

    def close(self) -> None:
        return None


def open_pool(
    job: Any,
    workers: int | None,
    address: str | None,
    default: int,
    *,
    what: str,
    worker: Callable[[Any], Any] = Worker,
    own: Callable[[Any], Any] | None = None,
) -> tuple[Pool, list[str]]:
    """Where tasks run, and what to say about it: in sequence, or on ``workers`` of the Ray at ``address``.

    Without a number of workers there is one per GPU, or there are ``default`` ones. ``own`` makes the worker of this
    process where it is not ``worker`` that does. Raises UsageError when nothing answers at ``address``.
    """
    if workers == 1 and address is None:
        return InSequence(job, own or worker), []
    if address is None and importlib.util.find_spec("ray") is None:
        note = f"Ray is not installed, so the {what} ran in sequence: pip install 'secateur[sweep]'"
        return InSequence(job, own or worker), [note]
    if workers is None and job.device.startswith("cuda"):
        import torch

        workers = torch.cuda.device_count()
    return RayPool(job, workers or max(1, default), address, worker), []


class RayPool:
    """``size`` processes of Ray, each with its own copy of the model; one that dies is replaced.

    Without ``address`` a Ray of our own is started on this machine, and ended with the pool.
    Raises MissingExtraError without Ray, and UsageError when nothing answers at ``address``.
    """

    def __init__(self, job: Any, size: int, address: str | None = None, worker: Callable[[Any], Any] = Worker) -> None:
        # Ray sends statistics of its use over the network unless told otherwise
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._ray: Any = require_extra("ray", "sweep", "a sweep on several workers")
        self._job, self._kind = job, worker
        self._own = not self._ray.is_initialized()
        if self._own:
            with _own_sigterm():
                self._connect(size, address)
        # Ray gives every process one thread unless told otherwise
        mine = address is None and "OMP_NUM_THREADS" not in os.environ
        self._threads = max(1, (os.cpu_count() or 1) // size) if mine else None
        self._idle = [self._worker() for _ in range(size)]
        self._running: dict[Any, tuple[Any, Task]] = {}

    @property
    def free(self) -> bool:
        return bool(self._idle)

    def submit(self, task: Task) -> None:
        worker = self._idle.pop()
        self._running[worker.run.remote(task.point)] = (worker, task)

    def next(self) -> tuple[Task, Any]:
        (ended,), _ = self._ray.wait(list(self._running), num_returns=1)
        worker, task = self._running.pop(ended)
        try:
            outcome = self._ray.get(ended)
        except self._ray.exceptions.RayError as error:
            # not the point's own mistake, which comes back as a value: the process was killed, or ran out of memory
            outcome = Failure(f"its worker process died ({type(error).__name__})", final=False)
            self._ray.kill(worker)
            worker = self._worker()
        self._idle.append(worker)
        return task, outcome

    def close(self) -> None:
        if self._own:
            self._ray.shutdown()
            return
        for worker in [*self._idle, *(worker for worker, _ in self._running.values())]:
            self._ray.kill(worker)

    def _connect(self, size: int, address: str | None) -> None:
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        if address is None:
            local = {"num_cpus": size, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
            self._ray.init(address="local", **local, **quiet)
            return
        try:
            self._ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(f"no Ray cluster answers at {address}: {reason}") from None

    def _worker(self) -> Any:
        gpus = 1 if self._job.device.startswith("cuda") else 0
        remote = self._ray.remote(num_cpus=1, num_gpus=gpus)(_RayWorker)
        return remote.remote(self._job, self._threads, self._kind)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray makes SIGTERM end the process; ours says first how to resume."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


class _RayWorker:
    """A worker in a process of Ray."""

    def __init__(self, job: Any, threads: int | None, kind: Callable[[Any], Any]) -> None:
        import torch

        from secateur.methods.plugins import load_plugin

        if os.path.isdir(job.directory):
            os.chdir(job.directory)
        if threads:
            torch.set_num_threads(threads)
        for plugin in job.plugins:
            load_plugin(plugin)
        self._worker = kind(job)

    def run(self, point: Any) -> Any:
        return self._worker.run(point)
