"""The command line on a disk of a given speed: ``python slow_disk.py MB_PER_SECOND COUNTS.json prune …``.

Every read of tensor bytes takes at least as long as that disk would need, in the thread that reads, as if the system
call itself had blocked. 0 is the disk as it is. That holds for what the run wrote itself too, though the kernel would
mostly have it in its cache: a model larger than memory isn't there for long. Only the rows of the embedding that are
looked up come from a mapping and are not counted.

COUNTS.json gets the ``bytes`` read, those among them that the run had written (``own``), and the seconds until the
program was ready to begin (``start``).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

STARTED, STARTED_AT = time.perf_counter(), time.time()


def main() -> None:
    rate, counts = float(sys.argv[1]) * 1e6, Path(sys.argv[2])
    import secateur.runs.run  # noqa: F401 (the heavy imports belong to the start)
    from secateur import tensorfiles
    from secateur.cli import main as command_line

    real, lock = tensorfiles._read_into, threading.Lock()
    total = {"bytes": 0, "own": 0, "start": time.perf_counter() - STARTED}

    def slow(file: Any, view: memoryview, path: Path) -> None:
        begun, size = time.perf_counter(), len(view)
        # one disk: two readers share its speed
        with lock:
            real(file, view, path)
            total["bytes"] += size
            total["own"] += size if path.stat().st_mtime >= STARTED_AT else 0
            if rate:
                time.sleep(max(0.0, begun + size / rate - time.perf_counter()))

    tensorfiles._read_into = slow
    try:
        command_line(sys.argv[3:])
    finally:
        counts.write_text(json.dumps(total))


if __name__ == "__main__":
    main()
