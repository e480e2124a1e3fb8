"""Statistics and hidden states on disk are what they were in memory."""

import pytest
import torch

import secateur as sc
from secateur.errors import CorruptFileError
from secateur.observe import Gram, Moments, SequenceMoments, Similarity, SumSquares
from secateur.observe.activations import Activations
from secateur.observe.driver import BlockWalk
from secateur.observe.store import read_seen, write_seen

TYPES = {"squares": SumSquares, "moments": Moments, "sequences": SequenceMoments, "gram": Gram, "like": Similarity}
CPU = torch.device("cpu")


def seen_of(x, *names):
    statistics = {name: kind() for name, kind in TYPES.items()}
    for statistic in statistics.values():
        statistic.update(x)
    return {name: statistics for name in names}


def equal(one, other):
    for name in TYPES:
        mine, theirs = one[name].state(), other[name].state()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_statistics_come_back_and_can_go_on(tmp_path):
    torch.manual_seed(0)
    first, second = torch.randn(3, 4, 6), torch.randn(2, 4, 6)
    seen = {**seen_of(first, "q", "k"), **seen_of(second, "o")}
    write_seen(tmp_path / "a", seen)
    found = read_seen(tmp_path / "a", TYPES, CPU)
    assert found["q"] is found["k"] and found["q"] is not found["o"]
    for module in ("q", "o"):
        equal(found[module], seen[module])
    for statistics in (found["q"], seen["q"]):
        for name in TYPES:
            statistics[name].update(second)
    equal(found["q"], seen["q"])
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_statistic_that_saw_nothing_is_found_again(tmp_path):
    write_seen(tmp_path / "a", {"q": {"gram": Gram()}})
    assert read_seen(tmp_path / "a", TYPES, CPU)["q"]["gram"].tokens == 0


def test_damage_is_noticed(tmp_path):
    write_seen(tmp_path / "a", seen_of(torch.randn(1, 2, 4), "q"))
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-3])
    with pytest.raises(CorruptFileError):
        read_seen(tmp_path / "a", TYPES, CPU)


def test_plans_share_the_statistics_of_the_dense_model(tmp_path, tiny_llama, tiny_tokenizer, monkeypatch):
    walks = []
    observe = BlockWalk.observe

    def counted(self, block, layer, *rest, **options):
        walks.append(layer)
        return observe(self, block, layer, *rest, **options)

    monkeypatch.setattr(BlockWalk, "observe", counted)
    settings = {"method": "flap", "samples": 4, "length": 32, "dtype": "float32"}
    alone = [sc.plan(tiny_llama, tiny_tokenizer, sparsity=s, **settings) for s in (0.2, 0.4)]
    assert walks == [0, 1, 0, 1]
    walks.clear()
    shared = [sc.plan(tiny_llama, tiny_tokenizer, sparsity=s, statistics=tmp_path, **settings) for s in (0.2, 0.4)]
    assert walks == [0, 1]
    for one, other in zip(alone, shared, strict=True):
        assert not one.diff(other)
        assert all(torch.equal(one.biases[name], other.biases[name]) for name in one.biases)
    # other data, other statistics: nothing is taken that doesn't belong
    sc.plan(tiny_llama, tiny_tokenizer, sparsity=0.2, statistics=tmp_path, **{**settings, "samples": 5})
    sc.plan(tiny_llama, tiny_tokenizer, sparsity=0.2, statistics=tmp_path, options={"metric": "WIFN"}, **settings)
    assert walks == [0, 1] * 3


def test_options_that_let_units_stay_share_no_statistics_with_others(tmp_path, tiny_llama, tiny_tokenizer):
    settings = {"method": "tyr", "sparsity": 0.3, "samples": 4, "length": 32, "dtype": "float32"}
    alike = {"levels": 1, "iterations": 1, "generations": 0, "accumulation": "none"}

    def plan(parts, **more):
        return sc.plan(tiny_llama, tiny_tokenizer, options={**alike, "parts": parts}, **settings, **more)

    plan("mlp", statistics=tmp_path)
    assert not plan("both", statistics=tmp_path).diff(plan("both"))


@pytest.mark.parametrize(
    "change", [{"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}, {"hidden_act": "relu"}]
)
def test_equal_weights_under_another_config_share_no_statistics(change, tmp_path, make_llama, tiny_tokenizer):
    settings = {"method": "flap", "sparsity": 0.3, "samples": 4, "length": 32, "dtype": "float32"}
    sc.plan(make_llama(), tiny_tokenizer, statistics=tmp_path, **settings)
    other = make_llama(**change)
    shared = sc.plan(other, tiny_tokenizer, statistics=tmp_path, **settings)
    alone = sc.plan(other, tiny_tokenizer, **settings)
    assert all(torch.equal(shared.scores[name], alone.scores[name]) for name in alone.scores)


def test_runs_share_no_statistics_of_other_models_methods_and_texts(tmp_path, make_llama, tiny_tokenizer):
    for seed in (0, 1):
        make_llama(seed=seed).save_pretrained(tmp_path / f"model-{seed}")
        tiny_tokenizer.save_pretrained(tmp_path / f"model-{seed}")
    jobs = [
        (0, 4, ["flap"]),
        (1, 4, ["flap"]),
        (0, 4, ["cfsp"]),
        (0, 5, ["flap"]),
        # the second step looks at what the first has left
        (0, 4, ["flap", "flap"]),
    ]
    folders = []
    for number, (seed, samples, methods) in enumerate(jobs):
        weights = []
        for kept in (None, tmp_path / "statistics"):
            out = tmp_path / f"out-{number}-{len(weights)}"
            recipe = {
                "model": str(tmp_path / f"model-{seed}"),
                "calibration": {"samples": samples, "length": 32},
                "steps": [{"method": method, "sparsity": 0.3} for method in methods],
                "dtype": "float32",
                "out": str(out),
            }
            sc.run(recipe, statistics=kept)
            weights.append((out / "model.safetensors").read_bytes())
        assert weights[0] == weights[1]
        folders.append(len(list((tmp_path / "statistics").iterdir())))
    # the first step of the last run is the first run
    assert folders[-1] == folders[-2] + 1


@pytest.mark.parametrize("limit", [None, 0, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_in_memory_and_in_a_file(limit, dtype, tmp_path):
    torch.manual_seed(0)
    batches = [torch.randn(n, 5, 8).to(dtype) for n in (3, 3, 1)]
    hidden = Activations(limit=limit, folder=tmp_path if limit == 500 else None)
    for batch in batches:
        hidden.append(batch)
    assert len(hidden) == 3 and hidden.spilled == (limit is not None)
    assert all(torch.equal(hidden[i], batch) for i, batch in enumerate(batches))
    hidden.store(tmp_path / "kept")
    for step in range(2):
        for i in range(3):
            hidden[i] = hidden[i] + 1
        hidden.turn()
        for i, batch in enumerate(batches):
            wanted = batch
            for _ in range(step + 1):
                wanted = wanted + 1
            assert torch.equal(hidden[i], wanted)
    hidden.restore(tmp_path / "kept")
    assert all(torch.equal(hidden[i], batch) for i, batch in enumerate(batches))


def test_a_pass_over_spilled_activations_reads_the_old_ones():
    hidden = Activations(limit=0)
    for value in (1.0, 2.0):
        hidden.append(torch.full((1, 2, 2), value))
    hidden[0] = torch.zeros(1, 2, 2)
    # what a killed pass has written must not be taken for input
    assert hidden[0].unique().item() == 1.0
    hidden[1] = torch.ones(1, 2, 2)
    hidden.turn()
    assert [hidden[i].unique().item() for i in range(2)] == [0.0, 1.0]
