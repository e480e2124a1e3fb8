"""Block coordinate descent on masks: again and again, which of n doubtful weights of one matrix should be pruned?

Every step exchanges pruned weights of a matrix for kept ones, so the number of weights that each matrix keeps never
changes, and what is kept has its original value. What a step does depends on the seed, its number and the state
alone: a search that goes on from a saved state ends as one that was never stopped. O outputs, I inputs, n weights.

Source: iCBS, arXiv:2411.17796.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import DataError, UsageError
from secateur.search.quadratic import FactoredQuadratic, Quadratic, outer_quadratic, quadratic
from secateur.search.told import Batch, Loss, Told, exact_hessian, listen, mean_loss
from secateur.solver.binary import BinarySolver, SwapSearch, minimise, start_with_fewer

SELECTIONS = ("gradient", "magnitude", "wanda", "random")
CURVATURES = ("gradient_per_sample", "gradient_mean", "exact")


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How masks are searched; the fields are the options of ``icbs``, which explains them."""

    block: int = 1024
    steps: int = 0
    min_steps: int = 1
    epochs: int = 1
    batch: int = 8
    together: int = 1
    selection: str = "gradient"
    hessian: str = "gradient_per_sample"
    gradient_multiplier: float = 0.75
    ridge: float = 0.001
    tabu: float = 0.40
    fix_pruned: float = 0.42
    fix_kept: float = 0.35
    remove_zero_rows: bool = False
    cutoff: str = "abs"
    checks: int = 10
    seed: int = 0
    solver: BinarySolver = field(default_factory=SwapSearch)


@dataclass(frozen=True)
class Searched:
    """A matrix whose mask is to be searched: that of the linear layer ``name``, stored as [I, O] if ``transposed``.

    ``keep`` is the first mask and ``score`` what it came from, both [O, I], higher = keep.
    """

    name: str
    keep: Tensor
    score: Tensor
    transposed: bool = False


@dataclass(frozen=True)
class Move:
    """One step: ``before`` is the loss of its batch, ``predicted`` what the quadratic model says of the change.

    ``measured`` is the change of the loss on the same batch, None where it was not looked at. ``exchanged`` weights
    were pruned, and as many restored.
    """

    step: int
    layer: str
    before: float
    predicted: float
    measured: float | None
    exchanged: int


class _Matrix:
    """A matrix at work; entries are counted row by row in [O, I]."""

    def __init__(self, module: nn.Module, searched: Searched, settings: Descent) -> None:
        self.layer = module.get_submodule(searched.name)
        self.name, self.transposed = searched.name, searched.transposed
        self.original = self.weight_OI.detach().clone()
        device, self.columns = self.original.device, self.original.shape[1]
        self.keep = searched.keep.to(device).flatten().clone()
        self.free = ~_fixed(searched.score.to(device).flatten(), self.keep, settings)
        count = int(self.free.sum())
        length = int(settings.tabu * count)
        # without it nothing would be left to choose from
        self.tabu_length = length if count - length >= settings.block else 0
        self.tabu = torch.empty(0, dtype=torch.int64)
        self.write(torch.arange(self.keep.numel(), device=device))

    @property
    def weight_OI(self) -> Tensor:
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return weight.T if self.transposed else weight

    def places(self, index_n: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, columns) of entries."""
        return index_n // self.columns, index_n % self.columns

    def write(self, index_n: Tensor) -> None:
        """Let the module's weight be what the mask says at these entries."""
        places = self.places(index_n)
        with torch.no_grad():
            self.weight_OI[places] = torch.where(self.keep[index_n], self.original[places], 0)


class MaskDescent:
    """Searches the masks of linear layers of ``module``, which is changed: give it a copy, in evaluation mode.

    ``data`` are tensors whose first dimension are samples, and ``loss(module, batch)`` gives one loss for each of
    them; ``samples_at_once`` go through the module together. ``trace`` are the steps so far. Raises DataError without
    data, UsageError for steps that can't be spread over the matrices.
    """

    def __init__(
        self,
        module: nn.Module,
        matrices: Sequence[Searched],
        data: Batch,
        loss: Loss,
        settings: Descent,
        *,
        samples_at_once: int | None = None,
    ) -> None:
        if not len(data[0]):
            raise DataError("the data that was given is empty, and a search of masks needs some")
        self.settings, self._module, self._loss, self._data = settings, module.requires_grad_(False), loss, data
        self._at_once = samples_at_once or len(data[0])
        self._matrices = [_Matrix(module, searched, settings) for searched in matrices]
        self._slots = step_slots([m.keep.numel() for m in self._matrices], settings.steps, settings.min_steps)
        self.total = len(self._slots) * settings.epochs
        order = [slot for epoch in range(settings.epochs) for slot in self._order(epoch)]
        self._batches = list(batches(order, settings.together))
        # the step that every batch begins with
        self._firsts = list(accumulate(map(len, self._batches), initial=0))[:-1]
        checks = min(settings.checks, self.total)
        self._checked = {math.ceil((i + 1) * self.total / checks) - 1 for i in range(checks)}
        self.trace: list[Move] = []

    @property
    def finished(self) -> bool:
        """True when all steps have been made."""
        return len(self.trace) >= self.total

    def masks(self) -> dict[str, Tensor]:
        """The masks so far by the name of the layer, bool [outputs, inputs], True = kept."""
        return {m.name: m.keep.reshape(m.original.shape).clone() for m in self._matrices}

    def run(self) -> dict[str, Tensor]:
        """All steps that are left; returns ``masks()``."""
        while not self.finished:
            self.step()
        return self.masks()

    def step(self) -> list[Move]:
        """One batch, and a step for each of the matrices that it is for, all from the weights as they were before.

        Raises NonFiniteError or UnsupportedModelError.
        """
        done = len(self.trace)
        number = self._batch_of(done)
        chosen = self._batches[number]
        numbers = range(done, self._firsts[number] + len(chosen))
        matrices, batch = [self._matrices[i] for i in chosen[-len(numbers) :]], self._batch(number)
        layers = [matrix.layer for matrix in matrices]
        heard = listen(self._module, layers, batch, self._loss, samples_at_once=self._at_once)
        moves = [self._move(*one, batch) for one in zip(numbers, matrices, heard, strict=True)]
        if self._checked.intersection(numbers):
            after = mean_loss(self._module, batch, self._loss, samples_at_once=self._at_once)
            moves[-1] = replace(moves[-1], measured=after - heard[0].loss)
        self.trace += moves
        return moves

    def _move(self, number: int, matrix: _Matrix, told: Told, batch: Batch) -> Move:
        """Exchange weights of a matrix."""
        gradient = told.mean().flatten()
        index_n, k = self._block(matrix, self._scores(matrix, told, gradient, number))
        predicted, exchanged = 0.0, 0
        if 0 < k < len(index_n):
            pruned, predicted = self._solve(number, matrix, told, gradient[index_n], index_n, k, batch)
            exchanged = int((pruned & matrix.keep[index_n]).sum())
            matrix.keep[index_n] = ~pruned
            matrix.write(index_n)
            if matrix.tabu_length:
                matrix.tabu = torch.cat([matrix.tabu, index_n.cpu()])[-matrix.tabu_length :]
        return Move(number + 1, matrix.name, told.loss, predicted, None, exchanged)

    def state(self) -> dict[str, Tensor]:
        """Everything that the steps so far have changed."""
        found = {f"mask/{m.name}": torch.from_numpy(np.packbits(m.keep.cpu().numpy())) for m in self._matrices}
        found |= {f"tabu/{m.name}": m.tabu.clone() for m in self._matrices}
        number = {m.name: i for i, m in enumerate(self._matrices)}
        rows = [
            (
                m.step,
                number[m.layer],
                m.before,
                m.predicted,
                math.nan if m.measured is None else m.measured,
                m.exchanged,
            )
            for m in self.trace
        ]
        return found | {"trace": torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` was taken from."""
        for matrix in self._matrices:
            bits = np.unpackbits(state[f"mask/{matrix.name}"].numpy(), count=matrix.keep.numel())
            matrix.keep = torch.from_numpy(bits.astype(bool)).to(matrix.keep.device)
            matrix.tabu = state[f"tabu/{matrix.name}"]
            matrix.write(torch.arange(matrix.keep.numel(), device=matrix.keep.device))
        self.trace = [
            Move(int(s), self._matrices[int(m)].name, b, p, None if math.isnan(c) else c, int(e))
            for s, m, b, p, c, e in state["trace"].tolist()
        ]

    def notes(self) -> list[str]:
        """What happened, for the plan: a line for every step whose change was measured, and one for all."""
        checked = []
        for move in self.trace:
            if move.measured is None:
                continue
            first = self._firsts[self._batch_of(move.step - 1)]
            predicted = sum(one.predicted for one in self.trace[first : move.step])
            what = f"step {move.step}, {move.layer}" if first + 1 == move.step else f"steps {first + 1} to {move.step}"
            checked.append(f"{what}: loss {move.before:.4f}, predicted {predicted:+.1e}, measured {move.measured:+.1e}")
        exchanged = sum(m.exchanged for m in self.trace)
        return [*checked, f"{exchanged} weights exchanged in {len(self.trace)} steps"]

    def _solve(
        self, number: int, matrix: _Matrix, told: Told, g_n: Tensor, index_n: Tensor, k: int, batch: Batch
    ) -> tuple[Tensor, float]:
        """(which of the block are pruned, by how much the loss should change)."""
        settings = self.settings
        model = self._model(matrix, told, g_n, index_n, batch).cpu()
        pruned, left = torch.zeros(len(index_n), dtype=torch.bool), torch.ones(len(index_n), dtype=torch.bool)
        if settings.remove_zero_rows:
            free = model.free.nonzero().flatten()
            # of more than are wanted some, by lot
            order = torch.randperm(len(free), generator=self._lot("free", number))
            pruned[free[order[:k]]] = True
            left = ~model.free
        wanted = k - int(pruned.sum())
        if wanted:
            order = left.nonzero().flatten()
            if (ones := int(left[:k].sum())) > wanted:
                # free ones that were kept take the places of some that were pruned
                order = order[start_with_fewer(model.problem(left, settings.cutoff), ones, wanted)]
            found = minimise(settings.solver, model.problem(order, settings.cutoff), wanted)
            pruned[order] = torch.from_numpy(found)
        return pruned.to(index_n.device), model.change(pruned)

    def _model(
        self, matrix: _Matrix, told: Told, g_n: Tensor, index_n: Tensor, batch: Batch
    ) -> Quadratic | FactoredQuadratic:
        """The change of the loss by which of the block are pruned."""
        settings, places = self.settings, matrix.places(index_n)
        weights = matrix.original[places], matrix.weight_OI[places], g_n
        expansion = {"multiplier": settings.gradient_multiplier, "ridge": settings.ridge}
        if settings.hessian == "exact":
            stored = places[::-1] if matrix.transposed else places
            H = exact_hessian(self._module, matrix.layer.weight, stored, batch, self._loss)  # type: ignore[arg-type]
            return quadratic(*weights, H, **expansion)
        if settings.hessian == "gradient_mean":
            return outer_quadratic(*weights, g_n.double()[None] / math.sqrt(told.samples), **expansion)
        return outer_quadratic(*weights, told.per_sample(*places), **expansion)

    def _block(self, matrix: _Matrix, score: Tensor) -> tuple[Tensor, int]:
        """(entries of the block, pruned ones first; how many of them are pruned)."""
        free = matrix.free.clone()
        free[matrix.tabu.to(free.device)] = False
        k = self.settings.block // 2
        gone, kept = (free & ~matrix.keep).nonzero().flatten(), (free & matrix.keep).nonzero().flatten()
        # the best of what is pruned, the worst of what is kept
        gone = gone[score[gone].topk(min(k, len(gone))).indices]
        kept = kept[score[kept].topk(min(self.settings.block - k, len(kept)), largest=False).indices]
        return torch.cat([gone, kept]), len(gone)

    def _scores(self, matrix: _Matrix, told: Told, gradient: Tensor, number: int) -> Tensor:
        kind, size = self.settings.selection, matrix.original.abs()
        if kind == "random":
            return torch.rand(size.numel(), generator=self._lot("block", number)).to(size.device)
        if kind == "wanda":
            return (size * told.input_norms()).flatten()
        return size.flatten() * gradient.abs() if kind == "gradient" else size.flatten()

    def _order(self, epoch: int) -> list[int]:
        """The matrices of the steps of an epoch."""
        order = torch.randperm(len(self._slots), generator=self._lot("slots", epoch))
        return [self._slots[place] for place in order.tolist()]

    def _batch_of(self, step: int) -> int:
        """The batch of a step; both are counted from 0."""
        return bisect_right(self._firsts, step) - 1

    def _batch(self, number: int) -> Batch:
        count, size = len(self._data[0]), min(self.settings.batch, len(self._data[0]))
        turn, place = divmod(number, count // size)
        order = torch.randperm(count, generator=self._lot("batches", turn))[place * size : (place + 1) * size]
        return tuple(tensor[order.to(tensor.device)] for tensor in self._data)

    def _lot(self, what: str, number: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.settings.seed}:{what}:{number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _fixed(score: Tensor, keep: Tensor, settings: Descent) -> Tensor:
    """What never changes: the lowest of what is pruned, and the highest of what is kept; bool [entries]."""
    gone, kept = (~keep).nonzero().flatten(), keep.nonzero().flatten()
    fixed = torch.zeros_like(keep)
    fixed[gone[score[gone].argsort(stable=True)[: int(settings.fix_pruned * len(gone))]]] = True
    fixed[kept[score[kept].argsort(descending=True, stable=True)[: int(settings.fix_kept * len(kept))]]] = True
    return fixed


def batches(order: Sequence[int], together: int) -> Iterator[list[int]]:
    """``order`` in lists of up to ``together`` matrices, none twice: one that comes again waits for the next list."""
    waiting = list(order)
    while waiting:
        found: list[int] = []
        place = 0
        while place < len(waiting) and len(found) < together:
            if waiting[place] in found:
                place += 1
            else:
                found.append(waiting.pop(place))
        yield found


def step_slots(sizes: Sequence[int], steps: int, minimum: int) -> list[int]:
    """Which matrix each of the ``steps`` of an epoch is for: shares go by the logarithm of the number of weights.

    Every matrix has ``minimum`` steps at least; 0 steps are as few as that, and one per matrix. Raises UsageError when
    there are fewer.
    """
    least = minimum * len(sizes)
    steps = steps or max(least, len(sizes))
    if steps < least:
        raise UsageError(
            f"{steps} steps don't give each of {len(sizes)} matrices {minimum}: take {least} steps or a lower min_steps"
        )
    weights = np.log10(np.maximum(np.asarray(sizes, dtype=np.float64), 2))
    shares = weights / weights.sum() * steps
    counts = np.maximum(np.floor(shares).astype(int), minimum)
    # one by one to or from whom it is most due
    while counts.sum() != steps:
        missing = shares - counts
        if counts.sum() < steps:
            counts[int(missing.argmax())] += 1
        else:
            counts[int(np.where(counts > minimum, missing, np.inf).argmin())] -= 1
    return [matrix for matrix, count in enumerate(counts) for _ in range(count)]
