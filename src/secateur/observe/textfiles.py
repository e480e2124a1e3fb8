"""Reading text out of files: plain text, jsonl, json and parquet, each also as ``.gz``."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.errors import DataError, first_line, nearest, require_extra

_SURROGATE = re.compile("[\ud800-\udfff]")


def read_text_file(
    path: Path, *, what: str = "text file", text_field: str | None = None, eos: str | None = None
) -> tuple[str, str]:
    """(text, how it was joined). A text file is taken as it is; rows are joined by ``eos`` or two newlines.

    ``what`` names the file's role in errors; ``text_field`` is the column of a file with columns.
    Raises DataError when the file is missing, empty, binary, malformed or has no such column.
    """
    where = f"{what} {path.name}"
    if not os.path.exists(path):
        raise DataError(f"{what} {path} does not exist")
    data = _read_bytes(path, where)
    kind = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
    rows = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}.get(kind.lower())
    if rows is None:
        return _not_blank(_decode(data, where), where), "file as it is"
    separator = eos or "\n\n"
    name = "the eos token" if eos else "two newlines"
    # half of a pair of surrogates, which JSON of web crawls holds, is no character that a tokenizer takes
    text = _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", separator.join(rows(data, where, text_field)))
    return _not_blank(text, where), f"rows joined by {name}"


def pick_column(columns: Sequence[str], strings: Sequence[str], wanted: str | None, where: str) -> str:
    """The column that holds the text: ``wanted``, else ``text``, else the only one with strings. Raises DataError."""
    listed = ", ".join(columns) or "none"
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise DataError(f"{where} has no column '{wanted}'{nearest(wanted, columns)} (its columns: {listed})")
    if "text" in columns:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise DataError(f"{where} has no column 'text'; name one with text_field (its columns: {listed})")


def _read_bytes(path: Path, where: str) -> bytes:
    if path.is_dir():
        raise DataError(f"{where} is a folder; give a text, jsonl, json or parquet file")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix.lower() == ".gz" and data else data
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{where} is not a whole gzip file") from None
    except OSError as error:
        raise DataError(f"{where} can't be read: {error.strerror or error}") from None
    if not data:
        raise DataError(f"{where} is empty")
    return data


def _decode(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text (byte {error.start}); is it a binary file?") from None
    if "\0" in text:
        raise DataError(f"{where} holds NUL bytes (the first at {text.index(chr(0))}); is it a binary file?")
    return text


def _not_blank(text: str, where: str) -> str:
    if not text.strip():
        raise DataError(f"{where} holds no text")
    return text


def _jsonl_rows(data: bytes, where: str, text_field: str | None) -> list[str]:
    rows = []
    # split at newlines only: a JSON string may hold other line separators such as U+2028
    for number, line in enumerate(_decode(data, where).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((f"line {number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}, line {number} is not valid JSON: {_wrong(error)}") from None
    return _texts(rows, where, text_field)


def _json_rows(data: bytes, where: str, text_field: str | None) -> list[str]:
    try:
        document = json.loads(_decode(data, where))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line under the name .json
            return _jsonl_rows(data, where, text_field)
        raise DataError(f"{where} is not valid JSON: {error.msg} in line {error.lineno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {_wrong(error)}") from None
    if not isinstance(document, list):
        document = [document]
    return _texts([(f"entry {number}", row) for number, row in enumerate(document, start=1)], where, text_field)


def _wrong(error: Exception) -> str:
    """What a reader of JSON minds."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)


def _parquet_rows(data: bytes, where: str, text_field: str | None) -> list[str]:
    parquet = require_extra("pyarrow.parquet", "data", where)
    arrow = require_extra("pyarrow", "data", where)
    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        schema = file.schema_arrow
        strings = [f.name for f in schema if arrow.types.is_string(f.type) or arrow.types.is_large_string(f.type)]
        column = pick_column(schema.names, strings, text_field, where)
        rows = file.read(columns=[column]).column(column).to_pylist()
    except arrow.ArrowException as error:
        raise DataError(f"{where} is not a readable parquet file: {str(error).splitlines()[0]}") from None
    return [_string(row, f"row {number}", column, where) for number, row in enumerate(rows, start=1)]


def _texts(rows: list[tuple[str, Any]], where: str, text_field: str | None) -> list[str]:
    if not rows:
        raise DataError(f"{where} holds no text")
    if all(isinstance(row, str) for _, row in rows):
        return [row for _, row in rows]
    first = rows[0][1]
    columns = list(first) if isinstance(first, dict) else []
    strings = [name for name in columns if isinstance(first[name], str)]
    column = pick_column(columns, strings, text_field, where)
    return [_string(row.get(column) if isinstance(row, dict) else None, at, column, where) for at, row in rows]


def _string(value: Any, at: str, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}, {at} has no text in '{column}'")
    return value
