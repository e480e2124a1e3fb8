"""The HTML report: it parses, it is alone, it escapes, and it holds the numbers."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from secateur.errors import MissingExtraError, OutputError
from secateur.report import LayerCut, Metric, Report, Sample
from secateur.report.charts import score_charts, sparsity_chart, units_chart
from secateur.report.html import render, write_report
from secateur.report.speeds import decode_sentence
from secateur.timing import BUSY

DENSE, PRUNED = "smollm2-135m", "pruned"
VOID = {"meta", "link", "br", "img", "hr", "input"}
NAMES = ("self_attn.q_proj", "mlp.up_proj")


class Page(HTMLParser):
    """Checks that elements nest, and collects elements, attributes and text outside scripts."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(document)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not (self.open and self.open[-1] == "style"):
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def charts(self) -> dict[str, dict]:
        return json.loads(self.scripts[0])


def metrics(speedup: float = 1.2, shrink: float = 0.8) -> list[Metric]:
    return [
        Metric("parameters", "parameters", {DENSE: 134_515_008, PRUNED: 134_515_008 * shrink}),
        Metric("size on disk", "bytes", {DENSE: 538e6, PRUNED: 538e6 * shrink}, False, "safetensors"),
        Metric("perplexity", "", {DENSE: 25.61, PRUNED: 37.72}, False, "40 windows of 512 tokens"),
        Metric("decode", "tok/s", {DENSE: 40.0, PRUNED: 40.0 * speedup}, True, "batch 1"),
    ]


def structured() -> Report:
    layers = [LayerCut(i, {"kv_head": (3, 2), "neuron": (40, 30 + i)}, 0.2) for i in range(4)]
    scores = {f"layers.{i}.attention": [0.1, 2.0, 3.0] for i in range(4)}
    scores |= {f"layers.{i}.mlp": [float(j) - 20 for j in range(40)] for i in range(4)}
    keep = {f"layers.{i}.attention": [1, 2] for i in range(4)}
    keep |= {f"layers.{i}.mlp": list(range(10 - i, 40)) for i in range(4)}
    return Report(
        model=DENSE,
        method="flap",
        options={"sparsity": 0.2, "metric": "WIFV"},
        requested="20 % of the blocks' parameters",
        achieved=0.2003,
        layers=layers,
        scores=scores,
        keep=keep,
        metrics=metrics(),
        samples=[Sample("The capital of France is", {DENSE: " Paris.", PRUNED: " Lyon."})],
        calibration={"source": "builtin", "samples": 64, "seed": 7},
        notes=["layer 3 kept its last head"],
        versions={"torch": "2.6.0"},
        machine={"cores": 2},
        seconds={"calibrate": 81.2},
        output="out/flap",
        plain=False,
    )


def weights(**changes: object) -> Report:
    layers = [LayerCut(i, {}, 0.5, dict.fromkeys(NAMES, 0.5)) for i in range(4)]
    flat = replace(structured(), method="wanda", layers=layers, scores={}, keep={}, plain=True, metrics=metrics(1, 1))
    return replace(flat, **changes)


def layers_removed() -> Report:
    cuts = [LayerCut(i, {"layer": (1, 0 if i in (1, 2) else 1)}) for i in range(4)]
    scores, keep = {"layers": [0.4, 0.1, 0.2, 0.9]}, {"layers": [0, 3]}
    return replace(structured(), method="shortgpt", layers=cuts, scores=scores, keep=keep, output=None)


@pytest.fixture(params=[structured, weights, layers_removed], ids=["structured", "weights", "layers"])
def page(request: pytest.FixtureRequest) -> Page:
    return Page(render(request.param()))


def test_page_loads_nothing(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert not attributes.get("src"), f"{tag} loads {attributes.get('src')}"
        assert (attributes.get("href") or "#").startswith("#")
    (policy,) = (m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'") and "http" not in policy


def test_style_loads_nothing_and_knows_dark(page: Page) -> None:
    style = re.search(r"<style>(.*?)</style>", render(structured()), re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    assert "prefers-color-scheme: dark" in style[1]


def test_page_has_plotly_inside_and_charts_to_draw(page: Page) -> None:
    assert len(page.scripts) == 3
    assert "plotly.js" in page.scripts[1][:200]
    drawn = {div["id"] for div in page.of("div") if div.get("class") == "chart"}
    assert drawn == set(page.charts)
    assert drawn
    assert "<" not in page.scripts[0], "a < in the data could close the script element"


def test_every_chart_says_in_words_what_it_shows(page: Page) -> None:
    for div in page.of("div"):
        if div.get("class") == "chart":
            assert div["role"] == "img" and len(div["aria-label"] or "") > 40


def test_headings_never_skip_a_level(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_wide_tables_scroll_in_their_own_box() -> None:
    document = render(structured())
    assert document.count("<table>") == document.count('aria-label="table"><table>') == 2


def test_page_holds_what_was_asked_measured_and_used() -> None:
    text = Page(render(structured())).text
    for expected in (
        *("20 % of the blocks' parameters", "removed 20.0 %"),
        *("25.6", "37.7", "+47.3 %", "538 MB", "430 MB", "134.5 M", "107.6 M", "40 tok/s", "48 tok/s"),
        *("40 windows of 512 tokens", "safetensors", "batch 1"),
        *("The capital of France is", "Paris.", "Lyon."),
        *("WIFV", "builtin", "81.2 s", "2.6.0", "layer 3 kept its last head"),
        "2 of 3",
    ):
        assert expected in text, expected


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "a\"b'c&amp;<b>", "</script><img src=x>"])
def test_text_is_escaped_everywhere(hostile: str) -> None:
    report = replace(
        structured(),
        model=hostile,
        method=hostile,
        requested=hostile,
        options={hostile: hostile},
        layers=[LayerCut(0, {hostile: (3, 2)}, 0.5, {hostile: 0.5, "other": 0.1})],
        scores={f"layers.0.{hostile}": [1.0, 2.0]},
        metrics=[Metric(hostile, hostile, {hostile: 1.0, "p" + hostile: 2.0}, True, hostile)],
        samples=[Sample(hostile, {hostile: hostile})],
        calibration={hostile: hostile},
        notes=[hostile],
        versions={hostile: hostile},
        machine={hostile: [hostile]},
        seconds={hostile: 1.0},
        output=hostile,
    )
    page = Page(render(report))
    assert len(page.scripts) == 3
    assert not page.of("img") and not page.of("b")
    assert page.text.count(hostile) > 15
    assert page.charts


def test_structured_cuts_are_bars_of_kept_and_removed() -> None:
    chart = units_chart(structured().layers, "neuron")
    kept, removed = chart.figure["data"]
    assert kept["y"] == [30, 31, 32, 33] and removed["y"] == [10, 9, 8, 7]
    assert "Of 160 FFN neurons 126 stay and 34 leave" in chart.description


def test_weight_cuts_are_a_map_of_matrices_and_layers() -> None:
    cuts = [LayerCut(i, {}, 0.5, {"self_attn.q_proj": 0.4, "mlp.up_proj": 0.6}) for i in range(2)]
    (heat,) = sparsity_chart(cuts).figure["data"]
    assert heat["y"] == ["q_proj", "up_proj"] and heat["z"] == [[0.4, 0.4], [0.6, 0.6]]
    assert "Between 40.0 % and 60.0 %" in sparsity_chart(cuts).description
    assert "Every matrix of every layer has 50.0 % zeros" in sparsity_chart(weights().layers).description


def test_removed_layers_are_struck_out() -> None:
    page = Page(render(layers_removed()))
    assert len([li for li in page.of("li") if li.get("class") == "gone"]) == 2
    assert "Layers 1–2 were removed; 2 of 4 stay." in page.text


def test_scores_split_into_kept_and_removed() -> None:
    attention, mlp = score_charts(structured())
    kept, removed = attention.figure["data"]
    assert kept["y"] == [2.0, 3.0] * 4 and removed["y"] == [0.1] * 4
    kept, removed = mlp.figure["data"]
    assert kept["median"][0] == 4.5 and removed["median"][0] == -15.5
    assert removed["x"] == [0, 1, 2, 3]


def test_scores_of_layers_lie_over_the_layers() -> None:
    (chart,) = score_charts(layers_removed())
    kept, removed = chart.figure["data"]
    assert (kept["x"], kept["y"]) == ([0, 3], [0.4, 0.9])
    assert (removed["x"], removed["y"]) == ([1, 2], [0.1, 0.2])


def test_infinite_scores_are_left_out() -> None:
    report = replace(layers_removed(), scores={"layers": [float("inf"), 0.1, float("nan"), 0.9], "mlp": []})
    (chart,) = score_charts(report)
    assert [trace["y"] for trace in chart.figure["data"]] == [[0.9], [0.1]]
    assert Page(render(report)).charts


@pytest.mark.parametrize(("low", "kind"), [(0.01, "log"), (1.0, None), (-1.0, None)])
def test_wide_positive_scores_get_a_logarithmic_axis(low: float, kind: str | None) -> None:
    (chart,) = score_charts(replace(layers_removed(), scores={"layers": [low, 2.0, 3.0, 4.0]}))
    assert chart.figure["layout"]["yaxis"].get("type") == kind


def warning(report: Report) -> bool:
    return any(div.get("class") == "box warning" for div in Page(render(report)).of("div"))


def test_a_mask_that_made_nothing_faster_is_a_warning() -> None:
    assert warning(weights())
    text = Page(render(weights())).text
    assert "The zeros made nothing faster (measured: decode 0.0 %)" in text
    assert "as many bytes as before" in text and "packed" in text


def test_a_bound_is_not_a_measured_speed() -> None:
    bound = Metric("decode bound", "tokens/s", {DENSE: 60.0, PRUNED: 120.0}, True, "bytes moved")
    assert warning(weights(metrics=[*metrics(1, 1), bound]))
    assert "bound" not in Page(render(weights(metrics=[bound, *metrics(1, 1)]))).text.split("What was cut")[0]


def decoding(decode: float, products: float | None, bound: float) -> list[Metric]:
    """Tokens per second of a cut model; of the dense one 10, 20 of its products alone and 30 at most."""
    speeds = {"decode": (10.0, decode), "decode, products alone": (20.0, products), "decode bound": (30.0, bound)}
    return [
        Metric(name, "tokens/s", {DENSE: dense, PRUNED: cut}, True, "as usual")
        for name, (dense, cut) in speeds.items()
        if cut is not None
    ]


def test_it_says_why_decoding_is_not_as_fast_as_fewer_bytes_allow() -> None:
    text = Page(render(replace(structured(), metrics=decoding(12.5, 26.0, 42.0)))).text
    assert (
        "Decoding is 1.25 times as fast, where reading fewer bytes of weights allows 1.40: of 100 ms a token, products"
        " with weights took 50 and take 38.5 now, 1.30 times as fast; the rest (attention to the cache, norms, the"
        " calls themselves) took 50 and takes 41.5."
    ) in text
    # what a runtime could do isn't among the speeds
    assert "Speed: decode +25.0 %." in text
    assert "allows 1.40." in decode_sentence(decoding(12.5, None, 42.0))
    # on a machine that wasn't quiet, what a token takes is also waiting
    busy = [replace(metric, protocol=f"2 threads, {BUSY}") for metric in decoding(12.5, 26.0, 42.0)]
    assert "the calls themselves, and waiting for processors that others had) took 50" in decode_sentence(busy)


@pytest.mark.parametrize(
    "metrics",
    [
        # as fast as it may be, also beyond
        decoding(13.9, 26.0, 42.0),
        decoding(15.0, 26.0, 42.0),
        # as many bytes as before: zeros
        decoding(9.9, 20.0, 30.0),
        decoding(12.5, 26.0, 42.0)[:2],
        [replace(metric, values={DENSE: metric.values[DENSE]}) for metric in decoding(12.5, 26.0, 42.0)],
        [],
    ],
)
def test_it_says_nothing_of_decoding_where_there_is_nothing_to_explain(metrics: list[Metric]) -> None:
    assert decode_sentence(metrics) == ""


def test_the_headline_shows_bytes_on_disk() -> None:
    memory = Metric("bytes", "bytes", {DENSE: 111e6, PRUNED: 222e6}, False, "in memory")
    headline = Page(render(replace(structured(), metrics=[memory, *metrics()]))).text.split("What was cut")[0]
    assert "430 MB" in headline and "222 MB" not in headline


def test_no_warning_where_there_is_speed_or_no_mask() -> None:
    assert not warning(weights(metrics=metrics(speedup=1.5)))
    assert not warning(structured())


def test_the_snippet_asks_for_remote_code_only_where_it_is_needed() -> None:
    call = 'from_pretrained("out/flap"'
    assert call + ", trust_remote_code=True)" in Page(render(structured())).text
    plain = Page(render(weights())).text
    assert call + ")" in plain and "trust_remote_code" not in plain
    assert "from_pretrained" not in Page(render(layers_removed())).text


def test_an_empty_report_is_still_a_page() -> None:
    page = Page(render(Report("m", "random", {}, "nothing", 0.0)))
    assert not page.charts and "Before and after" not in page.text


def test_same_report_same_page() -> None:
    assert render(structured()) == render(structured())


def test_write_report_writes_one_file(tmp_path: Path) -> None:
    path = write_report(weights(), tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf8") == render(weights())
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_write_report_says_where_it_could_not_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"can't write .*report\.html"):
        write_report(weights(), tmp_path / "file" / "report.html")


def test_without_plotly_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'secateur\[report\]'"):
        write_report(weights(), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [structured, weights, layers_removed])
def test_every_colour_of_the_charts_is_in_both_colour_schemes(make: Callable[[], Report]) -> None:
    document = render(make())
    style = re.search(r"<style>(.*?)</style>", document, re.DOTALL)
    used = set(re.findall(r"var\((--[a-z]+)\)", json.dumps(Page(document).charts)))
    assert style and used
    for colour in used:
        assert len(re.findall(rf"{colour}: #", style[1])) == 2, colour


def test_few_layers_are_counted_in_whole_numbers() -> None:
    assert units_chart(structured().layers, "neuron").figure["layout"]["xaxis"]["dtick"] == 1
    many = [LayerCut(i, {"neuron": (4, 3)}) for i in range(30)]
    assert "dtick" not in units_chart(many, "neuron").figure["layout"]["xaxis"]
