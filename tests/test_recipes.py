import pytest

from secateur.errors import RecipeError
from secateur.recipes import load_recipe, merge_reports
from secateur.report import LayerCut, Report

WHOLE = """
model: smollm2-135m
calibration: {source: builtin, samples: 64, length: 512, seed: 0}
steps:
  - method: flap
    sparsity: 0.2
  - method: wanda
    pattern: 2:4
    options: {use_variant: false}
evaluate: [perplexity:builtin, size]
out: pruned/
format: dense
"""


@pytest.fixture
def load(tmp_path):
    def from_text(text: str):
        (tmp_path / "recipe.yaml").write_text(text)
        return load_recipe(tmp_path / "recipe.yaml")

    return from_text


def test_a_whole_recipe(load):
    recipe = load(WHOLE)
    assert [step.method for step in recipe.steps] == ["flap", "wanda"]
    assert recipe.steps[0].sparsity == 0.2
    # YAML 1.1 would read 124, a number to the base 60
    assert recipe.steps[1].pattern == "2:4"
    assert recipe.steps[1].options == {"use_variant": False}
    assert recipe.evaluate == ["perplexity:builtin", "size"]
    recipe.check_methods()


def test_defaults_are_those_of_the_plan(load):
    arguments = load("steps: [{method: flap}]").plan_arguments(load("steps: [{method: flap}]").steps[0])
    assert arguments == {
        "method": "flap", "sparsity": None, "pattern": None, "budget": None, "allocate": None, "heal": None,
        "target": None, "options": {}, "calibration": "builtin", "samples": 64, "length": 512, "seed": 0,
        "text_field": None, "random_windows": False, "dtype": "auto", "latency_table": None, "partial": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"), [("1e-1", 0.1), (".5", 0.5), ("0", 0.0), ("5.E-1", 0.5), ("'0.25'", 0.25), ("+0.5", 0.5)]
)
def test_numbers(load, text, value):
    assert load(f"steps: [{{method: flap, sparsity: {text}}}]").steps[0].sparsity == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stesp: []", "unknown key 'stesp'; did you mean 'steps'?|'steps' is missing"),
        ("steps: [{method: flap}]\nmodle: x", "unknown key 'modle'; did you mean 'model'?"),
        ("steps: [{method: flap, sparsty: 0.1}]", "unknown key 'sparsty' in step 1; did you mean 'sparsity'?"),
        ("steps: [{method: a}, {method: b, patern: '2:4'}]", "unknown key 'patern' in step 2; did you mean 'pattern'?"),
        ("steps: [{method: a}]\ncalibration: {sampels: 3}", "'sampels' in calibration; did you mean 'samples'?"),
        ("steps: [{method: a}]\nqqqq: 1", "unknown key 'qqqq'; valid are model"),
        ("model: x", "'steps' is missing"),
        ("steps: []", "steps: list should have at least 1 item"),
        ("steps: [{sparsity: 0.1}]", "'method' is missing in step 1"),
        ("steps: [{method: a, sparsity: lots}]", "step 1.sparsity: input should be a valid number.*got 'lots'"),
        ("steps: [{method: a}]\ncalibration: {samples: 0}", "calibration.samples: .*got 0"),
        ("steps: [{method: a}]\ncalibration: {samples: true}", "calibration.samples: must be a number, not true"),
        ("steps: [{method: a, stages: yes}]", "step 1.stages: must be a number, not true"),
        ("steps: [{method: a}]\nformat: zip", "format: .*got 'zip'"),
        ("steps: [{method: a, sparsity: 0.1, options: {sparsity: 0.2}}]", "step 1: sparsity is given twice"),
        ("steps: [{method: a, sparsity: 0.1, pattern: 2:4}]", "sparsity 0.1 contradicts pattern 2:4"),
        ("steps: [{method: a}]\nmodel: x\nmodel: y", "line 3: 'model' is given twice"),
        ("steps: [{method: a}", "line 1"),
        ("- method: a", "must be a mapping"),
        ("", "empty file"),
        ("just text", "a single value"),
        ("a: &a [x, x]\nb: [*a, *a]\nsteps: []", "line 2: recipes have no aliases"),
        ("a: &a {<<: *a}", "line 1: recipes have no aliases"),
        ("[" * 100_000, "line 1: it is nested too deeply"),
        ("- " * 100_000, "line 1: it is nested too deeply"),
        ("steps: [{method: flap, sparsity: " + "1" * 5000 + "}]", "a value that can't be read"),
        ("steps: [{method: 2001-99-99}]", "a value that can't be read"),
        ("steps: [{method: !!timestamp x}]", "a value that can't be read"),
        ("#" * 1_000_001, "has more than 1,000 kB"),
        ("steps: !!python/object/apply:os.system ['true']", "line 1"),
    ],
)
def test_mistakes_are_one_sentence_with_file_and_place(load, text, said):
    with pytest.raises(RecipeError, match=said) as caught:
        load(text)
    assert "recipe.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_consistent_sparsity_and_pattern_go_together(load):
    assert load("steps: [{method: wanda, sparsity: 0.5, pattern: 2:4}]").steps[0].pattern == "2:4"


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not a text file"):
        load_recipe(tmp_path / "binary.yaml")


def report(method, achieved, layers, **more):
    return Report(model="m", method=method, options={}, requested=method, achieved=achieved, layers=layers, **more)


def test_reports_of_steps_compose():
    first = report("flap", 0.2, [LayerCut(0, {"neuron": (10, 8)}, 0.2)], notes=["a"], seconds={"plan": 1.0})
    second = report(
        "wanda", 0.5, [LayerCut(0, {"neuron": (8, 4)}, 0.5, {"q": 0.5})], notes=["b"], seconds={"plan": 2.0}
    )
    whole = merge_reports([first, second])
    assert whole.method == "flap+wanda"
    assert whole.achieved == pytest.approx(0.6)
    assert whole.layers == [LayerCut(0, {"neuron": (10, 4)}, pytest.approx(0.6), {"q": 0.5})]
    assert whole.notes == ["a", "b"]
    assert whole.seconds == {"plan": 3.0}


def test_layers_keep_their_dense_numbers_after_a_removal():
    kept, gone = {"layer": (1, 1)}, {"layer": (1, 0)}
    first = report("shortgpt", 1 / 3, [LayerCut(0, kept), LayerCut(1, gone, 1.0), LayerCut(2, kept)])
    second = report("wanda", 0.5, [LayerCut(0, sparsity=0.3), LayerCut(1, sparsity=0.5)])
    cuts = {cut.layer: cut.sparsity for cut in merge_reports([first, second]).layers}
    assert cuts == {0: pytest.approx(0.3), 1: 1.0, 2: 0.5}


def test_a_second_mask_begins_with_the_zeros_of_the_first():
    def masking(method, masked):
        return report(method, masked, [LayerCut(0, {}, masked, {"q": masked}, masked)], masked=masked)

    whole = merge_reports([masking("magnitude", 0.5), masking("magnitude", 0.6)])
    assert whole.achieved == whole.layers[0].sparsity == pytest.approx(0.6)
    cut = report("flap", 0.3, [LayerCut(0, {"neuron": (10, 7)}, 0.3)])
    whole = merge_reports([masking("wanda", 0.5), cut, masking("magnitude", 0.5)])
    assert whole.achieved == whole.layers[0].sparsity == pytest.approx(0.65)
    assert list(whole.options) == ["step 1: wanda", "step 2: flap", "step 3: magnitude"]


def test_groups_keep_their_dense_numbers_after_a_removal():
    gone = report("shortgpt", 1 / 3, [LayerCut(0), LayerCut(1, {"layer": (1, 0)}, 1.0), LayerCut(2)])
    kept = {"layers.0.mlp": [0], "layers.1.mlp": [1]}
    cut = report("flap", 0.5, [LayerCut(0), LayerCut(1)], keep=kept, scores={"layers.1.mlp": [1.0]})
    whole = merge_reports([gone, cut])
    assert whole.keep == {"layers.0.mlp": [0], "layers.2.mlp": [1]} and whole.scores == {"layers.2.mlp": [1.0]}


@pytest.mark.parametrize(
    "steps",
    [
        [{"method": "magnitude", "sparsity": 0.5}, {"method": "magnitude", "sparsity": 0.6}],
        [{"method": "magnitude", "sparsity": 0.5}, {"method": "random", "sparsity": 0.5}],
        [{"method": "magnitude", "sparsity": 0.5}, {"method": "magnitude", "pattern": "2:4"}],
        [
            {"method": "magnitude", "sparsity": 0.5},
            {"method": "shortgpt", "options": {"layers": 1}},
            {"method": "magnitude_sp", "sparsity": 0.3},
            {"method": "random", "sparsity": 0.5},
        ],
    ],
    ids=lambda steps: "+".join(step["method"] for step in steps),
)
def test_masks_of_steps_are_counted_as_they_are_in_the_checkpoint(tiny_checkpoint, tmp_path, steps):
    import secateur as sc

    data = {"source": "builtin", "samples": 2, "length": 32}
    job = {"model": str(tiny_checkpoint), "out": str(tmp_path / "out"), "steps": steps, "calibration": data}
    found = sc.run(job)
    model, _ = sc.load(tmp_path / "out")
    dense, _ = sc.load(tiny_checkpoint)
    matrices = {m.tensor: model.get_parameter(m.tensor) for m in sc.anatomy(model).matrices}
    size = sum(dense.get_parameter(m.tensor).numel() for m in sc.anatomy(dense).matrices)
    left = sum(w.numel() for w in matrices.values())
    zeros = {name: int((w == 0).sum()) for name, w in matrices.items()}
    assert found.masked == pytest.approx(sum(zeros.values()) / left, abs=1e-9)
    assert found.achieved == pytest.approx(1 - (left - sum(zeros.values())) / size, abs=1e-9)
    there = [cut for cut in found.layers if cut.units.get("layer") != (1, 0)]
    for number, cut in enumerate(there):
        for short, share in cut.matrices.items():
            name = f"model.layers.{number}.{short}.weight"
            assert share == pytest.approx(zeros[name] / matrices[name].numel(), abs=1e-9)


def test_one_report_is_left_as_it_is():
    single = report("flap", 0.2, [])
    assert merge_reports([single]) is single
