"""Models on the Hugging Face hub: which names mean one, what is fetched of it, and what went wrong in one sentence.

Only config, tokenizer and safetensors are fetched, never a pickle, into the cache of ``huggingface_hub``, which also
finds the token (HF_TOKEN or the stored login), resumes a download that was cut, and knows mirrors (HF_ENDPOINT).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.errors import ModelLoadError, UsageError, first_line

Progress = Callable[[str, int, int], None]

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SCHEME = "hf://"
_URL = re.compile(r"hf://(?:models/)?(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^@\s]+))?")
_SNAPSHOT = re.compile(r"[0-9a-f]{40}")
_INDEX = "model.safetensors.index.json"
# exact names, which match at the top of a repository only: many hold a second copy of the weights in a folder
_SMALL_FILES = [
    "config.json",
    "generation_config.json",
    _INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tiktoken.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
]


def is_hub_url(name: str | Path) -> bool:
    """True for ``hf://…``, which never means a folder."""
    return str(name).startswith(_SCHEME)


def split_name(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Repository and revision of ``owner/name``, ``hf://owner/name`` or ``hf://owner/name@revision``.

    Raises UsageError for another form, and for two revisions that differ.
    """
    if not is_hub_url(name):
        return name, revision
    found = _URL.fullmatch(name)
    if not found:
        raise UsageError(f"{name} names no model of the hub: write hf://owner/name or hf://owner/name@revision")
    own = found["revision"]
    if own and revision and own != revision:
        raise UsageError(f"{name} asks for another revision than '{revision}': give one of the two")
    return found["id"], own or revision


def plain_name(name: str) -> str:
    """What a model is called in plans and reports: ``owner/name`` for every way to write a hub id."""
    return split_name(name)[0]


def commit_of(source: str | Path) -> str:
    """The commit of a folder in the cache of ``huggingface_hub``, 40 hexadecimal digits; "" for any other place."""
    folder = Path(source)
    return folder.name if folder.parent.name == "snapshots" and _SNAPSHOT.fullmatch(folder.name) else ""


def fetch(
    repo_id: str,
    revision: str | None = None,
    *,
    remote_code: bool = False,
    otherwise: str = "",
    progress: Progress | None = None,
) -> Path:
    """The folder of a model of the hub in the local cache, after fetching what is missing there.

    ``revision`` is a branch, a tag or a commit. ``remote_code`` fetches its Python files too. ``otherwise`` says what
    else the name is not, for the error. ``progress`` is called with ("download", MiB done, MiB in all).
    Raises ModelLoadError.
    """
    from huggingface_hub import snapshot_download

    patterns = [*_SMALL_FILES, *(["*.py"] if remote_code else [])]
    with _one_sentence(repo_id, revision, otherwise):
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, **_quiet(None)))
        if not (folder / "config.json").is_file():
            raise ModelLoadError(f"{repo_id} on the hub holds no model: there is no config.json in it")
        weights = _weight_names(repo_id, folder)
        # by commit, so that both halves belong together when somebody pushes in between
        snapshot_download(repo_id, revision=folder.name, allow_patterns=weights, **_quiet(progress))
        if not any((folder / name).is_file() for name in weights):
            raise ModelLoadError(_no_weights(repo_id, folder.name))
    return folder


def fetch_config(repo_id: str, revision: str | None = None, *, remote_code: bool = False) -> Path:
    """The folder in the local cache after fetching the config of a model of the hub, and none of its weights.

    ``remote_code`` fetches its Python files too. Raises ModelLoadError.
    """
    from huggingface_hub import snapshot_download

    patterns = ["config.json", *(["*.py"] if remote_code else [])]
    with _one_sentence(repo_id, revision, ""):
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, **_quiet(None)))
        if not (folder / "config.json").is_file():
            raise ModelLoadError(f"{repo_id} on the hub holds no model: there is no config.json in it")
    return folder


def explain(error: Exception, repo_id: str, revision: str | None = None, otherwise: str = "") -> str:
    """One sentence about what the hub, or the way to it, said; it never holds the token."""
    from huggingface_hub import constants, errors, get_token

    token = get_token()
    cause = error
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        # what was said when the cache was asked in place of the hub
        cause = error.__cause__
    failed = f"{repo_id}{otherwise} can't be had from the hub"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision '{revision}' on the hub: give a branch, a tag or a commit"
    if isinstance(error, errors.GatedRepoError):
        remedy = "the account of your HF_TOKEN has no access yet" if token else "then set HF_TOKEN"
        return f"{repo_id} is gated: ask for access at {constants.ENDPOINT}/{repo_id}, {remedy}"
    if isinstance(error, errors.RepositoryNotFoundError):
        private = "your HF_TOKEN may not read it" if token else "it is private and HF_TOKEN is not set"
        return f"{failed}: there is no such model, or {private}"
    if constants.is_offline_mode():
        return f"{failed}: HF_HUB_OFFLINE is set, and the cache doesn't hold it"
    if isinstance(cause, errors.HfHubHTTPError) and cause.response is not None:
        status = cause.response.status_code
        if status == 401:
            wrong = "the hub refuses your token: correct HF_TOKEN" if token else "it asks for a token: set HF_TOKEN"
            return f"{failed}: {wrong}, or log in with 'hf auth login'"
        why = "refuses" if status < 500 and status != 429 else "is out of order or busy"
        return f"{failed}: {constants.ENDPOINT} {why} (HTTP {status})"
    if isinstance(error, errors.LocalEntryNotFoundError) or _is_network(error):
        return f"{failed}: {constants.ENDPOINT} doesn't answer ({first_line(cause)}), and the cache doesn't hold it"
    if isinstance(error, OSError) and error.strerror:
        return f"{repo_id} can't be kept in the cache {constants.HF_HUB_CACHE}: {error.strerror}"
    return f"{failed}: {first_line(error)}"


@contextmanager
def named(source: str, name: str | Path) -> Iterator[None]:
    """Errors within speak of ``name`` where they would show its folder in the cache, which nobody knows."""
    from secateur.errors import SecateurError

    try:
        yield
    except SecateurError as error:
        if not commit_of(source):
            raise
        raise type(error)(str(error).replace(source, str(name))) from error.__cause__


def _weight_names(repo_id: str, folder: Path) -> list[str]:
    """The weight files to fetch. Raises ModelLoadError for a broken index."""
    if not (folder / _INDEX).is_file():
        return ["model.safetensors"]
    try:
        names = set(json.loads((folder / _INDEX).read_text(encoding="utf8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ModelLoadError(f"{repo_id}/{_INDEX} is not a valid index of weight files") from None
    # they are patterns for huggingface_hub: with this ending, none of them can match a pickle
    return sorted(name for name in names if isinstance(name, str) and name.endswith(".safetensors"))


def _no_weights(repo_id: str, commit: str) -> str:
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(repo_id, revision=commit)
    pickled = any(re.fullmatch(r"pytorch_model.*\.bin|.*\.(pt|pth|ckpt)", file) for file in files)
    gguf = any(file.endswith(".gguf") for file in files)
    why = "no model.safetensors"
    if pickled:
        why = "only pickled ones, which secateur never opens; convert them"
    elif gguf:
        why = "only GGUF files; download one and give its path"
    return f"{repo_id} has no weights in safetensors form: {why}"


@contextmanager
def _one_sentence(repo_id: str, revision: str | None, otherwise: str) -> Iterator[None]:
    from huggingface_hub.utils import logging

    # what it warns of while it tries again is no news unless it gives up
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(explain(error, repo_id, revision, otherwise)) from error
    finally:
        logging.set_verbosity(level)


def _quiet(progress: Progress | None) -> dict[str, Any]:
    from secateur import __version__
    from secateur.models.downloads import bar_class

    return {"library_name": "secateur", "library_version": __version__, "tqdm_class": bar_class(progress)}


def _is_network(error: BaseException) -> bool:
    # the HTTP library below huggingface_hub has changed before: its errors are known by their base in name only
    return any(kind.__name__ in ("TransportError", "ConnectionError", "TimeoutError") for kind in type(error).__mro__)
