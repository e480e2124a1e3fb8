"""Runs that have written their output and were killed before their own folder was gone."""

from __future__ import annotations

from pathlib import Path

from secateur.files import check_output, run_path, write_text
from secateur.manifest import MANIFEST, sha256
from secateur.remote import is_url, place

_SEAL = "finished.sha256"


def seal(run: Path, folder: Path | None = None) -> None:
    """Note in the folder of a run that the complete ``folder`` takes its name next; without one, that it's uploaded."""
    write_text(run / _SEAL, "" if folder is None else sha256(folder / MANIFEST))


def is_finished(out: str | Path) -> bool:
    """Whether ``out`` is what the run beside it has written, so that its folder is all that is left to remove."""
    note = run_path(out) / _SEAL
    if not note.is_file():
        return False
    if is_url(out):
        return True
    manifest = Path(place(out)) / MANIFEST
    return manifest.is_file() and sha256(manifest) == note.read_text(encoding="utf8")


def check_run_output(out: str | Path, *, resume: bool, overwrite: bool) -> bool:
    """Refuse an output that exists, unless it is what the run that is resumed has written; returns whether it is.

    Raises what ``check_output`` raises.
    """
    finished = resume and is_finished(out)
    check_output(out, overwrite or finished)
    return finished
