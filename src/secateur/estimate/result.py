"""An estimate as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from secateur.progress import seconds_text
from secateur.report.numbers import format_bytes


@dataclass(frozen=True)
class StepEstimate:
    """What one step takes, each by part: bytes of ``memory`` at its peak (``device_memory`` where another device
    computes) and of ``disk``, ``flops`` and ``seconds``.
    """

    method: str
    memory: dict[str, int]
    device_memory: dict[str, int]
    disk: dict[str, int]
    flops: dict[str, int]
    seconds: dict[str, float]
    reach: str = ""
    """what of the blocks is left alone; empty where nothing is"""

    @property
    def memory_bytes(self) -> int:
        """The peak of this step."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Estimate:
    """What a run takes and what there is, in bytes and seconds; ``startup`` seconds are over when the run begins.

    ``bytes_before`` and ``bytes_after`` are those of the checkpoint. The pruned model can be at most ``speed_bound``
    times as fast. ``free_disk`` is None when nobody said where the output goes, ``available_device_memory`` when the
    CPU computes. ``remedy`` names what would make the run fit, and ``work`` is what is done with the model. Of several
    ``ranks`` on this machine each takes the memory, and has an equal part of what is available.
    """

    model: str
    dtype: str
    steps: tuple[StepEstimate, ...]
    available_memory: int
    available_device_memory: int | None
    free_disk: int | None
    startup: float
    bytes_before: int
    bytes_after: int
    speed_bound: float
    remedy: str = ""
    work: str = "pruning"
    ranks: int = 1

    @property
    def memory_bytes(self) -> int:
        """Peak memory of the process."""
        return max(step.memory_bytes for step in self.steps)

    @property
    def device_memory_bytes(self) -> int:
        """Peak memory of the device that computes, where that isn't the CPU."""
        return max(sum(step.device_memory.values()) for step in self.steps)

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk when the run's folder is at its fullest: steps keep theirs until the end."""
        return sum(sum(step.disk.values()) for step in self.steps)

    @property
    def flops(self) -> int:
        """Operations of matrix products; a multiplication with its addition is two."""
        return sum(sum(step.flops.values()) for step in self.steps)

    @property
    def seconds(self) -> float:
        """Time from the start of the process to the end of the run."""
        return self.startup + sum(sum(step.seconds.values()) for step in self.steps)

    @property
    def fits_memory(self) -> bool:
        return self.memory_bytes <= self.available_memory

    @property
    def fits_device(self) -> bool:
        return self.available_device_memory is None or self.device_memory_bytes <= self.available_device_memory

    @property
    def fits_disk(self) -> bool:
        return self.free_disk is None or self.disk_bytes <= self.free_disk

    @property
    def problem(self) -> str:
        """One sentence about why it can't fit and what would make it; empty when it fits."""
        if not self.fits_memory:
            each = " for each" if self.ranks > 1 else ""
            short = f"{self._memory}, and {format_bytes(self.available_memory)} are there{each}"
        elif not self.fits_device:
            assert self.available_device_memory is not None
            there = format_bytes(self.available_device_memory)
            short = f"{format_bytes(self.device_memory_bytes)} of the device's memory, and {there} are there"
        elif not self.fits_disk:
            assert self.free_disk is not None
            short = f"{format_bytes(self.disk_bytes)} of disk, and {format_bytes(self.free_disk)} are free"
        else:
            return ""
        return f"{self.work} {self.model} would take {short}: {self.remedy}"

    def line(self) -> str:
        """``1.9 GB of memory, 3.2 GB of disk, about 4 min``."""
        time = about(self.seconds - self.startup)
        return f"{self._memory}, {format_bytes(self.disk_bytes)} of disk, {time}"

    @property
    def _memory(self) -> str:
        each = f" in each of {self.ranks} ranks" if self.ranks > 1 else ""
        return f"{format_bytes(self.memory_bytes)} of memory{each}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, the sums among them."""
        sums = ("memory_bytes", "device_memory_bytes", "disk_bytes", "flops", "seconds")
        verdicts = ("fits_memory", "fits_device", "fits_disk", "problem")
        return {**asdict(self), **{name: getattr(self, name) for name in (*sums, *verdicts)}}


def about(seconds: float) -> str:
    """``about 40 s``, ``about 4 min``, ``about 2 h 5 min``: no more digits than an estimate has."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    if seconds < 5400:
        return f"about {round(seconds / 60)} min"
    return f"about {seconds_text(seconds)}"
