"""Products of the input of a module with itself, or with something of the dense network beside it: what solvers need.

B sequences, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from secateur.observe.statistics import Accumulator, Needs, at_least_float32, column_sums


class Gram(Accumulator):
    """X^T X over all tokens, ``total_CC`` float32 (float64 for float64 inputs), and the ``sequences`` seen."""

    @classmethod
    def needs(cls, channels: int, *, tokens: int, batch: int, length: int) -> Needs:
        """See ``Accumulator``; solving is the Cholesky factor of the inverse, which stays beside the matrix."""
        square = 4 * channels * channels
        return Needs(
            state=square,
            stored=square,
            update=4 * batch * channels,
            moved=2 * 4 * tokens * channels,
            # the scaled matrix, its factor, the inverse, the factor of that, and copies in LAPACK
            solve=5 * square,
            derived=square,
            # six blocks of columns: those on and above the diagonal are 7/12 of the square
            update_flops=2 * tokens * channels * channels * 7 // 12,
            # two factorisations and one inverse
            solve_flops=4 * channels**3 // 3,
        )

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._cache: dict[tuple[str, float], Any] = {}
        self.sequences = 0
        self.tokens = 0

    def update(self, x_BTC: Tensor) -> None:
        self._cache.clear()
        x = x_BTC.reshape(-1, x_BTC.shape[-1])
        exact = x.dtype == torch.bfloat16
        x = x if x.dtype == torch.float64 else x.float()
        channels = x.shape[1]
        if self._total is None:
            self._total = torch.zeros(channels, channels, dtype=x.dtype, device=x.device)
        with _bfloat16_factors() if exact else nullcontext():
            # only blocks on and above the diagonal, where they are large enough: the rest follows by symmetry
            step = max(64, -(-channels // 6)) if channels > 2048 or not exact else channels
            for start in range(0, channels, step):
                left = x[:, start : start + step]
                self._total[start : start + step, start:].addmm_(left.T, x[:, start:])
        self.sequences += x_BTC.shape[0]
        self.tokens += x.shape[0]

    def merge(self, other: Gram) -> None:
        self._cache.clear()
        if other._total is not None:
            self._total = other._total.clone() if self._total is None else self._total + other._total
        self.sequences += other.sequences
        self.tokens += other.tokens

    def cached(self, key: str, option: float, compute: Callable[[Gram], Any]) -> Any:
        """``compute(self)``, once per (key, option): matrices that share this input share its factorisation."""
        if (key, option) not in self._cache:
            self._cache[key, option] = compute(self)
        return self._cache[key, option]

    @property
    def dead(self) -> Tensor:
        """Inputs that were zero in all of the data, bool [channels]."""
        if self._total is None:
            raise ValueError("this Gram matrix has seen no data")
        return self._total.diagonal() == 0

    @property
    def total_CC(self) -> Tensor:
        """The whole symmetric matrix, [channels, channels]."""
        if self._total is None:
            raise ValueError("this Gram matrix has seen no data")
        whole = self._total.triu()
        return whole.add_(whole.triu(1).T)


class _Product(Accumulator):
    """X^T Z over all tokens, float32 (float64 for float64 inputs), and ``sum_C``, the sum of Z, float64.

    X is the input of a module in the network as it is now, and Z something that is known once the same tokens have
    gone through the dense one.
    """

    beside_dense = True

    @classmethod
    def needs(cls, channels: int, *, tokens: int, batch: int, length: int) -> Needs:
        """See ``Accumulator``; not symmetric, so that all of it is computed. Z is taken to be as wide as X."""
        square = 4 * channels * channels
        return Needs(
            state=square + 8 * channels,
            stored=square + 8 * channels,
            # two copies of a batch, of which one is held until the other is there
            update=3 * 4 * batch * channels,
            moved=4 * 4 * tokens * channels,
            update_flops=2 * tokens * channels * channels,
        )

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self.sum_C = torch.zeros((), dtype=torch.float64)
        self.tokens = 0

    def update_pair(self, x_BTC: Tensor, z_BTC: Tensor) -> None:
        """Take in one batch of X and Z, [sequences, tokens, channels] each."""
        x, z = (part.reshape(-1, part.shape[-1]) for part in (x_BTC, z_BTC))
        exact = x.dtype == torch.bfloat16
        x, z = at_least_float32(x), at_least_float32(z)
        if self._total is None:
            self._total = torch.zeros(x.shape[1], z.shape[1], dtype=x.dtype, device=x.device)
        with _bfloat16_factors() if exact else nullcontext():
            self._total.addmm_(x.T, z)
        self.sum_C = self.sum_C.to(z.device) + column_sums(z).double()
        self.tokens += x.shape[0]

    def update(self, x_BTC: Tensor) -> None:
        """X and Z, concatenated along channels, of which both have as many."""
        self.update_pair(*x_BTC.chunk(2, dim=-1))

    def merge(self, other: _Product) -> None:
        if other._total is not None:
            self._total = other._total.clone() if self._total is None else self._total + other._total
        self.sum_C = self.sum_C + other.sum_C
        self.tokens += other.tokens

    def _product(self) -> Tensor:
        if self._total is None:
            raise ValueError("this product has seen no data")
        return self._total


class Cross(_Product):
    """X^T X0 over all tokens: the inputs of a module in the network as it is now, times those in the dense one."""

    paired = True

    @property
    def total_CC(self) -> Tensor:
        """X^T X0, [channels, channels]: rows are inputs as they are now, columns those of the dense network."""
        return self._product()


class Lost(_Product):
    """E^T X over all tokens: what the output of a block has lost against the dense network, times an input within it.

    The block is the dense one in both networks: E is what those before it have lost.
    """

    ending = True

    @property
    def total_OC(self) -> Tensor:
        """E^T X, [outputs of the block, channels of the input]."""
        return self._product().T


@contextmanager
def _bfloat16_factors() -> Iterator[None]:
    """Let float32 products use bfloat16 factors where the machine has them; sums stay float32.

    For factors that come from bfloat16 that loses nothing, and it is several times faster.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
