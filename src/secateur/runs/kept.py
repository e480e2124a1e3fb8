"""What becomes of a run's folder when the run ends early, and what the user is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

from secateur.errors import OutputError, RankError, ResourceError, SecateurError, out_of_memory
from secateur.files import disk_error
from secateur.ranks import ALONE, Ranks
from secateur.remote import is_url
from secateur.runs.folder import RunFolder, run_path
from secateur.runs.signals import Stopped, StopRequest, deferred


class _Cause(Enum):
    """Why a run has ended early, by what the same command would do."""

    MISTAKE = "end here again: the request, the model or the data is wrong"
    DISK = "go on, once there is room and leave to write"
    ACCIDENT = "go on, perhaps: it was memory, another rank, or an error of ours"


def hint(out: str | Path) -> str:
    return f"{run_path(out)} holds what is done: the same command with --resume goes on from there"


@contextmanager
def kept(folder: RunFolder, resumed: bool, ranks: Ranks = ALONE) -> Iterator[StopRequest]:
    """Keep the folder when the block is left early and what is in it can be gone on with; remove it otherwise."""
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
            cause = _cause(error)
            stays = _settle(folder, cause, resumed)
            told = _told(error, cause, folder, stays)
            if told is error:
                raise
            raise told from error


def _cause(error: Exception) -> _Cause:
    if disk_error(error):
        return _Cause.DISK
    ours = isinstance(error, SecateurError) and not isinstance(error, (RankError, ResourceError))
    return _Cause.MISTAKE if ours else _Cause.ACCIDENT


def _settle(folder: RunFolder, cause: _Cause, resumed: bool) -> bool:
    """Remove from the folder what can't be gone on with; whether anything stays.

    A folder in which nothing is finished goes, and one that is resumed stays whatever the cause. Of a first run, all
    that is finished stays after a full disk and after an accident; after a mistake only what can be gone on with in
    another way does: what was pruned, with another training; steps that are done, with another one behind them; and
    all work done.
    """
    stays = folder.begun
    if stays and cause is _Cause.MISTAKE and not resumed:
        stays = folder.training or folder.complete or folder.finished > 0
        if stays:
            folder.drop_unfinished()
    if not stays:
        folder.remove()
    return stays


def _told(error: Exception, cause: _Cause, folder: RunFolder, stays: bool) -> Exception:
    """The error whose sentence ends in what is left of the run; ``error`` itself where nothing is to be added."""
    left = (hint(folder.out) if cause is _Cause.DISK else _left(folder)) if stays else "nothing was left behind"
    uploading = is_url(folder.out) and isinstance(error, OutputError)
    if stays and (uploading or isinstance(error, RankError)):
        return type(error)(f"{error}; {left}")
    if cause is _Cause.DISK and not uploading:
        return OutputError(f"can't write {folder.out}: {disk_error(error)}; {left}")
    if memory := out_of_memory(error):
        return ResourceError(f"{memory}; 'secateur estimate' says what makes a run smaller; {left}")
    if cause is _Cause.MISTAKE and stays and (folder.training or folder.between or folder.complete):
        # other arguments, and not another error, which would lack what this one carries
        error.args = (f"{error}; {left}",)
    return error


def _left(folder: RunFolder) -> str:
    """What is there, and with which command it goes on."""
    if folder.training:
        held, other = "what was pruned", "another heal, or none,"
    elif folder.between:
        held, other = f"what step {folder.finished} left", "another step behind it, or none,"
    else:
        return hint(folder.out)
    return f"{run_path(folder.out)} holds {held}: {other} with --resume goes on from there"
