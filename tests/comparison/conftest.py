"""One comparison of the tiny checkpoint that several tests look at."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from secateur.comparison import Comparison, compare

QUICK = {"samples": 2, "length": 32, "windows": 6}
METHODS = "random_sp,magnitude_sp,flap,shortgpt,wanda,wanda_sp:heal=refit"


class Compared(NamedTuple):
    comparison: Comparison
    folder: Path


@pytest.fixture(scope="session")
def compared(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Six methods at half of the tiny checkpoint's blocks and less, with two seeds: don't write to its folder."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    found = compare(
        str(tiny_checkpoint), methods=METHODS, sparsity=[0.5, 0.3], seeds=[0, 1], out=folder, tolerance=0.04, **QUICK
    )
    return Compared(found, folder)
