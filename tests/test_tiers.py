"""What ``make test`` leaves out has a small test beside it that it runs."""

from __future__ import annotations

import tiers


def test_every_slow_test_names_a_small_one(collected):
    assert tiers.wrong(collected) == []
