"""The tables on the terminal: the cells they show, folding of equal layers, 80 columns."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from secateur.plans import Plan
from secateur.provenance import CalibrationInfo, Fingerprint, Provenance
from secateur.report import LayerCut, Metric
from secateur.report.tables import (
    anatomy_table,
    anatomy_text,
    cut_table,
    diff_table,
    method_text,
    methods_table,
    metrics_table,
    plain_text,
    plan_text,
)
from secateur.structure import Anatomy, Cost, Frozen, Group, Matrix

DENSE, PRUNED = "smollm2-135m", "flap 20 %"
PROTOCOL = "wikitext2_test, file as it is, 40 windows of 512 tokens"
METHOD = {
    "name": "tide",
    "summary": "Tide: remove the neurons that hardly move.",
    "doc": "Tide: remove the neurons that hardly move.\n\n    score_j = step_j",
    "descriptor": {
        "object": "heads_and_neurons",
        "granularity": "structured_group",
        "when": "post",
        "score": "second_order",
        "allocation": "global",
        "recovery": "least_squares",
        "data": "unlabelled_calibration",
        "supervision": "none",
        "speedup": "memory_only",
    },
    "options": {
        "sparsity": {"default": 0.2, "unit": "", "range": "[0, 1)", "choices": [], "help": "fraction removed"},
        "budget": {"default": "params", "unit": "", "range": "", "choices": ["params", "macs"], "help": "of what"},
        "min_keep": {"default": 1, "unit": "units", "range": "[1, inf)", "choices": [], "help": "kept at least"},
    },
    "sequential": True,
}


def metrics() -> list[Metric]:
    return [
        Metric("parameters", "parameters", {DENSE: 134_515_008, PRUNED: 107_612_006}),
        Metric("size on disk", "bytes", {DENSE: 538_060_552, PRUNED: 430_448_442}, False),
        Metric("perplexity", "", {DENSE: 25.61, PRUNED: 37.72}, False, PROTOCOL),
        Metric("worst case", "", {DENSE: 25.61, PRUNED: 482.9}, False, PROTOCOL),
        Metric("decode", "tok/s", {DENSE: 1234.2, PRUNED: 1480.1}, True, "batch 1"),
        Metric("new", "tok/s", {PRUNED: 3.0}, True),
    ]


def lines_of(text: str) -> dict[str, list[str]]:
    """First word of every line → its cells (cells are at least two spaces apart)."""
    return {
        line.split("  ")[0].strip(): [c.strip() for c in line.split("  ") if c.strip()] for line in text.splitlines()
    }


def layered(count: int, **frozen: str) -> Anatomy:
    groups = []
    for i in range(count):
        groups.append(Group(f"layers.{i}.attention", "kv_head", i, 3, Cost(294_912, 294_912, 1_179_648, 512)))
        groups.append(Group(f"layers.{i}.mlp", "neuron", i, 1536, Cost(1728, 1728, 6912), frozen=frozen.get(f"mlp{i}")))
    groups.append(Group("layers", "layer", -1, count, Cost(3_540_096, 3_538_944, 14_155_776), inexact="norm follows"))
    matrices = tuple(Matrix(f"model.layers.{i}.mlp.up_proj", i, (1536, 576)) for i in range(count))
    left_alone = (Frozen("lm_head", "tied to the embedding"),)
    blocks = Cost(3_538_944 * count, 3_538_944 * count)
    return Anatomy("llama", count, tuple(groups), matrices, left_alone, blocks, Cost(134_515_008, bytes=538_060_032))


def provenance(*notes: str) -> Provenance:
    return Provenance(
        method="flap",
        options={"sparsity": 0.2},
        model=Fingerprint(architecture="LlamaForCausalLM", shapes="s", weights="w", num_layers=4, name=DENSE),
        calibration=CalibrationInfo(source="builtin", samples=64, length=512, tokens=32768, seed=3, sha256="ab" * 32),
        versions={"torch": "2.6.0"},
        notes=notes,
    )


def unit_plan(kept: dict[int, int], notes: tuple[str, ...] = ()) -> Plan:
    names = {layer: f"layers.{layer}.mlp" for layer in kept}
    return Plan(
        provenance=(provenance(*notes),),
        groups={name: 1536 for name in names.values()},
        keep={names[layer]: torch.arange(count) for layer, count in kept.items()},
    )


def test_metrics_have_units_changes_and_the_dense_model_first() -> None:
    rows = lines_of(plain_text(metrics_table(metrics())))
    assert rows["metric"] == ["metric", f"{DENSE} (dense)", PRUNED, "change"]
    assert rows["parameters"] == ["parameters", "134.5 M", "107.6 M", "−20.0 %"]
    assert rows["size on disk"] == ["size on disk", "538 MB", "430 MB", "−20.0 %"]
    assert rows["perplexity¹"] == ["perplexity¹", "25.6", "37.7", "+47.3 %"]
    assert rows["worst case¹"] == ["worst case¹", "25.6", "482.9", "×18.9"]
    assert rows["decode²"] == ["decode²", "1,234 tok/s", "1,480 tok/s", "+19.9 %"]
    assert rows["new"] == ["new", "–", "3 tok/s", "–"]


def test_protocols_are_footnotes_and_shared_ones_appear_once() -> None:
    text = " ".join(plain_text(metrics_table(metrics())).split())
    assert text.count(PROTOCOL) == 1
    assert f"¹ {PROTOCOL}" in text
    assert "² batch 1" in text


def test_better_is_green_and_worse_is_red() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, color_system="standard", force_terminal=True, no_color=False)
    console.print(metrics_table(metrics()))
    green, red = "\x1b[32m", "\x1b[31m"
    assert f"{green}+19.9 %" in stream.getvalue()
    assert f"{red}+47.3 %" in stream.getvalue()
    assert stream.getvalue().count(green) == 2, "fewer parameters is a fact, fewer bytes and more speed are better"


def test_three_models_show_their_change_in_the_cell() -> None:
    metric = Metric("perplexity", "", {"a": 20.0, "b": 30.0, "c": 10.0}, False)
    text = plain_text(metrics_table([metric]))
    assert "change" not in text
    assert lines_of(text)["perplexity"] == ["perplexity", "20", "30", "10"]
    assert "+50.0 %" in text and "−50.0 %" in text


def test_names_are_not_markup() -> None:
    text = plain_text(metrics_table([Metric("[red]x[/red]", "", {"[b]": 1.0, "[/i]": 2.0})]))
    assert "[red]x[/red]" in text and "[b] (dense)" in text and "[/i]" in text


@pytest.mark.parametrize("count", [2, 30])
def test_equal_layers_are_one_line(count: int) -> None:
    text = anatomy_text(layered(count))
    rows = lines_of(text)
    assert rows[f"0–{count - 1}"][1] in ("attention (kv_head)", "mlp (neuron)")
    assert f"0–{count - 1}" in text
    assert "294.9 k" in text and "1.2 MB" in text and "512" in text
    assert "25 %" in text and "75 %" in text and " 100 %" in text
    assert f"{count} matrices whose weights can be zeroed: mlp.up_proj 1536x576" in text
    assert len(text.splitlines()) < 16


def test_a_frozen_layer_is_apart_and_the_reasons_are_told() -> None:
    text = anatomy_text(layered(4, mlp2="holds the router"))
    assert "0–1, 3" in text
    assert "mlp (neuron) frozen" in text
    assert "frozen: lm_head: tied to the embedding" in text
    assert "masked and cut differ: norm follows" in text


def test_str_of_an_anatomy_is_its_text() -> None:
    anatomy = layered(2)
    assert str(anatomy) == anatomy_text(anatomy)
    assert plain_text(anatomy_table(anatomy)) in str(anatomy)


def test_plan_text_shows_kept_units_provenance_and_notes() -> None:
    text = plan_text(unit_plan({0: 1200, 1: 1200, 2: 1100}, notes=("layer 2 was damped",)))
    rows = lines_of(text)
    assert rows["0–1"] == ["0–1", "1,200/1,536"]
    assert rows["2"] == ["2", "1,100/1,536"]
    assert "flap(sparsity=0.2)" in text
    assert "builtin, 64 windows of 512 tokens, seed 3" in text
    assert "torch 2.6.0" in text
    assert "note: layer 2 was damped" in text


def test_plan_text_shows_sparsity_per_matrix_and_removed_layers() -> None:
    half = torch.tensor([[True, False], [True, False]])
    masks = {f"model.layers.{i}.{name}.weight": half for i in range(3) for name in ("attn.c_proj", "mlp.c_proj")}
    masks["model.layers.2.mlp.c_proj.weight"] = torch.tensor([[True, False], [False, False]])
    text = plan_text(Plan((provenance(),), {"layers": 4}, {"layers": torch.tensor([0, 3])}, masks))
    rows = lines_of(text)
    assert rows["layers"] == ["layers", "attn.c_proj", "mlp.c_proj"]
    assert rows["0–1"] == ["0–1", "50.0", "50.0"]
    assert rows["2"] == ["2", "50.0", "75.0"]
    assert "layers: 2/4 kept, removed: 1–2" in text


def test_plan_text_shows_no_zeros_where_cut_units_are_refitted() -> None:
    down = torch.tensor([True, False, True, True]).expand(2, 4)
    own = torch.tensor([[True, False, True, True], [False, True, True, True]])
    masks = {f"model.layers.0.{name}.weight": mask for name, mask in (("down", down), ("back", down.T), ("up", own))}
    values = {name: torch.zeros(int(mask.sum())) for name, mask in masks.items()}
    keep = {"model.layers.0.mlp": torch.tensor([0, 2, 3])}
    text = plan_text(Plan((provenance(),), {"model.layers.0.mlp": 4}, keep, masks, values))
    assert lines_of(text)["layers"] == ["layers", "mlp kept", "up"]
    assert "weights whose kept entries are updated: 3" in text


def test_many_matrices_become_a_range() -> None:
    masks = {f"layers.0.experts.{i}.up.weight": torch.arange(10) < i for i in range(9)}
    rows = lines_of(plan_text(Plan((provenance(),), masks=masks)))
    assert rows["layers"] == ["layers", "weights"]
    assert rows["0"] == ["0", "20.0–100.0"]


def test_diff_table_counts_what_only_one_plan_keeps() -> None:
    first, second = unit_plan({0: 1200, 1: 1000}), unit_plan({0: 1200, 1: 800})
    text = plain_text(diff_table(first.diff(second)))
    assert lines_of(text)["layers.1.mlp"] == ["layers.1.mlp", "800", "200", "0", "80.0 %"]
    assert "layers.0.mlp" not in text
    assert "the plans keep the same" in plain_text(diff_table(first.diff(first)))


def test_cut_table_folds_and_shows_before_and_after() -> None:
    cuts = [LayerCut(i, {"kv_head": (3, 2), "neuron": (1536, 1200)}, 0.25) for i in range(29)]
    cuts.append(LayerCut(29, {"kv_head": (3, 3), "neuron": (1536, 1536)}))
    rows = lines_of(plain_text(cut_table(cuts)))
    assert rows["0–28"] == ["0–28", "3 → 2", "1,536 → 1,200", "25.0 %"]
    assert rows["29"] == ["29", "3 → 3", "1,536 → 1,536", "0.0 %"]


def test_cut_table_of_a_weight_method() -> None:
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    rows = lines_of(plain_text(cut_table([LayerCut(i, {}, 0.5, dict.fromkeys(names, 0.5)) for i in range(30)])))
    assert rows["layers"] == ["layers", *(n.split(".")[1] for n in names)]
    assert rows["0–29"] == ["0–29", *["50.0"] * 7]


def test_methods_table_says_what_every_method_does() -> None:
    text = plain_text(methods_table([METHOD]))
    assert "remove the neurons" in text
    assert "Tide:" not in text
    for word in ("tide", "heads and", "second", "least", "memory"):
        assert word in text


def test_method_text_lists_options_with_default_unit_range_and_meaning() -> None:
    text = plain_text(method_text(METHOD))
    rows = lines_of(text)
    assert rows["sparsity"] == ["sparsity", "0.2", "–", "[0, 1)", "fraction removed"]
    assert rows["budget"] == ["budget", "params", "–", "params | macs", "of what"]
    assert rows["min_keep"] == ["min_keep", "1", "units", "[1, inf)", "kept at least"]
    assert rows["data"] == ["data", "unlabelled calibration"]
    assert "score_j = step_j" in text


def test_everything_fits_80_columns_without_losing_words() -> None:
    shown = [
        plain_text(metrics_table(metrics())),
        anatomy_text(layered(30, mlp7="holds the router")),
        plan_text(unit_plan({i: 1200 + i for i in range(30)})),
        plain_text(methods_table([METHOD])),
        plain_text(method_text(METHOD)),
    ]
    for text in shown:
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
