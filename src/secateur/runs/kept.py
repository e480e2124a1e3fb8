"""What becomes of a run's folder when the run ends early, and what the user is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import OutputError, RankError, ResourceError, SecateurError, out_of_memory
from secateur.files import disk_error
from secateur.ranks import ALONE, Ranks
from secateur.remote import is_url
from secateur.runs.folder import RunFolder, run_path
from secateur.runs.signals import Stopped, StopRequest, deferred


def hint(out: str | Path) -> str:
    return f"{run_path(out)} holds what is done: the same command with --resume goes on from there"


def _left(folder: RunFolder) -> str:
    """What is there, and with which command it goes on."""
    if folder.training:
        held, other = "what was pruned", "another heal, or none,"
    elif folder.between:
        held, other = f"what step {folder.finished} left", "another step behind it, or none,"
    else:
        return hint(folder.out)
    return f"{run_path(folder.out)} holds {held}: {other} with --resume goes on from there"


@contextmanager
def kept(folder: RunFolder, resumed: bool, ranks: Ranks = ALONE) -> Iterator[StopRequest]:
    """Keep the folder when the block is left early and something is finished in it; remove it otherwise.

    A mistake of the user ends a run for good, unless it was resumed, or something in it can be gone on with in another
    way: with another training of what was pruned, with another step behind those that are done, with all work done.
    """
    with deferred(lambda: folder.begun, quiet=not ranks.main) as stop:
        try:
            yield stop
        except Stopped:
            raise
        except KeyboardInterrupt:
            if folder.begun:
                raise Stopped(f"stopped; {hint(folder.out)}") from None
            folder.remove()
            raise
        except Exception as error:
            reason = disk_error(error)
            uploading = is_url(folder.out) and isinstance(error, OutputError)
            ours = isinstance(error, SecateurError) and not isinstance(error, (RankError, ResourceError))
            other = folder.training or folder.finished or folder.complete
            keep = folder.begun and bool(reason or resumed or other or not ours)
            if not keep:
                folder.remove()
            elif ours and not (reason or resumed):
                folder.drop_unfinished()
            on = hint(folder.out) if reason else _left(folder)
            left = on if keep else "nothing was left behind"
            if (uploading or isinstance(error, RankError)) and keep:
                raise type(error)(f"{error}; {on}") from error
            if reason and not uploading:
                raise OutputError(f"can't write {folder.out}: {reason}; {left}") from error
            if memory := out_of_memory(error):
                raise ResourceError(f"{memory}; 'secateur estimate' says what makes a run smaller; {left}") from error
            if ours and keep and (folder.training or folder.between or folder.complete):
                error.args = (f"{error}; {on}",)
            raise
