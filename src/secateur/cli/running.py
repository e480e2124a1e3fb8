"""Running a command: exit codes, one-line errors, interrupts, closed pipes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import typer

from secateur.errors import SecateurError, out_of_memory
from secateur.ranks import started_as_main, wait_for_main

INTERRUPTED = 130
# Typer takes its parser from click, or carries a copy of it; this is the base of its usage errors either way.
_ParserError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0 done, 1 failed, 2 misuse, 130 interrupted.

    Only errors that nobody foresaw leave as exceptions, with their traceback.
    """
    _quieten_libraries()
    try:
        with _terminate_as_interrupt():
            _invoke(list(arguments) or ["--help"])
            sys.stdout.flush()
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except SecateurError as error:
        return _fail(f"error: {error}", error.exit_code, arguments)
    except _ParserError as error:
        return _fail(f"error: {_parser_message(error)}", 2, arguments)
    except (KeyboardInterrupt, typer.Abort) as stop:
        # a run that keeps what is done says how to go on
        return _fail(str(stop) or "interrupted; nothing was written", INTERRUPTED, arguments)
    except BrokenPipeError:
        # what reads our output has gone: nobody to tell, and nothing left to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, RuntimeError) as error:
        if memory := out_of_memory(error):
            return _fail(f"error: {memory}", 1, arguments)
        raise


def _invoke(arguments: list[str]) -> None:
    from secateur.cli.app import app

    # not through typer's own main(), which turns an interrupt into a plain exit before we see it
    command = typer.main.get_command(app)
    with command.make_context("secateur", arguments) as context:
        command.invoke(context)


def _fail(message: str, code: int, arguments: Sequence[str]) -> int:
    # the ranks of a run fail together, and one of them says why
    if not {"prune", "heal"} & set(arguments) or started_as_main():
        print(" ".join(message.split()), file=sys.stderr)
    elif code != INTERRUPTED:
        wait_for_main()
    return code


def _parser_message(error: Exception) -> str:
    message = str(error.format_message()).rstrip(".")  # pyright: ignore[reportAttributeAccessIssue]
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "secateur"
    return f"{message[:1].lower()}{message[1:]}; '{path} --help' shows what is possible"


def _quieten_libraries() -> None:
    """Keep loading bars and advice of other libraries off our streams; what the user has set stays."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }.items():
        os.environ.setdefault(name, value)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM unwinds the stack like Ctrl-C, so that half-written output is removed."""
    if threading.current_thread() is not threading.main_thread():
        # only the main thread may handle signals
        yield
        return
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
