"""``compare.html``: it stands alone, escapes what it shows, and holds verdict, table and charts."""

from __future__ import annotations

import json
import re

import pytest

from secateur.comparison.page import render

pytest.importorskip("plotly")


@pytest.fixture(scope="module")
def document(compared):
    return render(compared.comparison)


def charts_of(document):
    return json.loads(re.search(r'id="charts">(.*?)</script>', document, re.S)[1])


def test_it_says_what_was_found_and_how(compared, document):
    assert (compared.folder / "compare.html").read_text(encoding="utf8") == document
    for verdict in compared.comparison.first_verdicts:
        assert f'<p class="lede">{verdict.sentence}</p>' in document
    for word in ("wanda_sp:heal=refit", "6 consecutive windows of 32 tokens", "Calibration", "not distinguishable"):
        assert word in document
    body = document[: document.index('<script type="application/json"')]
    assert not re.search(r"(src|href)=[\"']?http", body) and "url(" not in body and "@import" not in body


def test_every_method_is_in_every_chart_that_it_belongs_to(compared, document):
    titles = re.findall(r"<h3>(.*?)</h3><figure>", document)
    charts = dict(zip(titles, charts_of(document).values(), strict=True))
    methods = list(compared.comparison.asked.contenders)
    quality = charts["perplexity:builtin against parameters"]["data"]
    assert len(quality) == 7 and quality[-1]["marker"]["symbol"] == "x"
    # six methods with six looks, and a bar where there are seeds
    assert len({(t["marker"]["symbol"], t["marker"]["color"]) for t in quality}) == 7
    spread = {
        m: any(r.spread("perplexity:builtin") for r in compared.comparison.rows if r.method == m) for m in methods
    }
    assert [trace["error_y"]["visible"] for trace in quality[:-1]] == list(spread.values())
    assert spread["random_sp"] and not spread["magnitude_sp"]
    # zeros are no fewer parameters
    assert "perplexity:builtin against non-zero parameters" in charts
    weights = charts["Weights that stay at sparsity 0.5"]["data"][0]
    assert weights["y"] == methods
    for values in weights["z"]:
        assert sum(values) / len(values) == pytest.approx(0.5, abs=0.04)
    # a block that leaves takes its neurons with it; single weights are none
    neurons = charts["FFN neurons that stay at sparsity 0.5"]["data"][0]
    assert neurons["y"] == [name for name in methods if name != "wanda"]
    assert sorted(neurons["z"][neurons["y"].index("shortgpt")]) == [0, 1]
    overlap = charts["Overlap at sparsity 0.5"]["data"][0]
    assert overlap["x"] == overlap["y"] == methods and overlap["z"][0][0] == 1.0


def test_colours_are_names_that_the_style_defines_for_light_and_dark(document):
    style = document[document.index("<style>") : document.index("</style>")]
    used = set(re.findall(r"var\((--[a-z]+)\)", document.replace(style, "")))
    assert {"--one", "--six", "--ink", "--keep"} <= used
    assert [name for name in used if style.count(f"{name}:") != 2] == []
