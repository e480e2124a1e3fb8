"""What every front end of traced networks offers, and how to tell them apart without loading any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from secateur.methods import Method
from secateur.plans import Plan
from secateur.structure.groups import TracedAnatomy


class Network(Protocol):
    """A traced network that can be planned and cut."""

    @property
    def anatomy(self) -> TracedAnatomy: ...

    def plan(self, method: Method, *, data: Any, loss: Any, ignore: Sequence[str], seed: int) -> Plan:
        """Decide which channels leave."""
        ...

    def cut(self, plan: Plan, *, inplace: bool) -> tuple[Any, list[str]]:
        """The cut network, and what the user should know about it."""
        ...


def is_onnx(model: Any) -> bool:
    """Whether this is an ONNX model or the name of a file with one."""
    return (isinstance(model, str | Path) and str(model).endswith(".onnx")) or type(model).__name__ == "ModelProto"
