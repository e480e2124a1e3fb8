"""Windows of tokens: which texts, which windows, which errors."""

from __future__ import annotations

import builtins
import gzip
import hashlib
import json
import re
import sys
import types
import warnings
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from secateur.errors import DataError, MissingExtraError, NonFiniteError, SecateurError, UsageError
from secateur.observe import calibration
from secateur.observe.calibration import (
    builtin_text,
    cached_forward,
    load_tokens,
    sample_from_model,
    start_token,
    tokenize,
)

TEXT = "\n".join(f"line {i} says that {i * i} is the square of {i}" for i in range(400))


@pytest.fixture
def bos_tokenizer(make_tokenizer: Any) -> Any:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def write(path: Path, text: str) -> Path:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def ids_of(text: str, tokenizer: Any) -> torch.Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_builtin_splits_are_the_whole_reference_and_disjoint() -> None:
    halves = [builtin_text(split) for split in ("calibration", "evaluation")]
    assert sum(len(half) for half in halves) == sum(map(len, topics.values())) + 2 * (len(topics) - 2)
    for name, text in topics.items():
        side = hashlib.sha256(name.encode()).digest()[-1] % 2
        assert text in halves[side]
    assert min(map(len, halves)) > 150_000


def test_windows_are_consecutive_windows_of_the_tokenised_text(tiny_tokenizer: Any) -> None:
    tokens = load_tokens("builtin", tiny_tokenizer, samples=7, length=33)
    whole = ids_of(builtin_text("calibration"), tiny_tokenizer)
    assert torch.equal(tokens.ids, whole[: 7 * 33].view(7, 33))
    assert tokens.ids.dtype == torch.int64


def test_info_is_the_fingerprint_of_the_ids(tiny_tokenizer: Any) -> None:
    tokens = load_tokens("builtin", tiny_tokenizer, samples=3, length=16, seed=4)
    raw = b"".join(int(i).to_bytes(8, "little", signed=True) for i in tokens.ids.flatten())
    info = tokens.info
    assert info.sha256 == hashlib.sha256(raw).hexdigest()
    assert (info.source, info.samples, info.length, info.tokens, info.seed) == ("builtin", 3, 16, 48, 4)


def test_splits_of_builtin_give_other_tokens(tiny_tokenizer: Any) -> None:
    one, two = (load_tokens("builtin", tiny_tokenizer, samples=2, length=16, split=s) for s in calibration.SPLITS)
    assert one.info.sha256 != two.info.sha256


@pytest.mark.parametrize("needed", [1, 50, 700, 3000])
def test_a_prefix_gives_the_tokens_of_the_whole(needed: int, tiny_tokenizer: Any) -> None:
    whole = tokenize(TEXT, tiny_tokenizer)
    part = tokenize(TEXT, tiny_tokenizer, needed=needed)
    assert len(part) >= min(needed, len(whole))
    assert torch.equal(part, whole[: len(part)])


def test_a_prefix_is_cut_anywhere_in_a_text_without_newlines(tiny_tokenizer: Any) -> None:
    text = TEXT.replace("\n", " ")
    part = tokenize(text, tiny_tokenizer, needed=100)
    whole = tokenize(text, tiny_tokenizer)
    assert 100 <= len(part) < len(whole)
    assert torch.equal(part, whole[: len(part)])


def test_a_prefix_grows_when_its_tokens_are_few(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(vocab_size=2000)
    word = max((tokenizer.decode([i]) for i in range(2, 2000)), key=lambda w: len(w) if w.strip().isalpha() else 0)
    assert len(word) > 10
    text = word * 1000 + TEXT
    part = tokenize(text, tokenizer, needed=700)
    assert len(part) >= 700
    assert torch.equal(part, ids_of(text, tokenizer)[: len(part)])


def test_random_windows_follow_the_seed(tiny_tokenizer: Any) -> None:
    def draw(seed: int) -> torch.Tensor:
        return load_tokens("builtin", tiny_tokenizer, samples=5, length=16, seed=seed, random_windows=True).ids

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    whole = ids_of(builtin_text("calibration"), tiny_tokenizer)
    assert all(any(torch.equal(w, row) for w in whole.unfold(0, 16, 1)[whole[:-15] == row[0]]) for row in draw(1))


def test_every_window_starts_with_bos_where_the_tokenizer_adds_one(bos_tokenizer: Any, tiny_tokenizer: Any) -> None:
    assert start_token(bos_tokenizer) == [0]
    assert start_token(tiny_tokenizer) == []
    tokens = load_tokens("builtin", bos_tokenizer, samples=4, length=16)
    plain = load_tokens("builtin", tiny_tokenizer, samples=4, length=15)
    assert tokens.bos
    assert torch.equal(tokens.ids[:, 0], torch.zeros(4, dtype=torch.int64))
    assert torch.equal(tokens.ids[:, 1:], plain.ids)


def test_a_text_beyond_the_context_gives_no_warning(tmp_path: Path, caplog: Any, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(model_max_length=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tokens(write(tmp_path / "a.txt", TEXT), tokenizer, samples=3, length=100)
    assert not caplog.records


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.md"])
def test_a_text_file_is_taken_as_it_is(name: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path / name, TEXT)
    for source in (path, str(path)):
        tokens = load_tokens(source, tiny_tokenizer, samples=4, length=20)
        assert torch.equal(tokens.ids.flatten(), ids_of(TEXT, tiny_tokenizer)[:80])
        assert tokens.info.source == name  # no folders of this machine


ROWS = [{"id": i, "text": f"document {i} has some words\u2028and more", "note": "x"} for i in range(40)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "lines.json", "a.json", "strings.json", "a.parquet"])
def test_rows_are_joined_with_the_eos_token(name: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, {"id": [r["id"] for r in ROWS], "text": [r["text"] for r in ROWS]})
    elif name == "a.json":
        write(path, json.dumps(ROWS))
    elif name == "strings.json":
        write(path, json.dumps([row["text"] for row in ROWS]))
    else:
        write(path, lines)
    tokens = load_tokens(path, tiny_tokenizer, samples=4, length=20)
    joined = ids_of("</s>".join(row["text"] for row in ROWS), tiny_tokenizer)
    assert torch.equal(tokens.ids.flatten(), joined[:80])
    assert int((joined == 1).sum()) == len(ROWS) - 1
    assert tokens.join == "rows joined by the eos token"


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_rows_without_an_eos_token_are_joined_by_newlines(tmp_path: Path, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in ROWS))
    tokens = load_tokens(path, tokenizer, samples=2, length=20)
    assert torch.equal(tokens.ids.flatten(), ids_of("\n\n".join(r["text"] for r in ROWS), tokenizer)[:40])


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "half \\ud83d of one, all \\ud83d\\ude00 of another"}\n' * 20)
    tokens = load_tokens(path, tiny_tokenizer, samples=2, length=20)
    joined = ids_of("</s>".join(["half \ufffd of one, all \U0001f600 of another"] * 20), tiny_tokenizer)
    assert torch.equal(tokens.ids.flatten(), joined[:40])


def test_text_field_names_the_column(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"q": "a b", "a": TEXT[:300]}) for _ in range(9)))
    tokens = load_tokens(path, tiny_tokenizer, samples=1, length=20, text_field="a")
    assert torch.equal(tokens.ids[0], ids_of(TEXT[:300], tiny_tokenizer)[:20])


def test_the_only_string_column_needs_no_name(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"n": [1, 2], "sentence": [TEXT, TEXT]})
    tokens = load_tokens(path, tiny_tokenizer, samples=1, length=20)
    assert torch.equal(tokens.ids[0], ids_of(TEXT, tiny_tokenizer)[:20])


def jsonl(*lines: str) -> bytes:
    return "\n".join(lines).encode()


BAD_FILES = {
    "empty": ("a.txt", b"", "calibration file a.txt is empty"),
    "blank": ("a.txt", b" \n\n", "holds no text"),
    "nul": ("a.txt", b"abc\0def", "holds NUL bytes (the first at 3)"),
    "latin": ("a.txt", b"caf\xe9", "is not UTF-8 text (byte 3)"),
    "gzip": ("a.txt.gz", b"no gzip", "is not a whole gzip file"),
    "cut gzip": ("a.txt.gz", gzip.compress(TEXT.encode())[:100], "is not a whole gzip file"),
    "short": ("a.txt", b"one two three four five", "tokens, fewer than one window of 32"),
    "bad line": ("a.jsonl", jsonl('{"text": "a"}', "{oops"), "calibration file a.jsonl, line 2 is not valid JSON"),
    "bad json": ("a.json", b'[{"text": "a"},', "is not valid JSON"),
    "deep": ("a.jsonl", b"[" * 100_000, "line 1 is not valid JSON: it is nested too deeply"),
    "deep file": ("a.json", b"[" * 100_000, "a.json is not valid JSON: it is nested too deeply"),
    "long number": ("a.jsonl", b'{"text": 1' + b"0" * 5000 + b"}", "line 1 is not valid JSON: Exceeds the limit"),
    "no column": ("a.jsonl", jsonl('{"q": "a", "a": "b"}'), "no column 'text'; name one with text_field"),
    "columns named": ("a.jsonl", jsonl('{"q": "a", "a": "b"}'), "(its columns: q, a)"),
    "gap": ("a.jsonl", jsonl('{"text": "a"}', "", '{"other": "b"}'), "line 3 has no text in 'text'"),
    "numbers": ("a.json", b"[1, 2]", "no column 'text'"),
    "no rows": ("a.json", b"[]", "holds no text"),
    "no lines": ("a.jsonl", b"\n\n", "holds no text"),
    "parquet": ("a.parquet", b"PAR1 but not really", "is not a readable parquet file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_give_one_sentence(case: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    name, data, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_tokens(tmp_path / name, tiny_tokenizer, samples=2, length=32)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misspelt_text_field_suggests_the_nearest(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", '{"question": "a", "answer": "b"}')
    with pytest.raises(DataError, match="no column 'anwser'; did you mean 'answer'"):
        load_tokens(path, tiny_tokenizer, samples=1, length=4, text_field="anwser")


def test_a_parquet_row_without_text_is_named(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a", None]})
    with pytest.raises(DataError, match="row 2 has no text in 'text'"):
        load_tokens(path, tiny_tokenizer, samples=1, length=4)


def test_a_short_text_says_how_many_windows_it_gives(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path / "a.txt", TEXT)
    available = len(ids_of(TEXT, tiny_tokenizer)) // 64
    expected = f"gives {available} windows of 64 tokens, 10000 were asked: use samples={available} or a longer text"
    with pytest.raises(DataError, match=f"calibration text a.txt {expected}"):
        load_tokens(path, tiny_tokenizer, samples=10000, length=64)
    tokens = load_tokens(path, tiny_tokenizer, samples=10000, length=64, allow_fewer=True)
    assert tokens.ids.shape == (available, 64)


@pytest.mark.parametrize("source", ["nowhere.txt", "../nowhere", "/nowhere/text", "a.jsonl.gz", "x.parquet"])
def test_a_missing_file_is_a_missing_file(source: str, tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=f"calibration file {re.escape(source)} does not exist"):
        load_tokens(source, tiny_tokenizer, samples=1, length=4)
    with pytest.raises(DataError, match="evaluation file"):
        load_tokens(source, tiny_tokenizer, samples=1, length=4, split="evaluation")


def test_a_folder_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="is a folder"):
        load_tokens(tmp_path, tiny_tokenizer, samples=1, length=4)


def test_an_impossible_name_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no file and no name of a data set"):
        load_tokens("what is this?", tiny_tokenizer, samples=1, length=4)


@pytest.mark.parametrize("name", ["{}", "./{}", "{}.txt"])
def test_a_name_too_long_for_a_file_is_refused(name: str, hub: FakeHub, tiny_tokenizer: Any) -> None:
    hub.error = ValueError("no such data set")
    source = name.format("x" * 5000)
    assert calibration.source_name(source) == source.removeprefix("./")
    with pytest.raises(DataError, match=r"does not exist|no such data set"):
        load_tokens(source, tiny_tokenizer, samples=1, length=4)


def test_the_home_folder_of_nobody_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"calibration file ~nobody_here/x\.txt does not exist"):
        load_tokens("~nobody_here/x.txt", tiny_tokenizer, samples=1, length=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0, "length": 8}, "samples must be at least 1, got 0"),
        ({"samples": -3, "length": 8}, "samples must be at least 1, got -3"),
        ({"samples": 1, "length": 1}, "length must be at least 2 tokens, got 1"),
        ({"samples": 1, "length": 8, "split": "train"}, "split must be calibration or evaluation"),
    ],
)
def test_numbers_out_of_range(arguments: dict[str, Any], message: str, tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=message):
        load_tokens("builtin", tiny_tokenizer, **arguments)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(UsageError, match="needs the model's tokenizer"):
        load_tokens("builtin", None, samples=1, length=8)


def test_windows_beyond_the_models_positions_are_refused(tiny_tokenizer: Any, tiny_llama: Any) -> None:
    with pytest.raises(UsageError, match="length 257 is beyond the 256 positions"):
        load_tokens("builtin", tiny_tokenizer, samples=1, length=257, model=tiny_llama)


def test_self_is_sampled_with_the_seed_and_leaves_the_global_state(tiny_tokenizer: Any, tiny_llama: Any) -> None:
    tiny_llama.train()
    state = torch.random.get_rng_state()

    def draw(**arguments: Any) -> Any:
        return load_tokens("self", tiny_tokenizer, samples=40, length=12, model=tiny_llama, **arguments)

    one = draw(seed=1)
    assert one.ids.shape == (40, 12)
    assert (one.ids[:, 0] == 0).all()
    assert one.info.source == "self"
    assert torch.equal(one.ids, draw(seed=1).ids)
    assert not torch.equal(one.ids, draw(seed=2).ids)
    assert not torch.equal(one.ids, draw(seed=1, split="evaluation").ids)
    assert torch.equal(state, torch.random.get_rng_state())
    assert tiny_llama.training


def test_self_follows_the_models_distribution(tiny_tokenizer: Any, tiny_llama: Any) -> None:
    model = tiny_llama
    # nothing but token 7 has a chance, whatever came before
    model.lm_head = torch.nn.Linear(32, 512)
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.nn.init.constant_(model.lm_head.bias, -1e4)
    model.lm_head.bias.data[7] = 0
    ids = sample_from_model(model, tiny_tokenizer, samples=2, length=6, seed=0)
    assert ids.tolist() == [[0, 7, 7, 7, 7, 7]] * 2


def test_the_cache_gives_the_logits_of_the_whole_sequence(tiny_llama: Any) -> None:
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        whole = tiny_llama(input_ids=ids).logits[:, -1]
        _, cache = cached_forward(tiny_llama, ids[:, :15])
        stepwise, _ = cached_forward(tiny_llama, ids[:, 15:], cache)
    torch.testing.assert_close(stepwise, whole)


def test_self_needs_a_model_and_a_first_token(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="pass the model"):
        load_tokens("self", tiny_tokenizer, samples=1, length=4)
    tiny_llama.config.bos_token_id = tiny_llama.config.eos_token_id = None
    with pytest.raises(DataError, match="needs a bos or eos token"):
        load_tokens("self", None, samples=1, length=4, model=tiny_llama)


def test_self_starts_from_the_first_of_several_ends(tiny_llama: Any) -> None:
    tiny_llama.config.bos_token_id, tiny_llama.config.eos_token_id = None, [5, 7]
    assert load_tokens("self", None, samples=2, length=4, model=tiny_llama).ids[:, 0].tolist() == [5, 5]


def test_self_refuses_a_broken_model(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    tiny_llama.lm_head.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="logits hold NaN or inf"):
        load_tokens("self", tiny_tokenizer, samples=1, length=4, model=tiny_llama)


class FakeHub(types.ModuleType):
    """Stands in for ``datasets``: records how it is asked, gives rows or raises."""

    def __init__(self, rows: list[dict[str, Any]], error: Exception | None = None) -> None:
        super().__init__("datasets")
        self.rows, self.error, self.calls = rows, error, []

    def get_dataset_split_names(self, path: str, config: str | None) -> list[str]:
        return ["train", "validation"]

    def load_dataset(self, path: str, config: str | None, **arguments: Any) -> list[dict[str, Any]]:
        if self.error:
            raise self.error
        self.calls.append((path, config, arguments))
        return self.rows


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub([{"text": line + " "} for line in TEXT.split("\n")])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


@pytest.mark.parametrize(
    ("source", "split", "path", "config", "part"),
    [
        ("wikitext2", "calibration", "Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        ("wikitext2", "evaluation", "Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("c4", "evaluation", "allenai/c4", None, "train"),
        ("some/name:config", "calibration", "some/name", "config", "train"),
        ("some/name", "evaluation", "some/name", None, "validation"),
    ],
)
def test_data_sets_are_joined_by_two_newlines(
    source: str, split: str, path: str, config: str | None, part: str, hub: FakeHub, tiny_tokenizer: Any
) -> None:
    tokens = load_tokens(source, tiny_tokenizer, samples=3, length=20, split=split)
    joined = "\n\n".join(row["text"] for row in hub.rows)
    assert torch.equal(tokens.ids.flatten(), ids_of(joined, tiny_tokenizer)[:60])
    asked_path, asked_config, arguments = hub.calls[0]
    assert (asked_path, asked_config, arguments["split"]) == (path, config, part)
    assert tokens.info.source == source


def test_only_as_many_rows_as_needed_are_read(hub: FakeHub, tiny_tokenizer: Any) -> None:
    def endless() -> Any:
        while True:
            yield {"text": TEXT}

    hub.rows = endless()
    assert load_tokens("c4", tiny_tokenizer, samples=1, length=8).ids.shape == (1, 8)


def test_the_penn_treebank_reads_its_own_column(hub: FakeHub, tiny_tokenizer: Any) -> None:
    hub.rows = [{"sentence": line, "text_of_another_kind": "x"} for line in TEXT.split("\n")]
    load_tokens("ptb", tiny_tokenizer, samples=1, length=8)
    assert hub.calls[0][2]["data_files"] == "penn_treebank/train/0000.parquet"


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("wikitext2", ConnectionError("no route\nto host"), "data set wikitext2 can't be loaded (no route to host)"),
        ("bultin", FileNotFoundError("no such data set"), "bultin can't be loaded; did you mean 'builtin'?"),
    ],
)
def test_a_failing_hub_gives_one_sentence(
    source: str, error: Exception, message: str, hub: FakeHub, tiny_tokenizer: Any
) -> None:
    hub.error = error
    with pytest.raises(DataError) as caught:
        load_tokens(source, tiny_tokenizer, samples=1, length=8)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_data_set_and_a_missing_column(hub: FakeHub, tiny_tokenizer: Any) -> None:
    hub.rows = []
    with pytest.raises(DataError, match="is empty"):
        load_tokens("some/name", tiny_tokenizer, samples=1, length=8)
    hub.rows = [{"a": "x", "b": "y"}]
    with pytest.raises(DataError, match=r"columns: a, b"):
        load_tokens("some/name", tiny_tokenizer, samples=1, length=8)


@pytest.mark.parametrize("cell", [7, 0, ["a", "b"]])
def test_a_row_of_a_data_set_without_text_is_named(cell: Any, hub: FakeHub, tiny_tokenizer: Any) -> None:
    hub.rows = [{"text": "a", "other": "b"}, {"text": "c", "other": cell}]
    with pytest.raises(DataError, match="calibration data set some/name, row 2 has no text in 'other'"):
        load_tokens("some/name", tiny_tokenizer, samples=1, length=8, text_field="other")


def test_data_sets_need_their_extra(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"secateur\[data\]"):
        load_tokens("wikitext2", tiny_tokenizer, samples=1, length=8)
    assert issubclass(MissingExtraError, SecateurError)
