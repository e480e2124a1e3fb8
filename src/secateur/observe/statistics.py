"""What calibration data tells about a tensor, as mergeable accumulators.

Law: for any split of the data into consecutive parts, updating one accumulator per part and merging them in order
equals one accumulator that saw everything (to rounding). That is what makes a statistic streamable, resumable and
distributable. Sums are float32 or better. B sequences, T tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Statistic(Protocol):
    """A mergeable accumulator over the input of a module."""

    def update(self, x_BTC: Tensor) -> None:
        """Take in one batch, [sequences, tokens, channels]; every sequence lies whole within one batch."""
        ...

    def merge(self, other: Any) -> None:
        """Take in everything that ``other`` has seen; ``other`` saw the data that follows."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What it has seen, as tensors by name: what is stored, resumed from and sent to other ranks."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Be what ``state`` was taken from."""
        ...


@dataclass(frozen=True)
class Needs:
    """What a statistic of one input takes, for estimates.

    Bytes: ``state`` while it is there, ``stored`` in a file, ``update`` on top during one batch, ``solve`` on top of
    all while a method derives from it what it needs, ``derived`` what stays of that. Operations of matrix products:
    ``update_flops`` for all tokens, ``solve_flops`` once. ``moved`` bytes pass through memory for all tokens.
    """

    state: int
    stored: int
    update: int
    moved: int
    solve: int = 0
    derived: int = 0
    update_flops: int = 0
    solve_flops: int = 0


def beside_dense(statistics: Mapping[str, type[Statistic]]) -> bool:
    """Whether some of these are of the dense network as well, whose hidden states go beside those of the cut one."""
    return any(getattr(kind, "beside_dense", False) for kind in statistics.values())


def of_ending(statistics: Mapping[str, type[Statistic]]) -> list[str]:
    """The names of those that are taken of what a block gives, at the input of the module that ends it."""
    return [name for name, kind in statistics.items() if getattr(kind, "ending", False)]


class Accumulator:
    """A statistic whose attributes are tensors, numbers, or lists of either; names with ``_cache`` aside."""

    @classmethod
    def needs(cls, channels: int, *, tokens: int, batch: int, length: int) -> Needs:
        """What it takes for ``channels`` channels, ``tokens`` tokens in all, ``batch`` of them at a time.

        ``length`` is the number of tokens in a sequence. The default is that of a few float64 sums per channel,
        taken from a float32 copy of a batch and its squares.
        """
        sums = 2 * 8 * channels
        return Needs(state=sums, stored=sums, update=2 * 4 * batch * channels, moved=6 * 4 * tokens * channels)

    def state(self) -> dict[str, Tensor]:
        """See ``Statistic``."""
        found = {}
        for name, value in vars(self).items():
            if name == "_cache" or value is None or (isinstance(value, list) and not value):
                continue
            if isinstance(value, list) and isinstance(value[0], Tensor):
                value = torch.cat(value)
            elif not isinstance(value, Tensor):
                value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
            found[name] = value
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See ``Statistic``."""
        for name, value in state.items():
            old = getattr(self, name)
            if isinstance(old, list):
                setattr(self, name, [value] if value.dim() > 1 else value.tolist())
            elif isinstance(old, (int, float)):
                setattr(self, name, type(old)(value))
            else:
                setattr(self, name, value)


class SumSquares(Accumulator):
    """Sum of squares per channel: ``total_C`` float64, ``sequences`` and ``tokens`` seen."""

    def __init__(self) -> None:
        # no dimension, so that it adds to sums on any device
        self.total_C = torch.zeros((), dtype=torch.float64)
        self.sequences = 0
        self.tokens = 0

    def update(self, x_BTC: Tensor) -> None:
        flat = x_BTC.reshape(-1, x_BTC.shape[-1])
        total_C = torch.zeros(flat.shape[1], dtype=torch.float64, device=flat.device)
        # float32 within a part, float64 across parts
        for part, rows in _parts(flat):
            total_C += _column_sums(rows.copy_(part).square_()).double()
        self.total_C = self.total_C.to(total_C.device) + total_C
        self.sequences += x_BTC.shape[0]
        self.tokens += flat.shape[0]

    def merge(self, other: SumSquares) -> None:
        self.total_C = self.total_C + other.total_C
        self.sequences += other.sequences
        self.tokens += other.tokens

    def mean_per_sequence(self) -> Tensor:
        """Average over sequences of ||X_j||^2 (Wanda's a_j), [channels] float64."""
        return self.total_C / max(self.sequences, 1)


class Moments(Accumulator):
    """Mean and variance per channel over all tokens, float64, merged by Chan's formula."""

    def __init__(self) -> None:
        self.count = 0
        self.mean_C = torch.zeros((), dtype=torch.float64)
        self.m2_C = torch.zeros((), dtype=torch.float64)

    def update(self, x_BTC: Tensor) -> None:
        flat = x_BTC.reshape(-1, x_BTC.shape[-1])
        # squares are taken around a mean that is near: no cancellation, so float32 is enough within a part
        shift_C = (self.mean_C if self.count else flat[:_ROWS].float().mean(dim=0)).to(flat.device, torch.float32)
        sum_C, square_C = torch.zeros(2, flat.shape[1], dtype=torch.float64, device=flat.device)
        for part, rows in _parts(flat):
            torch.sub(part, shift_C, out=rows)
            sum_C += _column_sums(rows).double()
            square_C += _column_sums(rows.square_()).double()
        count = flat.shape[0]
        self._add(count, shift_C.double() + sum_C / count, square_C - sum_C.square() / count)

    def merge(self, other: Moments) -> None:
        if other.count:
            self._add(other.count, other.mean_C, other.m2_C)

    def _add(self, count: int, mean: Tensor, m2: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean_C
        self.m2_C = self.m2_C + m2 + delta.square() * (self.count * count / total)
        self.mean_C = self.mean_C + delta * (count / total)
        self.count = total

    def variance(self) -> Tensor:
        """Sample variance (N - 1), [channels] float64."""
        return self.m2_C / max(self.count - 1, 1)


class SequenceMoments(Accumulator):
    """Sum and sum of squares of every sequence, kept in order: [sequences, channels] float32 each.

    For recursions that depend on the order of the sequences, such as FLAP's published streaming update.
    """

    @classmethod
    def needs(cls, channels: int, *, tokens: int, batch: int, length: int) -> Needs:
        """See ``Accumulator``: float64 sums of every sequence, from a float64 copy of a batch and its squares."""
        sums = 2 * 8 * channels * (tokens // length)
        return Needs(state=sums, stored=sums, update=2 * 8 * batch * channels, moved=8 * 8 * tokens * channels)

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._squares: list[Tensor] = []
        self.tokens_per_sequence: list[int] = []

    def update(self, x_BTC: Tensor) -> None:
        x = x_BTC.double()
        self._sums.append(x.sum(dim=1))
        self._squares.append(x.square().sum(dim=1))
        self.tokens_per_sequence += [x.shape[1]] * x.shape[0]

    def merge(self, other: SequenceMoments) -> None:
        self._sums += other._sums
        self._squares += other._squares
        self.tokens_per_sequence += other.tokens_per_sequence

    @property
    def sums_NC(self) -> Tensor:
        """Sum over the tokens of every sequence, [sequences, channels] float64."""
        return torch.cat(self._sums)

    @property
    def squares_NC(self) -> Tensor:
        """Sum of squares over the tokens of every sequence, [sequences, channels] float64."""
        return torch.cat(self._squares)


class Amplitudes(Accumulator):
    """How large each channel is in a sequence, in three ways, summed over sequences, [3, channels] float64.

    The rows are the mean of |x| over the tokens of the sequence, the norm of x, and the variance of x (``WAYS``).
    ``total_KC`` sums them and ``squares_KC`` their squares, so every sequence weighs the same whatever its length.
    """

    WAYS = ("mean", "l2", "var")

    @classmethod
    def needs(cls, channels: int, *, tokens: int, batch: int, length: int) -> Needs:
        """See ``Accumulator``: six float64 sums, from a float64 copy of a batch, its sizes and its squares."""
        sums = 6 * 8 * channels
        return Needs(state=sums, stored=sums, update=3 * 8 * batch * channels, moved=14 * 4 * tokens * channels)

    def __init__(self) -> None:
        self.total_KC = torch.zeros((), dtype=torch.float64)
        self.squares_KC = torch.zeros((), dtype=torch.float64)
        self.sequences = 0

    def update(self, x_BTC: Tensor) -> None:
        x = x_BTC.double()
        found_KBC = torch.stack([x.abs().mean(dim=1), x.norm(dim=1), x.var(dim=1, correction=0)])
        self.total_KC = self.total_KC.to(x.device) + found_KBC.sum(dim=1)
        self.squares_KC = self.squares_KC.to(x.device) + found_KBC.square().sum(dim=1)
        self.sequences += x.shape[0]

    def merge(self, other: Amplitudes) -> None:
        self.total_KC = self.total_KC + other.total_KC
        self.squares_KC = self.squares_KC + other.squares_KC
        self.sequences += other.sequences

    def over(self, tokens: str, sequences: str) -> Tensor:
        """[channels] float64: the ``mean``, ``l2`` or ``var`` over sequences of that over the tokens of each."""
        row = self.WAYS.index(tokens)
        mean_C = self.total_KC[row] / max(self.sequences, 1)
        if sequences == "l2":
            return self.squares_KC[row].sqrt()
        if sequences == "var":
            # not below zero by rounding
            return (self.squares_KC[row] / max(self.sequences, 1) - mean_C.square()).clamp_min(0)
        return mean_C


class Contributions(Accumulator):
    """How much each unit adds to the output of the linear module that reads it: ``total_U`` float64, and ``sequences``.

        I_u = mean over the tokens of a sequence of sum over outputs |(x_u W_u)_o|        x_u the columns of unit u

    summed over sequences. It must be told the weight before it can be updated (``reads``).
    """

    reads = True

    @classmethod
    def needs(cls, channels: int, *, tokens: int, batch: int, length: int) -> Needs:
        """See ``Accumulator``; a head at a time, of a matrix that is about square."""
        return Needs(
            state=8 * channels,
            stored=8 * channels,
            update=2 * 4 * batch * channels,
            moved=8 * 4 * tokens * channels,
            update_flops=2 * tokens * channels * channels,
        )

    def __init__(self) -> None:
        self.total_U = torch.zeros((), dtype=torch.float64)
        self.sequences = 0
        # a name that keeps it out of what is stored
        self._cache: tuple[Tensor, Tensor] | None = None

    def read_by(self, weight_OI: Tensor, columns_UW: Tensor) -> None:
        """The weight of the module that reads the input, and the columns of every unit, int64."""
        self._cache = (_at_least_float32(weight_OI), columns_UW.to(weight_OI.device))

    def update(self, x_BTC: Tensor) -> None:
        if self._cache is None:
            raise ValueError("contributions to an output need the weight that gives it")
        weight_OI, columns_UW = self._cache
        x_BTC = _at_least_float32(x_BTC).to(weight_OI.dtype)
        if columns_UW.shape[1] == 1:
            # a single column gives |x| * ||W_u||_1, token by token
            each_BTU = x_BTC.abs()[..., columns_UW[:, 0]] * weight_OI.abs().sum(dim=0)[columns_UW[:, 0]]
        else:
            # one unit at a time: outputs of all of them together would be as many times larger
            added = (x_BTC[..., columns_W] @ weight_OI[:, columns_W].T for columns_W in columns_UW)
            each_BTU = torch.stack([added_BTO.abs().sum(dim=-1) for added_BTO in added], dim=-1)
        self.total_U = self.total_U.to(each_BTU.device) + each_BTU.double().mean(dim=1).sum(dim=0)
        self.sequences += x_BTC.shape[0]

    def merge(self, other: Contributions) -> None:
        self.total_U = self.total_U + other.total_U
        self.sequences += other.sequences

    def mean_U(self) -> Tensor:
        """Average over sequences, [units] float64."""
        return self.total_U / max(self.sequences, 1)


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
        x, z = _at_least_float32(x), _at_least_float32(z)
        if self._total is None:
            self._total = torch.zeros(x.shape[1], z.shape[1], dtype=x.dtype, device=x.device)
        with _bfloat16_factors() if exact else nullcontext():
            self._total.addmm_(x.T, z)
        self.sum_C = self.sum_C.to(z.device) + _column_sums(z).double()
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


class Similarity(Accumulator):
    """Sum over tokens of the cosine between a block's input and output, float64 (ShortGPT's Block Influence)."""

    def __init__(self) -> None:
        self.total = 0.0
        self.tokens = 0

    def update_pair(self, before_BTD: Tensor, after_BTD: Tensor) -> None:
        """Take in one batch of hidden states before and after the block."""
        cosine = torch.nn.functional.cosine_similarity(before_BTD.float(), after_BTD.float(), dim=-1)
        self.total += float(cosine.double().sum())
        self.tokens += cosine.numel()

    def update(self, x_BTC: Tensor) -> None:
        """Input and output of the block, concatenated along channels."""
        before, after = x_BTC.chunk(2, dim=-1)
        self.update_pair(before, after)

    def merge(self, other: Similarity) -> None:
        self.total += other.total
        self.tokens += other.tokens

    @property
    def mean(self) -> float:
        """Average cosine, in [-1, 1]."""
        return self.total / max(self.tokens, 1)


def angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles between vectors along the last dimension as fractions of pi, float64 in [0, 1]; 1/3 where one is zero."""
    first, second = first.double(), second.double()
    norms = first.norm(dim=-1) * second.norm(dim=-1)
    # CFSP's published code takes 0.5 for a cosine that is not a number
    cosine = torch.where(norms > 0, (first * second).sum(dim=-1) / norms, 0.5)
    return cosine.clamp(-1, 1).arccos() / math.pi


class LastTokens(Accumulator):
    """Input and output of a block at the last token of every sequence, in order, float32 (float64 for float64 ones)."""

    @classmethod
    def needs(cls, channels: int, *, tokens: int, batch: int, length: int) -> Needs:
        """See ``Accumulator``: one row for every sequence, and nothing else is looked at."""
        rows = 4 * channels * (tokens // length)
        return Needs(state=rows, stored=rows, update=0, moved=rows)

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def update(self, x_BTC: Tensor) -> None:
        """Input and output of the block, concatenated along channels."""
        # a copy, so that the whole batch needn't stay
        self._rows.append(_at_least_float32(x_BTC[:, -1]).clone())

    def merge(self, other: LastTokens) -> None:
        self._rows += other._rows

    @property
    def rows_NC(self) -> Tensor:
        """[sequences, channels]: the first half of the channels entered the block, the second half left it."""
        return torch.cat(self._rows)


class Angle(Accumulator):
    """Sum over tokens of the angle between a block's input and output, as a fraction of pi, float64 (CFSP)."""

    def __init__(self) -> None:
        self.total = 0.0
        self.tokens = 0

    def update(self, x_BTC: Tensor) -> None:
        """Input and output of the block, concatenated along channels; a token of zeros on one side counts as 1/3."""
        angle = angles(*x_BTC.chunk(2, dim=-1))
        self.total += float(angle.sum())
        self.tokens += angle.numel()

    def merge(self, other: Angle) -> None:
        self.total += other.total
        self.tokens += other.tokens

    @property
    def mean(self) -> float:
        """Average angle over pi, in [0, 1]."""
        return self.total / max(self.tokens, 1)


class Change(Accumulator):
    """Sums over tokens of what a block changes in its input, float64: mean over channels of squares and of sizes."""

    def __init__(self) -> None:
        self.squares = 0.0
        self.sizes = 0.0
        self.tokens = 0

    def update(self, x_BTC: Tensor) -> None:
        """Input and output of the block, concatenated along channels."""
        before, after = (half.float() for half in x_BTC.chunk(2, dim=-1))
        change = (after - before).double()
        self.squares += float(change.square().mean(dim=-1).sum())
        self.sizes += float(change.abs().mean(dim=-1).sum())
        self.tokens += change.shape[:-1].numel()

    def merge(self, other: Change) -> None:
        self.squares += other.squares
        self.sizes += other.sizes
        self.tokens += other.tokens

    @property
    def square(self) -> float:
        """Mean squared change of an entry."""
        return self.squares / max(self.tokens, 1)

    @property
    def absolute(self) -> float:
        """Mean size of the change of an entry."""
        return self.sizes / max(self.tokens, 1)


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


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# rows that stay in a processor's cache while they are converted, squared and summed
_ROWS = 512


def _parts(flat_NC: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive rows, and a float32 buffer of their shape that all parts share; on a GPU all rows at once."""
    size = _ROWS if flat_NC.device.type == "cpu" else flat_NC.shape[0]
    buffer = torch.empty(min(size, flat_NC.shape[0]), flat_NC.shape[1], device=flat_NC.device)
    for part in flat_NC.split(max(size, 1)):
        yield part, buffer[: part.shape[0]]


def _column_sums(x_NC: Tensor) -> Tensor:
    """Sum over the rows, as a product with ones: several times faster than torch's reduction over the first axis."""
    return x_NC.new_ones(x_NC.shape[0]) @ x_NC
