"""The windows of tokens that methods are calibrated on and models are evaluated on.

A source is ``builtin`` (the language reference that every Python carries), ``self`` (text that the model samples
itself), a text, jsonl, json or parquet file (also ``.gz``), or the name of a data set of the ``datasets`` library.
A text is tokenised as a whole and cut into consecutive windows of equal length.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.errors import DataError, NonFiniteError, UsageError, nearest, require_extra
from secateur.finite import all_finite
from secateur.observe.textfiles import read_text_file
from secateur.provenance import CalibrationInfo
from secateur.remote import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPLITS = ("calibration", "evaluation")
SUFFIXES = (".txt", ".json", ".jsonl", ".parquet", ".gz")
# Even English text with long words stays far below this, so a prefix of a data set this long is always enough.
MAX_CHARACTERS_PER_TOKEN = 64
# Random windows lie in a beginning of the text, so that a large file is not tokenised to its end: about as much of it
# as is read of a data set, at four characters a token.
RANDOM_REACH = 16


@dataclass(frozen=True)
class HubSource:
    """Where a data set lies: arguments of ``datasets.load_dataset``, the split to read and the text column."""

    path: str
    config: str | None = None
    split: str | None = None
    field: str | None = None
    files: str | None = None
    revision: str | None = None


# The copies that published pruning results use. The Penn Treebank has only the automatic parquet conversion that
# loads without a script.
SHORT_NAMES: dict[str, dict[str, HubSource]] = {
    "wikitext2": {
        "calibration": HubSource("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
        "evaluation": HubSource("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    },
    "c4": {
        "calibration": HubSource("allenai/c4", None, "train", "text", "en/c4-train.00000-of-01024.json.gz"),
        "evaluation": HubSource("allenai/c4", None, "train", "text", "en/c4-validation.00000-of-00008.json.gz"),
    },
    "ptb": {
        split: HubSource(
            "ptb-text-only/ptb_text_only",
            split="train",
            field="sentence",
            files=f"penn_treebank/{part}/0000.parquet",
            revision="refs/convert/parquet",
        )
        for split, part in (("calibration", "train"), ("evaluation", "test"))
    },
}


@dataclass(frozen=True)
class Tokens:
    """Windows of token ids, ``ids`` [windows, length] int64 on the CPU, and where they come from.

    ``join`` says how the rows of the source were put together.
    """

    ids: Tensor
    info: CalibrationInfo
    join: str = ""
    bos: bool = False


@dataclass(frozen=True)
class _Text:
    text: str
    join: str


def load_tokens(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    samples: int,
    length: int,
    seed: int = 0,
    split: str = "calibration",
    text_field: str | None = None,
    model: PreTrainedModel | None = None,
    random_windows: bool = False,
    allow_fewer: bool = False,
) -> Tokens:
    """The first ``samples`` consecutive windows of ``length`` tokens of ``source``.

    ``split`` is ``calibration`` or ``evaluation``; files have no splits and are read whole for both. Where the
    tokenizer starts a sequence with a bos token, every window starts with one, counted within ``length``.
    ``random_windows`` draws the starts of the windows with ``seed`` instead, within a beginning of the text that is
    ``RANDOM_REACH`` times as long, or all of a shorter one; they may overlap. ``allow_fewer`` takes what there is
    (at least one window). ``text_field`` is the column of a jsonl, json or parquet file or of a data set. ``model``
    is needed by the source ``self``.
    Raises UsageError for arguments out of range and DataError for a source that can't be read or is too short.
    """
    _check_request(samples, length, split)
    if model is not None:
        check_length(model, length)
    name = source_name(source)
    if str(source) == "self":
        ids = sample_from_model(model, tokenizer, samples=samples, length=length, seed=2 * seed + SPLITS.index(split))
        return Tokens(ids, _info(name, ids, seed), join="sampled at temperature 1", bos=True)
    if tokenizer is None:
        raise UsageError(f"text from {name} needs the model's tokenizer; pass it, or use a method that needs no data")
    if not callable(tokenizer):
        raise UsageError(f"give a tokenizer as secateur.load returns it, not {tokenizer!r:.100}")
    found = _read(source, tokenizer, split=split, text_field=text_field, characters=_characters(samples * length))
    bos = start_token(tokenizer)
    width = length - len(bos)
    if width < 1:
        raise UsageError(f"length must be at least {len(bos) + 1} tokens for a tokenizer that adds a bos token")
    stream = tokenize(found.text, tokenizer, needed=samples * width * (RANDOM_REACH if random_windows else 1))
    what = f"{split} text {name}"
    starts = _window_starts(stream.numel(), width, samples, what, seed if random_windows else None, allow_fewer, length)
    body = torch.stack([stream[start : start + width] for start in starts])
    head = torch.tensor(bos, dtype=torch.int64).expand(len(starts), -1)
    ids = torch.cat([head, body], dim=1)
    if model is not None:
        _check_ids(model, ids)
    return Tokens(ids, _info(name, ids, seed, random_windows), join=found.join, bos=bool(bos))


def _check_ids(model: PreTrainedModel, ids: Tensor) -> None:
    """Raise UsageError when the tokenizer has tokens that the model doesn't embed."""
    table = getattr(model.get_input_embeddings(), "weight", None)
    if table is not None and int(ids.max()) >= table.shape[0]:
        raise UsageError(
            f"the text has token {int(ids.max())}, and the model embeds {table.shape[0]:,} tokens: give the model's own"
            " tokenizer; of a model whose vocabulary was cut, it is the result's"
        )


def source_name(source: str | Path) -> str:
    """The source as it is shown and stored: a file goes by its name, without the folders of this machine."""
    text = str(source)
    # unlike Path.is_file, it is false for a name that is too long for a file
    if isinstance(source, Path) or _looks_like_path(text) or os.path.isfile(text):
        return Path(text).name
    return text


def check_length(model: PreTrainedModel, length: int, request: str = "") -> None:
    """Raise UsageError when ``length`` tokens are more than the model has positions for.

    They are those of a window, or those that a ``request`` reads and writes.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or length <= limit:
        return
    if request:
        raise UsageError(f"{request} takes {length} positions, and the model has {limit}: make it shorter")
    raise UsageError(f"length {length} is beyond the {limit} positions of the model; use --length {limit} or less")


def start_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The bos token as a list if the tokenizer puts one before every sequence, else an empty list."""
    bos: Any = tokenizer.bos_token_id
    plain, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return [bos] if bos is not None and full[:1] == [bos] and plain[:1] != [bos] else []


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, *, needed: int | None = None) -> Tensor:
    """Token ids of ``text`` without special tokens, int64; at least ``needed`` of them where the text has as many.

    Only as long a prefix of the text is tokenised as it takes: the last tokens of a prefix are dropped, because
    they may continue differently in the whole text.
    """
    needed = len(text) if needed is None else needed
    end = 8 * needed + 1024
    while end < len(text):
        newline = text.rfind("\n", 0, end)
        ids = _encode(text[: newline if newline > end // 2 else end], tokenizer)[:-32]
        if len(ids) >= needed:
            return torch.tensor(ids, dtype=torch.int64)
        end *= 2
    return torch.tensor(_encode(text, tokenizer), dtype=torch.int64)


def sample_from_model(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    samples: int,
    length: int,
    seed: int,
    batch: int = 32,
) -> Tensor:
    """Text that the model writes by itself: [samples, length] int64, the first token of every row being bos (or eos).

    Temperature 1 over the whole vocabulary. An end-of-text token does not stop a row: the model goes on with the
    next document, as in its training. The random numbers come from an own generator, so no global state changes.
    Raises UsageError without a model and DataError when it has no token to start from.
    """
    if model is None:
        raise UsageError("calibration 'self' samples text from the model; pass the model")
    first = _first_token(model, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model), torch.inference_mode():
        rows = [
            _sample_batch(model, first, min(batch, samples - done), length, generator)
            for done in range(0, samples, batch)
        ]
    return torch.cat(rows).clone()


def cached_forward(model: PreTrainedModel, ids_BT: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits of the last position, [sequences, vocabulary], and the KV cache after ``ids_BT``.

    ``cache`` is what the previous call returned. Newer transformers call the argument ``cache``, older ones
    ``past_key_values``; both are served.
    """
    accepted = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    if cache is not None:
        arguments["cache" if "cache" in accepted else "past_key_values"] = cache
    output = model(input_ids=ids_BT, use_cache=True, **arguments)
    return output.logits[:, -1], output["cache"] if "cache" in output else output["past_key_values"]


class evaluating:
    """Context in which a model is in evaluation mode; its mode is restored afterwards."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._training = model.training

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *error: object) -> None:
        self._model.train(self._training)


def builtin_text(split: str) -> str:
    """The language reference in ``pydoc_data.topics``, one half of its topics, in sorted order.

    The parity of the last byte of the sha256 of a topic's name decides: even is calibration, odd is evaluation.
    """
    from pydoc_data.topics import topics

    parity = SPLITS.index(split)
    mine = [name for name in sorted(topics) if hashlib.sha256(name.encode()).digest()[-1] % 2 == parity]
    return "\n\n".join(topics[name] for name in mine)


def _check_request(samples: int, length: int, split: str) -> None:
    if samples < 1:
        raise UsageError(f"samples must be at least 1, got {samples} (it is the number of windows)")
    if length < 2:
        raise UsageError(f"length must be at least 2 tokens, got {length} (it is the size of a window)")
    if split not in SPLITS:
        raise UsageError(f"split must be calibration or evaluation, got {split!r}")


def _characters(tokens: int) -> int:
    return MAX_CHARACTERS_PER_TOKEN * tokens + 4096


def _info(name: str, ids: Tensor, seed: int, random_windows: bool = False) -> CalibrationInfo:
    digest = hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()
    samples, length = ids.shape
    return CalibrationInfo(
        source=name,
        samples=samples,
        length=length,
        tokens=ids.numel(),
        seed=seed,
        sha256=digest,
        random_windows=random_windows,
    )


def _window_starts(
    tokens: int, width: int, samples: int, what: str, seed: int | None, allow_fewer: bool, length: int
) -> list[int]:
    available = tokens // width
    if available < 1:
        raise DataError(f"{what} has {tokens} tokens, fewer than one window of {length}; use a longer text")
    if available < samples and not allow_fewer:
        raise DataError(
            f"{what} gives {available} windows of {length} tokens, {samples} were asked: "
            f"use samples={available} or a longer text"
        )
    samples = min(samples, available)
    if seed is None:
        return [i * width for i in range(samples)]
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(tokens - width + 1, (samples,), generator=generator).tolist()


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # verbose=False: a text longer than the model's context is no mistake here, it is cut into windows
    return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _first_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    config = model.config.get_text_config()
    for holder, names in ((tokenizer, ("bos_token_id", "eos_token_id")), (config, ("bos_token_id", "eos_token_id"))):
        for name in names:
            token = getattr(holder, name, None)
            # a config may list several that end a text
            token = token[0] if isinstance(token, list | tuple) and token else token
            if isinstance(token, int):
                return token
    raise DataError("calibration 'self' needs a bos or eos token to start from, and the model has neither")


def _sample_batch(model: PreTrainedModel, first: int, rows: int, length: int, generator: torch.Generator) -> Tensor:
    tokens, cache = [torch.full((rows, 1), first, dtype=torch.int64)], None
    for _ in range(length - 1):
        logits, cache = cached_forward(model, tokens[-1].to(model.device), cache)
        chances = logits.float().softmax(dim=-1).cpu()
        if not all_finite(chances):
            raise NonFiniteError("the model can't write calibration text: its logits hold NaN or inf")
        tokens.append(torch.multinomial(chances, 1, generator=generator))
    return torch.cat(tokens, dim=1)


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~", "\\")) or text.lower().endswith(SUFFIXES)


def _read(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, *, split: str, text_field: str | None, characters: int
) -> _Text:
    text = str(source)
    if text == "builtin":
        return _Text(builtin_text(split), "topics joined by two newlines")
    hub = SHORT_NAMES.get(text, {}).get(split)
    path = expanded(text)
    if hub is None and (isinstance(source, Path) or _looks_like_path(text) or os.path.isfile(path)):
        eos: Any = tokenizer.eos_token
        return _Text(*read_text_file(path, what=f"{split} file", text_field=text_field, eos=eos))
    return _read_dataset(text, hub or _parse_dataset(text, split), split, text_field, characters)


def _parse_dataset(text: str, split: str) -> HubSource:
    match = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?", text)
    if match is None:
        raise DataError(
            f"{split} source {text!r} is no file and no name of a data set; give builtin, self, a file or a name"
        )
    return HubSource(match[1], match[2])


def _read_dataset(text: str, hub: HubSource, split: str, text_field: str | None, characters: int) -> _Text:
    datasets = require_extra("datasets", "data", f"{split} source {text}")
    try:
        rows = iter(_open_dataset(datasets, hub, split))
        first = next(rows, None)
    except Exception as error:  # datasets raises whatever its storage layers raise; all of it is about this source
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        hint = "" if text in SHORT_NAMES else nearest(text, ("builtin", "self", *SHORT_NAMES))
        raise DataError(f"{split} data set {text} can't be loaded{hint} ({reason})") from None
    if first is None:
        raise DataError(f"{split} data set {text} is empty")
    from secateur.observe.textfiles import pick_column

    strings = [name for name, value in first.items() if isinstance(value, str)]
    column = pick_column(list(first), strings, text_field or hub.field, f"{split} data set {text}")
    taken = _take(chain([first], rows), column, characters, f"{split} data set {text}")
    return _Text("\n\n".join(taken), "rows joined by two newlines")


def _open_dataset(datasets: Any, hub: HubSource, split: str) -> Any:
    wanted = hub.split
    if wanted is None:
        names = datasets.get_dataset_split_names(hub.path, hub.config)
        order = ("train",) if split == "calibration" else ("test", "validation", "train")
        wanted = next((name for name in order if name in names), names[0])
    extra = {"data_files": hub.files} if hub.files else {}
    return datasets.load_dataset(hub.path, hub.config, split=wanted, revision=hub.revision, streaming=True, **extra)


def _take(rows: Iterable[dict[str, Any]], column: str, characters: int, where: str) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        text = "" if row[column] is None else row[column]
        if not isinstance(text, str):
            raise DataError(f"{where}, row {number} has no text in '{column}'")
        characters -= len(text) + 2
        yield text
        if characters <= 0:
            return
