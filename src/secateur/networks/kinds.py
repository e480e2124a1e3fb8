"""What every front end of traced networks offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from secateur.kinds import is_onnx
from secateur.usercode import is_reference

if TYPE_CHECKING:
    from secateur.methods import Method
    from secateur.networks.latency import Latencies, Progress
    from secateur.plans import Plan
    from secateur.structure.groups import TracedAnatomy

__all__ = ["FILES", "Asked", "Network", "is_named_network", "is_network_output", "is_onnx"]

FILES = (".onnx", ".pt2")
"""What a network can be saved as, beside a folder."""


@dataclass(frozen=True)
class Asked:
    """What is asked of a plan beside its method.

    ``data`` are batches and ``loss`` the loss of one; ``ignore`` are patterns of parameters that stay; ``ratios``
    fractions of the channels of groups that leave whatever their scores, by pattern.
    """

    data: Any = None
    loss: Any = None
    ignore: Sequence[str] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0


class Network(Protocol):
    """A traced network that can be planned and cut."""

    @property
    def anatomy(self) -> TracedAnatomy: ...

    @property
    def latencies(self) -> Latencies | None: ...

    def timed(self, path: str | Path | None, step: int, progress: Progress) -> Network:
        """The same with the latencies that a budget needs: kept in the file ``path``, widths in steps of ``step``."""
        ...

    def plan(self, method: Method, asked: Asked) -> Plan:
        """Decide which channels leave."""
        ...

    def cut(self, plan: Plan, *, inplace: bool, optimizer: Any = None) -> tuple[Any, list[str]]:
        """The cut network, and what the user should know about it."""
        ...


def is_named_network(model: str | None) -> bool:
    """Whether the command line means a traced network by this, and not a language model: an .onnx file or an object
    of Python."""
    return model is not None and (is_onnx(model) or (is_reference(model) and "//" not in model))


def is_network_output(model: Any, out: str | Path, plan: Any) -> bool:
    """Whether this is a traced network to be saved, and not a language model."""
    return is_onnx(model) or Path(out).suffix in FILES or getattr(plan, "inputs", None) is not None
