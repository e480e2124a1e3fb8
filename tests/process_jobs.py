"""What commands in processes of their own find replaced (see ``forking.py``)."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any


def save_slowly() -> None:
    """The first weights that are written stay half written until the process is interrupted."""
    from secateur.models import shards

    def write_tensors(path: Path, *rest: Any, **options: Any) -> None:
        path.write_text("half")
        print("saving", file=sys.stderr, flush=True)
        time.sleep(60)

    shards.write_tensors = write_tensors


def break_opening() -> None:
    """A bug where models are opened."""
    from secateur.models import opening

    def open_source(*arguments: Any, **options: Any) -> Any:
        raise ZeroDivisionError("a bug")

    opening.open_source = open_source  # type: ignore[assignment]
