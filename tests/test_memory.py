"""Freed memory goes back to the system."""

import platform

import psutil
import pytest
import torch

from secateur.memory import trim


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory in a way that can be told")
def test_holes_between_tensors_are_given_back() -> None:
    process = psutil.Process()
    # small enough to lie in a heap, each second one stays
    tensors = [torch.ones(16_000) for _ in range(4_000)]
    full = process.memory_info().rss
    tensors = tensors[1::2]
    trim()
    assert full - process.memory_info().rss > 60e6
