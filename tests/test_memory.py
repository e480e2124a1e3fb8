"""What of memory there is; freed memory is kept within a block, and goes back to the system after it."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from secateur import memory
from secateur.memory import TOLD, trim

glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory in a way that can be told"
)


@glibc
def test_holes_between_tensors_are_given_back() -> None:
    process = psutil.Process()
    # small enough to lie in a heap, each second one stays
    tensors = [torch.ones(16_000) for _ in range(4_000)]
    full = process.memory_info().rss
    tensors = tensors[1::2]
    trim()
    assert full - process.memory_info().rss > 60e6


FAULTS = """
import resource, torch
from secateur.memory import reuse

def fetched():
    "How often the pages of four tensors of 8 MiB are fetched while these are made and dropped twenty times."
    before, size = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, 8 << 20
    for _ in range(20):
        tensors = [torch.ones(size, dtype=torch.uint8) for _ in range(4)]
        del tensors
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / (4 * size)

left_alone = fetched()
reuse()
print(left_alone, fetched())
"""


@pytest.mark.parametrize("told", [False, True])
@glibc
def test_tensors_of_some_megabytes_get_the_pages_of_those_before(told: bool) -> None:
    # a fresh process: what others have freed here moves the limits too
    environment = {name: value for name, value in os.environ.items() if name not in TOLD}
    environment |= {"MALLOC_TRIM_THRESHOLD_": "1000000"} if told else {}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    left_alone, kept = map(float, done.stdout.split())
    assert left_alone > 10
    assert (kept > 10) if told else (kept < 2)


STATISTICS = "anon 600\nfile 300\nactive_file 100\ninactive_file 50\nslab 20\n"


@pytest.mark.parametrize(
    ("files", "left"),
    [
        # files that were read give way: 1000 - 900 + 100 + 50
        ({"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": STATISTICS}, 250),
        ({"memory.max": "max\n", "memory.current": "900\n", "memory.stat": STATISTICS}, 10**6),
        ({"memory.max": "1000\n", "memory.current": "1200\n", "memory.stat": STATISTICS}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "1000\n",
                "memory/memory.usage_in_bytes": "900\n",
                "memory/memory.stat": STATISTICS,
            },
            250,
        ),
        ({}, 10**6),
    ],
)
def test_the_limit_of_a_container_counts_without_the_files_that_it_read(tmp_path, monkeypatch, files, left):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf8")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    assert memory.available_memory() == left
