"""Compressions of the cache side by side: what is measured, what resumes, and what is drawn."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F

import secateur as sc
from secateur.cachestudy import page
from secateur.cachestudy.measuring import Item, Measurement, Protocol, measure_all
from secateur.cachestudy.results import CacheComparison, Row, Setting, columns, equal_columns, rows_of, speed_columns
from secateur.errors import OutputError, UnsupportedModelError, UsageError
from secateur.observe.calibration import load_tokens
from secateur.report.numbers import format_value

SMALL = {"prefix": 48, "after": 8, "windows": 2}


@pytest.fixture(scope="module")
def compared(make_llama, tiny_tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "out"
    arguments = {**SMALL, "needles": ["kv:length=220,depths=2"], "out": out}
    presses = ["knorm", "think:0.5,recent=4"]
    made = sc.compare_caches(make_llama(), tiny_tokenizer, presses=presses, ratios=[0.5], **arguments)
    return made, out, arguments


def test_numbers_are_those_of_a_cache_that_is_used(compared, tiny_llama, tiny_tokenizer):
    made, _, _ = compared
    ids = load_tokens("builtin", tiny_tokenizer, samples=2, length=56, split="evaluation").ids
    losses, held = [], 0
    for window in ids:
        cache = sc.compressed_cache("knorm:0.5", tiny_llama)
        with torch.no_grad():
            tiny_llama(window[None, :48], cache=cache)
            held += cache.report()["bytes_held"]
            logits = tiny_llama(window[None, 48:-1], cache=cache).logits[0]
        losses.append(F.cross_entropy(logits, window[49:]))
    dense, knorm, think = made.rows
    assert [row.spec for row in made.rows] == ["dense", "knorm:0.5", "think:0.5,recent=4"]
    assert knorm.loss == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
    assert knorm.held == held / (2 * 48 * 2 * 2 * 16 * tiny_llama.config.num_hidden_layers * 2)
    assert (dense.held, dense.increase, dense.loss_error) == (1.0, 0.0, 0.0)
    assert knorm.increase == pytest.approx(math.expm1(knorm.loss - dense.loss), abs=1e-9)
    assert think.asked is None and 0.7 < think.held < 0.8
    assert all(row.found == 0.0 and 0 < row.likelihood < 1 for row in made.rows)


def test_what_is_done_is_not_done_again(compared, tiny_llama, tiny_tokenizer, monkeypatch):
    made, out, arguments = compared
    with pytest.raises(OutputError, match="pass --resume to go on with it"):
        sc.compare_caches(tiny_llama, tiny_tokenizer, presses=["knorm"], ratios=[0.5], **arguments)
    lines = (out / "cache.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 4 * 3
    # killed in the middle of a line: that measurement and the ones behind it are done again, and a new press as well
    (out / "cache.jsonl").write_text("\n".join(lines[:8]) + "\n" + lines[8][:20])
    reads, whole = [], sc.cachestudy.measuring.read_prompt
    monkeypatch.setattr(
        sc.cachestudy.measuring, "read_prompt", lambda m, ids, reader: reads.append(ids) or whole(m, ids, reader)
    )
    again = sc.compare_caches(
        tiny_llama, tiny_tokenizer, presses=["knorm", "think:0.5,recent=4"], ratios=[0.5], resume=True, **arguments
    )
    assert again.rows == made.rows and len(reads) == 2
    more = sc.compare_caches(
        tiny_llama, tiny_tokenizer, presses=["knorm"], ratios=[0.25, 0.5], resume=True, **arguments
    )
    assert len(reads) == 6 and more.rows[2] == made.rows[1]
    other = {**arguments, "prefix": 40}
    with pytest.raises(OutputError, match=r"with other settings \(prefix: 48 then, 40 now\)"):
        sc.compare_caches(tiny_llama, tiny_tokenizer, presses=["knorm"], resume=True, **other)


def test_json_and_page_hold_the_numbers(compared):
    made, out, _ = compared
    document = json.loads((out / "cache.json").read_text())
    assert document["rows"][0]["perplexity"] == pytest.approx(made.rows[0].perplexity)
    assert len(document["measurements"]) == 12 and document["protocol"]["question"] == "later"
    html = (out / "cache.html").read_text()
    assert "knorm:0.5" in html and "Quality against bytes" in html and "depth of the needle" in html


def test_equal_bytes_are_asked_of_shapes(tiny_llama, tiny_tokenizer):
    made = sc.compare_caches(tiny_llama, tiny_tokenizer, presses=["knorm", "think:recent=4"], held=[0.9, 0.4], **SMALL)
    assert [(row.press, row.asked) for row in made.rows[1:]] == [
        ("knorm", 0.9),
        ("knorm", 0.4),
        ("think:recent=4", 0.9),
    ]
    assert all(row.asked - 0.05 < row.held <= row.asked for row in made.rows[1:])
    assert made.missing == ("think:recent=4 can't get to 40% of 48 tokens",)


def test_the_question_is_part_of_what_is_compressed_or_is_not(tiny_llama, tiny_tokenizer):
    sizes = {}
    for question in ("later", "end"):
        made = sc.compare_caches(
            tiny_llama,
            tiny_tokenizer,
            presses=["knorm:0.5"],
            windows=0,
            needles=["niah:length=220,depths=1"],
            question=question,
        )
        sizes[question] = made.measurements[0].bytes_dense
        assert made.rows[1].loss is None and made.rows[1].likelihood is not None
    assert sizes["later"] < sizes["end"]


def test_a_press_that_fails_says_why_and_leaves_the_others(tiny_llama, tiny_tokenizer, monkeypatch):
    from secateur.methods.cache.knorm import KeyNorm

    def broken(self, prompt):
        raise UnsupportedModelError("this is not for that model")

    monkeypatch.setattr(KeyNorm, "score", broken)
    made = sc.compare_caches(tiny_llama, tiny_tokenizer, presses=["knorm:0.5", "keydiff:0.5"], **SMALL)
    assert [row.error for row in made.rows] == ["", "this is not for that model", ""]
    assert columns(made)[1][1][:2] == ["knorm:0.5", "failed"]
    assert "this is not for that model" in page.render(made)


def comparison(**rows: list[tuple[float, float]]) -> CacheComparison:
    found = [Row("dense", "dense", None, held=1.0, loss=1.0)]
    found += [Row(p, f"{p}:{h}", None, held=h, loss=v) for p, several in rows.items() for h, v in several]
    return CacheComparison("model", Protocol(), tuple(found), ())


def test_a_journal_that_cant_be_written_ends_the_run():
    class Known(Item):
        name = "kv"

        def opened(self, model, tokenizer):
            return lambda spec: Measurement(self.name, spec, 1, 1, 1)

    def full(line):
        raise OutputError("can't write cache.jsonl: No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        measure_all(torch.nn.Linear(1, 1), None, [Known()], ["knorm:0.5"], {}, full, lambda stage, done, total: None)


def test_a_place_at_which_nothing_was_asked_has_no_probability():
    asked = {"log_likelihood": -1.0, "found": True, "task": "kv"}
    places = ((128, 0.0), (128, 1.0), (256, 0.0))
    cases = [Measurement(f"kv {n} {depth}", "s", 1, 1, 1, length=n, depth=depth, **asked) for n, depth in places]
    (drawn,) = page.heat_map("kv", "s", cases).figure["data"]
    sure = math.exp(-1)
    assert drawn["z"] == [[sure, sure], [sure, None]]
    assert drawn["text"] == [["100.0 %", "100.0 %"], ["100.0 %", "–"]]


def test_equal_bytes_lie_on_the_line_between_settings():
    made = comparison(a=[(0.5, 2.0), (0.25, 4.0)], b=[(0.6, 1.8)])
    assert made.at_equal_bytes()["a"] == {0.75: 1.5, 0.5: 2.0, 0.25: 4.0}
    assert made.at_equal_bytes()["b"] == {0.75: pytest.approx(1.5), 0.5: None, 0.25: None}
    assert made.verdicts[0].startswith("At 75% of the bytes: a, perplexity 4.48")
    assert equal_columns(made)[1][1][2:] == [equal_columns(made)[1][1][3]] * 2


def test_standard_errors_are_those_of_differences():
    ones = [
        Measurement(f"text {i}", spec, 10, 5, 5, loss=i + add)
        for i in range(3)
        for spec, add in (("dense", 0.0), ("knorm:0.5", 0.1 * (i + 1)))
    ]
    row = rows_of([Setting("knorm", 0.5, "knorm:0.5")], ones)[1]
    assert row.loss_error == pytest.approx(0.1 / math.sqrt(3)) and row.increase == pytest.approx(math.expm1(0.2))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"presses": []}, "name at least one press"),
        ({"presses": ["knorm", "knorm"]}, "press knorm is named twice"),
        ({"ratios": [1.5]}, r"ratios must lie in \(0, 1\), got 1.5"),
        ({"presses": "knorm"}, r"presses takes a list: write presses=\['knorm'\]"),
        ({"ratios": 0.5}, r"ratios takes a list: write ratios=\[0.5\]"),
        ({"ratios": ["0.5"]}, r"ratios must lie in \(0, 1\), got '0.5'"),
        ({"ratios": []}, "nothing is left to compare: no ratio was given"),
        ({"needles": "kv:length=64"}, "needles takes a list"),
        ({"question": "never"}, "question must be one of later, end"),
        ({"windows": 2.5}, "windows must be a whole number, got 2.5"),
        ({"windows": 0}, "nothing is measured"),
        ({"needles": ["nah"]}, "unknown retrieval task 'nah'"),
        ({"windows": 0, "speed": [0]}, "speed takes lengths of prompts, got 0"),
        ({"speed": [230]}, "a prompt of 230 with 32 new tokens takes 262 positions"),
        ({"prefix": 600}, "beyond the 256 positions"),
        ({"presses": ["flap"]}, "flap doesn't work on the KV cache"),
    ],
)
def test_what_is_refused(changed, message, tiny_llama, tiny_tokenizer, tmp_path):
    arguments = {"presses": ["knorm"], **SMALL, "out": tmp_path / "out", **changed}
    with pytest.raises(UsageError, match=message):
        sc.compare_caches(tiny_llama, tiny_tokenizer, **arguments)


def test_the_best_on_a_text_of_what_fits(tiny_llama, tiny_tokenizer):
    from secateur.cache.sizes import cache_shape

    room = int(cache_shape(tiny_llama).dense_bytes(400) * 0.95)
    found = sc.recommend_cache(
        tiny_llama, tiny_tokenizer, context=400, memory=room, presses=["random_kv", "knorm"], text="builtin", **SMALL
    )
    perplexities = {one.spec: one.perplexity for one in found.candidates}
    assert found.spec == min(perplexities, key=perplexities.get) and found.dense_perplexity > 1
    with pytest.raises(UsageError, match="give it too"):
        sc.recommend_cache(tiny_llama, context=400, memory=room, text="builtin")


def test_tokens_per_second_are_medians_over_turns(make_llama, tiny_tokenizer, tmp_path, monkeypatch):
    """On a clock that goes on by 1/1024 s with every token, and by twice that with a compressed cache."""
    clock, ran = [0.0], []
    monkeypatch.setattr(sc.cachestudy.speed.timing, "now", lambda device: clock[0])
    real = sc.cachestudy.speed.cached_forward

    def forward(model, ids, cache):
        ran.append((ids.shape[1], type(cache).__name__))
        # three calls warm dense up, and from 13 on the second repeat runs: both are slow
        slow = 5.0 if len(ran) <= 3 or 12 < len(ran) <= 18 else 1.0
        clock[0] += slow * 2**-10 * ids.shape[1] * (2 if "Compressed" in type(cache).__name__ else 1)
        return real(model, ids, cache)

    monkeypatch.setattr(sc.cachestudy.speed, "cached_forward", forward)
    arguments = {"presses": ["knorm:0.5"], "windows": 0, "speed": [40], "new": 2, "out": tmp_path / "out"}
    made = sc.compare_caches(make_llama(), tiny_tokenizer, repeats=3, **arguments)
    assert ran[0] == (40, "NoneType") and [shape for shape, _ in ran] == [40, 1, 1] * 8
    dense, knorm = made.rows
    (at,) = dense.speeds
    assert (at.tokens, at.prefill, at.decode) == (40, 1024, 1024)
    assert (knorm.speeds[0].prefill, knorm.speeds[0].decode) == (512, 512)
    assert (dense.held, knorm.held, knorm.loss) == (1.0, pytest.approx(0.5, abs=0.04), None)
    header, rows = speed_columns(made)
    assert header == ["tokens/s", "prefill at 40", "decode at 40"] and rows[1] == [
        "knorm:0.5",
        *2 * [format_value(512)],
    ]
    document = json.loads((tmp_path / "out" / "cache.json").read_text())
    assert document["rows"][1]["speeds"] == [{"tokens": 40, "prefill": 512, "decode": 512}]
    html = (tmp_path / "out" / "cache.html").read_text()
    assert "Reading a prompt" in html and "Writing behind a prompt" in html
    # a length that comes later is measured, and those that are known aren't
    ran.clear()
    arguments["speed"] = [40, 20]
    more = sc.compare_caches(make_llama(), tiny_tokenizer, repeats=3, resume=True, **arguments)
    assert {shape for shape, _ in ran} == {20, 1} and more.rows[1].speeds[1] == knorm.speeds[0]
