"""Freed memory is kept within a block, and goes back to the system after it."""

import os
import platform
import subprocess
import sys

import psutil
import pytest
import torch

from secateur.memory import TOLD, trim

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory in a way that can be told"
)


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
def test_tensors_of_some_megabytes_get_the_pages_of_those_before(told: bool) -> None:
    # a fresh process: what others have freed here moves the limits too
    environment = {name: value for name, value in os.environ.items() if name not in TOLD}
    environment |= {"MALLOC_TRIM_THRESHOLD_": "1000000"} if told else {}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    left_alone, kept = map(float, done.stdout.split())
    assert left_alone > 10
    assert (kept > 10) if told else (kept < 2)
