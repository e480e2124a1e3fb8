"""What calibration data tells about a tensor, as mergeable accumulators.

Law: for any split of the data into consecutive parts, updating one accumulator per part and merging them in order
equals one accumulator that saw everything (to rounding). That is what makes a statistic streamable, resumable and
distributable. Sums are float32 or better. B sequences, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
            total_C += column_sums(rows.copy_(part).square_()).double()
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
            sum_C += column_sums(rows).double()
            square_C += column_sums(rows.square_()).double()
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
        self._cache = (at_least_float32(weight_OI), columns_UW.to(weight_OI.device))

    def update(self, x_BTC: Tensor) -> None:
        if self._cache is None:
            raise ValueError("contributions to an output need the weight that gives it")
        weight_OI, columns_UW = self._cache
        x_BTC = at_least_float32(x_BTC).to(weight_OI.dtype)
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


def at_least_float32(x: Tensor) -> Tensor:
    """Float64 as it is, all else as float32."""
    return x if x.dtype == torch.float64 else x.float()


# rows that stay in a processor's cache while they are converted, squared and summed
_ROWS = 512


def _parts(flat_NC: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive rows, and a float32 buffer of their shape that all parts share; on a GPU all rows at once."""
    size = _ROWS if flat_NC.device.type == "cpu" else flat_NC.shape[0]
    buffer = torch.empty(min(size, flat_NC.shape[0]), flat_NC.shape[1], device=flat_NC.device)
    for part in flat_NC.split(max(size, 1)):
        yield part, buffer[: part.shape[0]]


def column_sums(x_NC: Tensor) -> Tensor:
    """Sum over the rows, as a product with ones: several times faster than torch's reduction over the first axis."""
    return x_NC.new_ones(x_NC.shape[0]) @ x_NC
