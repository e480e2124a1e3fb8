"""What is said about a checkpoint that was written, and its way to the hub."""

from __future__ import annotations

import importlib.util
import json

from secateur.errors import MissingExtraError, OutputError, SecateurError, UsageError
from secateur.remote import is_url, place


def how_to_load(folder: str) -> str:
    """The lines of Python that load the checkpoint."""
    if is_url(folder):
        return f"saved to {folder}; copy it to a folder to load it"
    folder = str(place(folder))
    with open(f"{folder}/config.json", encoding="utf8") as file:
        config = json.load(file)
    remote = ", trust_remote_code=True" if "auto_map" in config else ""
    return (
        f"saved to {folder}; load it with\n"
        "  from transformers import AutoModelForCausalLM\n"
        f'  model = AutoModelForCausalLM.from_pretrained("{folder}"{remote})'
    )


def drawn(report: bool | None) -> bool:
    """Whether report.html is written: as asked, else where it can be drawn. Raises MissingExtraError."""
    drawable = importlib.util.find_spec("plotly") is not None
    if report and not drawable:
        raise MissingExtraError("report.html needs plotly, which is not installed: pip install 'secateur[report]'")
    return drawable if report is None else report


def check_push(repo_id: str | None, out: str | None, *, private: bool, overwrite: bool) -> None:
    """Refuse an upload that can't succeed, before any work starts. Raises UsageError or OutputError."""
    if repo_id is None:
        if private:
            raise UsageError("--private is for --push-to-hub, which isn't given")
        return
    if out is not None and is_url(out):
        raise UsageError(f"--push-to-hub uploads a folder of this machine: give one with --out, not {out}")
    from secateur.models import pushing

    pushing.check_push(repo_id, private=private, overwrite=overwrite)


def push(folder: str, repo_id: str, *, private: bool, overwrite: bool) -> str:
    """Upload a checkpoint that is complete here; returns its URL. Raises OutputError, which says that it is."""
    from secateur import api

    safe = f"the checkpoint is complete in {folder}, and secateur.push uploads it"
    try:
        return api.push(str(place(folder)), repo_id, private=private, overwrite=overwrite)
    except SecateurError as error:
        raise type(error)(f"{error}; {safe}") from error.__cause__
    except KeyboardInterrupt:
        interrupted = OutputError(f"interrupted while pushing to {repo_id}; {safe}")
        interrupted.exit_code = 130
        raise interrupted from None
