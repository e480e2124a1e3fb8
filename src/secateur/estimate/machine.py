"""This machine, tried for about two seconds: how fast it multiplies, moves, reads and writes, and what is free.

Products are timed at widths of the model in question. Every trial is repeated and its median taken.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median

import psutil
import torch
from torch import Tensor

from secateur import timing
from secateur.errors import OutputError, UsageError
from secateur.estimate.job import Job, on_processor
from secateur.estimate.sizes import Sizes
from secateur.estimate.training import Training, recovery_of
from secateur.methods import WeightMethod

# seconds that one trial may take, fewer for a model that is done in seconds itself; and how much it works on
_TRIAL, _TRIAL_PER_BYTE = 0.25, 0.25 / 2e8
_ROWS, _OUTPUTS, _FACTORED, _SWEPT = 512, 1024, 512, 128
_MOVED_BYTES = 1 << 25
_FILE_BYTES = 1 << 25
_RANKED_ENTRIES = 1 << 20


@dataclass(frozen=True)
class Machine:
    """Rates: operations per second of products in the compute dtype (``flops``), of float32 ones, of those of recovery
    training and of factorisations;
    entries per second that a sweep updates one by one, and that the method's rule ranks; bytes per second moved in
    memory, read from and written to disk.
    """

    flops: float
    float32_flops: float
    trained_flops: float
    factor_flops: float
    swept: float
    moved: float
    read: float
    written: float
    ranked: float


_IDLE = Machine(*[1.0] * len(fields(Machine)))


def try_machines(
    sizes: Sizes, jobs: Sequence[Job], files: Iterable[Path] = (), place: Path | None = None
) -> list[Machine]:
    """A machine for every job; those that ask the same of it share a trial."""
    files = tuple(files)
    tried: dict[tuple[object, ...], Machine] = {}
    found = []
    for job in jobs:
        recovery = recovery_of(sizes, job)
        asked = (job.method.name, _multiplies(sizes, job), job.repairs, recovery.dtype if recovery else None)
        if asked not in tried:
            tried[asked] = try_machine(sizes, job, files, place)
        found.append(tried[asked])
    return found


def _multiplies(sizes: Sizes, job: Job) -> bool:
    return job.observes or any(job.solve_flops(block) for block in sizes.blocks)


def try_machine(sizes: Sizes, job: Job, files: Iterable[Path] = (), place: Path | None = None) -> Machine:
    """Time this machine at what ``job`` will ask of it, reading ``files`` and writing (and removing) one in ``place``.

    Raises OutputError when that place can't be written to.
    """
    width = max((inputs.channels for inputs in sizes.blocks[0].inputs), default=sizes.hidden)
    trial = min(_TRIAL, _TRIAL_PER_BYTE * sizes.stored)
    moved = _move_rate(job.device, trial)
    dtypes = {job.dtype, torch.float32} if _multiplies(sizes, job) else set()
    if recovery := recovery_of(sizes, job):
        dtypes |= {recovery.dtype}
    rates = {dtype: _product_rate(width, dtype, job.device, trial) for dtype in dtypes}
    float32 = rates.get(torch.float32, 1.0)
    return Machine(
        flops=rates.get(job.dtype, 1.0),
        float32_flops=float32,
        trained_flops=rates[recovery.dtype] if recovery else 1.0,
        factor_flops=_factor_rate(job.device, trial) if job.repairs else float32,
        swept=_sweep_rate(job.device, trial) if job.repairs else moved / 64,
        moved=moved,
        read=_read_rate(files, moved),
        written=_write_rate(place, moved),
        ranked=_rank_rate(job, width, moved, trial),
    )


def try_training(training: Training, files: Iterable[Path] = (), place: Path | None = None) -> Machine:
    """Time this machine at what a training alone asks of it; the rates of what it doesn't do are 1."""
    sizes, device = training.sizes, training.device
    trial = min(_TRIAL, _TRIAL_PER_BYTE * sizes.stored)
    moved = _move_rate(device, trial)
    return replace(
        _IDLE,
        trained_flops=_product_rate(sizes.hidden, training.dtype, device, trial),
        moved=moved,
        read=_read_rate(files, moved),
        written=_write_rate(place, moved),
    )


def try_measuring(sizes: Sizes, dtype: torch.dtype, device: str) -> Machine:
    """Time this machine at what measuring a model of this dtype asks of it; the rates of what it doesn't do are 1."""
    trial = min(_TRIAL, _TRIAL_PER_BYTE * sizes.stored)
    moved = _move_rate(device, trial)
    return replace(_IDLE, flops=_product_rate(sizes.hidden, dtype, device, trial), moved=moved)


def available_on(device: str) -> int | None:
    """Bytes free on a GPU; None for a CPU, and where torch can't tell."""
    if torch.device(device).type != "cuda":
        return None
    return int(torch.cuda.mem_get_info(device)[0])


def resident_bytes() -> int:
    """What this process has in memory now."""
    return int(psutil.Process().memory_info().rss)


def free_disk(place: Path) -> int:
    """Bytes free where ``place`` will be."""
    return shutil.disk_usage(_existing(place)).free


def _existing(place: Path) -> Path:
    return next(parent for parent in [place.absolute(), *place.absolute().parents] if parent.is_dir())


def _seconds(work: Callable[[], object], device: str, trial: float) -> float:
    """The median time of one call; the first one, which may set things up, doesn't count.

    On a CPU it is the time that this thread, which takes part in all that torch does in parallel, was at work: what
    else keeps the machine busy during a trial of milliseconds tells nothing about the hours after it.
    """
    clock = time.thread_time if on_processor(device) else time.perf_counter
    work()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - started < trial and len(times) < 50):
        begin = clock()
        work()
        timing.wait(torch.device(device))
        times.append(clock() - begin)
    return max(median(times), 1e-9)


def _random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _product_rate(width: int, dtype: torch.dtype, device: str, trial: float) -> float:
    x_TC, w_OC = _random(_ROWS, width, dtype=dtype, device=device), _random(_OUTPUTS, width, dtype=dtype, device=device)
    return 2 * _ROWS * _OUTPUTS * width / _seconds(lambda: torch.nn.functional.linear(x_TC, w_OC), device, trial)


def _factor_rate(device: str, trial: float) -> float:
    x = _random(_FACTORED, _FACTORED, device=device)
    h_II = x @ x.T + _FACTORED * torch.eye(_FACTORED, device=device)

    def work() -> None:
        lower = torch.linalg.cholesky_ex(h_II)[0]
        torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)

    return 4 * _FACTORED**3 / 3 / _seconds(work, device, trial)


def _sweep_rate(device: str, trial: float) -> float:
    from secateur.solver import obs_sweep

    # as many columns as a sweep takes at once: nothing is left over for the product with the rest
    w_OI, u_II = _random(_OUTPUTS, _SWEPT, device=device), torch.eye(_SWEPT, device=device)
    return w_OI.numel() / _seconds(lambda: obs_sweep(w_OI, u_II, lambda scores: scores > 1.0), device, trial)


def _move_rate(device: str, trial: float) -> float:
    x = _random(_MOVED_BYTES // 4, device=device)
    return 2 * _MOVED_BYTES / _seconds(lambda: x * 2.0, device, trial)


def _rank_rate(job: Job, width: int, moved: float, trial: float) -> float:
    if not isinstance(job.method, WeightMethod):
        return moved / 8
    if not job.method.ruled:
        return moved / 32
    shape = (max(1, _RANKED_ENTRIES // width), width)
    # stored weights have few different values, so that some are always at the threshold
    scores = _random(*shape).bfloat16().float().abs().to(job.device)
    rule = job.method.rule()
    try:
        rule.keep(scores)
    except UsageError:
        # a pattern that doesn't divide is for the run to refuse, which names the matrix
        return moved / 32
    return scores.numel() / _seconds(lambda: rule.keep(scores), job.device, trial)


def _read_rate(files: Iterable[Path], moved: float) -> float:
    """Of the largest file, from its middle on: what was read lately lies at the ends."""
    sizes = {file: file.stat().st_size for file in files if file.is_file()}
    if not sizes:
        return moved / 4
    file = max(sizes, key=lambda f: sizes[f])
    count = min(_FILE_BYTES, sizes[file])
    buffer = bytearray(count)
    begin = time.perf_counter()
    with open(file, "rb", buffering=0) as stream:
        stream.seek((sizes[file] - count) // 2)
        stream.readinto(buffer)
    return count / max(time.perf_counter() - begin, 1e-9)


def _write_rate(place: Path | None, moved: float) -> float:
    if place is None:
        return moved / 8
    data = bytes(_FILE_BYTES)
    try:
        # it has no name where that is possible, and none is left in any case
        with tempfile.TemporaryFile(dir=_existing(place)) as file:
            begin = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return _FILE_BYTES / max(time.perf_counter() - begin, 1e-9)
    except OSError as error:
        raise OutputError(f"can't write to {_existing(place)}: {error.strerror or error}") from None
