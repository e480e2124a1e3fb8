"""Walking a decoder block by block: hidden states in, statistics and hidden states out.

Only the blocks are run, each as a working copy in the compute dtype, so the user's model is never changed and never
converted, or even in memory, as a whole. B sequences, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.errors import NonFiniteError
from secateur.finite import all_finite
from secateur.observe.activations import Activations
from secateur.observe.ending import Ending, EndingWatch
from secateur.observe.settled import Settled
from secateur.observe.statistics import Statistic, of_ending

StatisticTypes = Mapping[str, type[Statistic]]

_REMEDY = "try --dtype float32 or check the weights"


@dataclass
class _Call:
    """The arguments with which the model calls one block, hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Blocks(Protocol):
    """What a walk needs of a decoder; see ``models.sources.Source``."""

    blocks: nn.ModuleList

    @property
    def device(self) -> torch.device: ...

    def device_of(self, layer: int) -> torch.device: ...

    def open(self, layer: int, dtype: torch.dtype) -> nn.Module: ...

    def shell(self, dtype: torch.dtype, *, whole: bool = False) -> nn.Module: ...


class BlockWalk:
    """Hidden states on their way through the blocks of ``source``.

    ``ids`` is [windows, length] int64. Blocks are opened in ``dtype`` one at a time. ``hidden`` holds the inputs of
    the next block. With ``dense`` a second stream goes beside it, through the blocks as they are opened, whatever is
    done to them afterwards. Raises NonFiniteError as soon as a block gives NaN or inf.
    """

    def __init__(
        self,
        source: Blocks,
        ids: Tensor,
        *,
        dtype: torch.dtype,
        batch_tokens: int = 2048,
        hidden: Activations | None = None,
        dense: Activations | None = None,
    ) -> None:
        self._source, self._dtype = source, dtype
        self._batches = list(ids.to(source.device).split(max(1, batch_tokens // ids.shape[1])))
        self.hidden = hidden if hidden is not None else Activations()
        self.dense = dense
        self._calls: dict[int, list[_Call]] = {}
        self._as_tuple: list[bool] = []
        self._settled: Settled | None = None
        self._enter(source.shell(dtype))

    def open(self, layer: int) -> nn.Module:
        """A working copy of one block in the compute dtype; what is done to it shows in ``advance``."""
        return self._source.open(layer, self._dtype)

    @torch.inference_mode()
    def observe(
        self,
        block: nn.Module,
        layer: int,
        modules: Iterable[str],
        statistics: StatisticTypes,
        *,
        advance: bool,
        columns: Mapping[str, Tensor] | None = None,
        ending: Ending | None = None,
        begun: bool = False,
    ) -> dict[str, dict[str, Statistic]]:
        """Statistics of the input of every named module of ``block``; modules that read one tensor share them.

        With ``advance`` the outputs become the inputs of the next block; without, a forward ends at the last of the
        named modules, whose product nobody reads. Those of the dense stream always do, so that the block must be as it
        was opened. ``columns`` are those of every unit, [units, width], of modules whose statistics look at their
        weight too. Statistics like ``Lost`` are taken at the ``ending``. A block that was ``begun``
        with has been observed before, and the dense stream is behind it already. Raises NonFiniteError.
        """
        if not begun:
            self._settled = None
        watch = _InputWatch(block, modules, statistics, whole=advance, columns=columns or {}, ending=ending)
        with watch:
            for i in range(len(self.hidden)):
                # with `_AllSeen` there is no output
                output = None
                with suppress(_AllSeen), self._in_batch(i):
                    output = self._run(block, layer, i, self.hidden[i])
                    if advance:
                        self.hidden[i] = output
                if self.dense is not None:
                    dense = self.dense[i]
                    if not begun:
                        with watch.second():
                            self.dense[i] = dense = self._run(block, layer, i, dense)
                    if output is not None:
                        watch.lost(output, dense)
                watch.end_of_batch()
        watch.check_finite(layer)
        if advance:
            self.hidden.turn()
        if self.dense is not None and not begun:
            self.dense.turn()
        return watch.seen

    @torch.inference_mode()
    def observe_block(self, block: nn.Module, layer: int, statistics: StatisticTypes) -> dict[str, Statistic]:
        """Statistics of (input, output) of the block, concatenated along the hidden dimension; advances."""
        seen = {name: kind() for name, kind in statistics.items()}
        for i in range(len(self.hidden)):
            hidden = self.hidden[i]
            output = self._run(block, layer, i, hidden)
            for statistic in seen.values():
                statistic.update(torch.cat([hidden.to(output.device), output], dim=-1))
            self.hidden[i] = output
        self.hidden.turn()
        return seen

    @property
    def streams(self) -> list[Activations]:
        """The hidden states, and those of the dense model where they are wanted."""
        return [self.hidden] if self.dense is None else [self.hidden, self.dense]

    @torch.inference_mode()
    def advance(self, block: nn.Module, layer: int) -> None:
        """Run the block and make its outputs the inputs of the next one."""
        for i in range(len(self.hidden)):
            with self._in_batch(i):
                self.hidden[i] = self._run(block, layer, i, self.hidden[i])
        self.hidden.turn()
        self._settled = None

    @torch.inference_mode()
    def go_past(self, layer: int) -> None:
        """Run a block as it is opened, and make what it gives in every stream the inputs of the next one."""
        block = self.open(layer)
        for stream in self.streams:
            for i in range(len(stream)):
                stream[i] = self._run(block, layer, i, stream[i])
            stream.turn()

    def settle(self, block: nn.Module, module: str) -> None:
        """A module of a block that was begun with is final: it is run once more, and not again before the next block.

        Nothing that its inputs come from may change any more, either.
        """
        self._settled = Settled(block.get_submodule(module), self.hidden.another("settled"))

    def _in_batch(self, batch: int) -> AbstractContextManager[None]:
        return nullcontext() if self._settled is None else self._settled.in_batch(batch)

    @torch.inference_mode()
    def run(self, block: nn.Module, layer: int, batch: int, hidden: Tensor) -> Tensor:
        """What a block makes of hidden states that stand in for those of a batch, [sequences, length, hidden]."""
        return self._run(block, layer, batch, hidden)

    @torch.inference_mode()
    def logits(self, head: nn.Module, batch: int, hidden: Tensor) -> Tensor:
        """What the model makes of the hidden states behind its last block, [sequences, length, vocabulary].

        ``head`` is the whole shell of the source.
        """
        return self.head_logits(head, self._batches[batch], hidden)

    def head_logits(self, head: nn.Module, ids_BT: Tensor, hidden: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
        """The same for windows of one's own choice; ``hidden`` may be made of what enters the first block."""
        with _giving(self._source.blocks, hidden, self._as_tuple[0]):
            return head(input_ids=ids_BT, use_cache=False).logits

    def _run(self, block: nn.Module, layer: int, batch: int, hidden: Tensor) -> Tensor:
        call = self._calls[hidden.shape[0]][layer]
        output = _first(block(hidden.to(self._source.device_of(layer)), *call.args, **call.kwargs))
        if not all_finite(output):
            raise NonFiniteError(f"layer {layer} gives NaN or inf in calibration batch {batch}: {_REMEDY}")
        return output

    @torch.inference_mode()
    def _enter(self, shell: nn.Module) -> None:
        """Run the model around its blocks: record how every block is called, and what enters the first one."""
        first, as_tuple = self._source.open(0, self._dtype), self._as_tuple
        for ids in self._batches:
            with _recording(self._source.blocks, first, as_tuple) as (hidden, calls):
                shell(input_ids=ids, use_cache=False)
            for stream in self.streams:
                stream.append(_cast(hidden[0], self._dtype, self._source.device))
            if ids.shape[0] not in self._calls:
                self._calls[ids.shape[0]] = list(self._cast_calls(calls))

    def _cast_calls(self, calls: list[_Call]) -> Iterator[_Call]:
        """The calls in the compute dtype, each on the device of its block; what blocks share there stays shared."""
        made: dict[tuple[int, torch.device], Tensor] = {}
        for layer, call in enumerate(calls):
            device = self._source.device_of(layer)
            yield _Call(*(_cast(part, self._dtype, device, made) for part in (call.args, call.kwargs)))


@contextmanager
def _recording(
    blocks: nn.ModuleList, first: nn.Module, as_tuple: list[bool]
) -> Iterator[tuple[list[Tensor], list[_Call]]]:
    """Blocks that only note their arguments and pass the hidden states on; ``first`` is one that can run."""
    hidden: list[Tensor] = []
    calls: list[_Call] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.pop("hidden_states")
        if not as_tuple:
            # only a real call tells whether blocks of this model return a tuple
            as_tuple.append(isinstance(first(x, *args[1:], **kwargs), tuple))
        hidden.append(x)
        calls.append(_Call(args[1:], kwargs))
        if len(calls) == len(blocks) and hasattr(blocks[-1], "rotated"):
            # what follows the last block of a rotated model wants the dense width
            size: int = blocks[-1].rotated["size"]  # type: ignore[index,assignment]
            x = nn.functional.pad(x, (0, size - x.shape[-1]))
        return (x, None) if as_tuple[0] else x

    try:
        for block in blocks:
            block.forward = forward
        yield hidden, calls
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


@contextmanager
def _giving(blocks: nn.ModuleList, hidden: Tensor | Callable[[Tensor], Tensor], as_tuple: bool) -> Iterator[None]:
    """Blocks that give these hidden states, whatever they are called with, or what is made of the first one's."""
    made: list[Tensor] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not made:
            entering = args[0] if args else kwargs["hidden_states"]
            made.append(hidden(entering) if callable(hidden) else hidden)
        return (made[0], None) if as_tuple else made[0]

    try:
        for block in blocks:
            block.forward = forward
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


class _AllSeen(Exception):
    """The inputs of all watched modules have been seen in this batch."""


class _InputWatch:
    """Hooks that feed the inputs of modules to statistics; modules which read the same tensor share one set.

    Statistics of pairs get the input of the first run of a batch together with that of the second, and those of what a
    block has lost the input of its ``ending`` with the difference of both outputs. Unless the ``whole`` of the first is
    wanted, for them or otherwise, the hook that saw its last input raises ``_AllSeen``.
    """

    def __init__(
        self,
        block: nn.Module,
        modules: Iterable[str],
        statistics: StatisticTypes,
        *,
        whole: bool,
        columns: Mapping[str, Tensor],
        ending: Ending | None,
    ) -> None:
        self._columns = columns
        self._modules = {name: block.get_submodule(name) for name in modules}
        self._statistics = statistics
        self._owner: dict[tuple[Any, ...], str] = {}
        self._owned: set[str] = set()
        self._held: list[Tensor] = []
        self._paired = [name for name, kind in statistics.items() if getattr(kind, "paired", False)]
        self._of_ending = of_ending(statistics)
        self._first: dict[str, Tensor] = {}
        self._ending: EndingWatch | None = None
        if self._of_ending and ending is not None and ending.module in self._modules:
            self._ending = EndingWatch(block, ending)
        self._whole = whole or self._ending is not None
        self._first_batch, self._second = True, False
        self._missing = set(self._modules)
        self._handles: list[Any] = []
        self.seen: dict[str, dict[str, Statistic]] = {}

    def __enter__(self) -> None:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name)))
        if self._ending is not None:
            self._handles += self._ending.begin()

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def second(self) -> Iterator[None]:
        """Within the block, what modules read are the second halves of pairs."""
        self._second = True
        try:
            yield
        finally:
            self._second = False

    def lost(self, output_BTD: Tensor, dense_BTD: Tensor) -> None:
        """The outputs of both runs of a batch."""
        if self._ending is not None:
            name, asked_BTD = self._ending.module, self._ending.asked(dense_BTD - output_BTD)
            for key in self._of_ending:
                statistic: Any = self.seen[name][key]
                statistic.update_pair(self._first[name], asked_BTD)

    def end_of_batch(self) -> None:
        self._first_batch = False
        self._held.clear()
        self._first.clear()
        if self._ending is not None:
            self._ending.end_of_batch()
        self._missing = set(self._modules)

    def check_finite(self, layer: int) -> None:
        """Raises NonFiniteError: an output that was not computed can't show that an input overflowed."""
        for name in sorted(self._owned):
            for statistic in self.seen[name].values():
                for sums in statistic.state().values():
                    if not all_finite(sums):
                        raise NonFiniteError(f"layer {layer} gives NaN or inf to {name}: {_REMEDY}")

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._second:
                self._pair(name, args[0])
                return
            self._take(name, args[0])
            self._missing.discard(name)
            if not (self._missing or self._whole):
                raise _AllSeen

        return hook

    def _take(self, name: str, x: Tensor) -> None:
        if self._first_batch:
            # held until the batch ends, so that an address can't be handed to a second tensor meanwhile
            self._held.append(x)
            owner = self._owner.setdefault((x.data_ptr(), x.shape, x.stride()), name)
            if owner != name:
                self.seen[name] = self.seen[owner]
                return
            self.seen[name] = {
                key: self._made(name, kind)
                for key, kind in self._statistics.items()
                if key not in self._of_ending or self._ends(name)
            }
            self._owned.add(name)
        elif name not in self._owned:
            return
        x_BTC = x if x.dim() == 3 else x.unsqueeze(0)
        for key, statistic in self.seen[name].items():
            if key not in self._paired and key not in self._of_ending:
                statistic.update(x_BTC)
        if self._paired or self._ends(name):
            self._first[name] = x_BTC

    def _ends(self, name: str) -> bool:
        return self._ending is not None and name == self._ending.module

    def _made(self, name: str, kind: type[Statistic]) -> Statistic:
        made: Any = kind()
        if getattr(kind, "reads", False):
            module = self._modules[name]
            weight: Tensor = module.weight  # type: ignore[assignment]
            made.read_by(weight if isinstance(module, nn.Linear) else weight.T, self._columns[name])
        return made

    def _pair(self, name: str, x: Tensor) -> None:
        if name in self._owned:
            second_BTC = x if x.dim() == 3 else x.unsqueeze(0)
            for key in self._paired:
                statistic: Any = self.seen[name][key]
                statistic.update_pair(self._first[name], second_BTC)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _cast(
    value: Any, dtype: torch.dtype, device: torch.device, made: dict[tuple[int, torch.device], Tensor] | None = None
) -> Any:
    """Tensors anywhere inside ``value`` on ``device``, floating ones in ``dtype``; ``made`` holds those done before."""
    if isinstance(value, Tensor):
        made = {} if made is None else made
        place = (id(value), device)
        if place not in made:
            made[place] = value.to(device, dtype if value.is_floating_point() else value.dtype)
        return made[place]
    if isinstance(value, tuple):
        return tuple(_cast(v, dtype, device, made) for v in value)
    if isinstance(value, dict):
        return {k: _cast(v, dtype, device, made) for k, v in value.items()}
    return value
