"""What took part in a run: library versions and the machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

_LIBRARIES = ("secateur", "torch", "transformers", "safetensors", "numpy")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what a plan looks like."""
    from secateur import __version__

    found = {"python": platform.python_version(), "secateur": __version__}
    for name in _LIBRARIES[1:]:
        found[name] = metadata.version(name)
    return found


def machine() -> dict[str, Any]:
    """Processor, cores and accelerator, for the protocol of a measurement."""
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": card,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
