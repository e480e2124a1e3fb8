"""Uploading a finished checkpoint to the Hugging Face hub: all of it in one commit, or nothing that is visible."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import ModelLoadError, OutputError, SecateurError, UsageError, first_line
from secateur.remote import expanded

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# what an earlier checkpoint in the repository would leave behind to be mixed up with this one
_OURS = re.compile(r"[^/]*\.(safetensors|index\.json)|plan/.*|modeling_secateur\.py|report\.(json|html)")
_KEPT_BY_HUB = (".gitattributes", "README.md")


def push_checkpoint(folder: str | Path, repo_id: str, *, private: bool = False, overwrite: bool = False) -> str:
    """Upload a checkpoint folder to ``owner/name`` on the hub, which is made when it doesn't exist; returns its URL.

    The token comes from HF_TOKEN or the stored login. All files arrive in a single commit: an upload that is cut
    short changes nothing. A repository that holds a model already is added to only with ``overwrite``, which also
    removes the shards, plan and report of the model before; its history stays.
    Raises UsageError for a bad id, OutputError, or ModelLoadError when the folder holds no whole checkpoint.
    """
    from huggingface_hub import CommitOperationDelete

    folder = expanded(folder)
    additions = _additions(folder, repo_id)
    old, commit = check_push(repo_id, private=private, overwrite=overwrite)
    api = _api()
    with _one_sentence(repo_id):
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        new = {operation.path_in_repo for operation in additions}
        deletions = [CommitOperationDelete(name) for name in old if _OURS.fullmatch(name) and name not in new]
        api.create_commit(
            repo_id, [*additions, *deletions], commit_message=f"Upload {folder.resolve().name}", parent_commit=commit
        )
    return str(url)


def check_push(repo_id: str, *, private: bool = False, overwrite: bool = False) -> tuple[list[str], str | None]:
    """Refuse an upload that can't succeed, before any work starts; the files and the commit that are there now.

    Raises UsageError for a bad id, OutputError without a token, for a repository that holds a model already, and
    for ``private`` where it is public.
    """
    from huggingface_hub import errors, get_token
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except ValueError:
        raise UsageError(f"'{repo_id}' is no name for a model of the hub: give OWNER/NAME") from None
    if "/" not in repo_id:
        raise UsageError(f"'{repo_id}' lacks its owner: give OWNER/NAME")
    if not get_token():
        raise OutputError(f"pushing to {repo_id} needs a token: set HF_TOKEN, or log in with 'hf auth login'")
    with _one_sentence(repo_id):
        try:
            info = _api().model_info(repo_id)
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            return [], None
        files = [sibling.rfilename for sibling in info.siblings or []]
        if private and not info.private:
            raise OutputError(f"{repo_id} exists and is public: make it private on the hub, or leave --private out")
        if not overwrite and any(file not in _KEPT_BY_HUB for file in files):
            raise OutputError(f"{repo_id} exists on the hub and holds files: choose another name, or pass --overwrite")
        return files, info.sha


def _additions(folder: Path, repo_id: str) -> list[Any]:
    from huggingface_hub import CommitOperationAdd

    from secateur.models.loading import open_folder

    if not folder.is_dir():
        raise ModelLoadError(f"there is no checkpoint at {folder}: no such folder")
    open_folder(folder)
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    card = folder / "README.md"
    additions: list[Any] = []
    for path in files:
        name = path.relative_to(folder).as_posix()
        content = _card_for_hub(card, repo_id).encode() if path == card else str(path)
        additions.append(CommitOperationAdd(name, content))
    return additions


def _card_for_hub(card: Path, repo_id: str) -> str:
    """The model card with the commands that load the model from the hub, in place of a folder of this machine."""
    text = card.read_text(encoding="utf8")
    return re.sub(r'(from_pretrained\()"[^"]*"', lambda found: f'{found[1]}"{repo_id}"', text)


def _api() -> HfApi:
    from huggingface_hub import HfApi

    from secateur import __version__

    return HfApi(library_name="secateur", library_version=__version__)


@contextmanager
def _one_sentence(repo_id: str) -> Iterator[None]:
    try:
        yield
    except SecateurError:
        raise
    except Exception as error:
        raise OutputError(f"can't push to {repo_id}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from huggingface_hub import constants, errors

    status = (
        error.response.status_code if isinstance(error, errors.HfHubHTTPError) and error.response is not None else None
    )
    if status == 401:
        return "the hub refuses your token: correct HF_TOKEN, or log in with 'hf auth login'"
    if status == 403:
        return "your HF_TOKEN may not write there: it needs the permission to write, and you to be a member"
    if status == 412:
        return "somebody else has pushed there meanwhile; try again"
    if isinstance(error, ValueError) and "README.md" in str(error):
        return "the hub refuses the model card: " + " ".join(line.strip("- ") for line in str(error).splitlines()[1:])
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    # uploads wrap what went wrong in one file
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    if status is not None:
        return f"the hub answers with HTTP {status}"
    return f"{constants.ENDPOINT} breaks off ({first_line(cause)})"
