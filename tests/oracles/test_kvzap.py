"""KVzap: its ridge and its MLP, what they are fitted to, and what leaves by a threshold, beside a slow model."""

from __future__ import annotations

import json

import pytest
import torch

import secateur as sc
from cache_prompts import Words
from cache_reference import generate
from decoding_reference import slow
from families import make_tiny, tiny_ids
from secateur.cache import fitting
from secateur.cache.fitting import FitOptions, Ridge, collect, fit_surrogate
from secateur.cache.rereading import reread_scores
from secateur.errors import (
    CorruptFileError,
    DataError,
    NonFiniteError,
    OptionError,
    OutputError,
    PlanMismatchError,
    UsageError,
)
from secateur.methods.cachespec import parse_cache_spec
from secateur.methods.surrogates import read_surrogate

TEXTS = tiny_ids(windows=4, length=24)
IDS = tiny_ids(windows=1, length=20)
WINDOW = 6


@pytest.fixture(scope="module")
def model():
    return make_tiny("llama")


@pytest.fixture(scope="module")
def fitted(model, tmp_path_factory):
    return fit_surrogate(
        model, Words(), TEXTS, tmp_path_factory.mktemp("fit") / "surrogate", FitOptions(rows=20, seed=1)
    )


# -- the fit -----------------------------------------------------------------------------------------------------------


def test_ridge_of_merged_parts_is_that_of_the_whole():
    x, y = torch.randn(60, 5, dtype=torch.float64), torch.randn(60, 2, dtype=torch.float64)
    whole, first, second = Ridge(), Ridge(), Ridge()
    whole.update(x, y)
    first.update(x[:17], y[:17])
    second.update(x[17:], y[17:])
    first.merge(second)
    for mine, theirs in zip(first.solve(1.0), whole.solve(1.0), strict=True):
        assert torch.allclose(mine, theirs)
    # the normal equations of centred rows, as scikit-learn has them: the intercept isn't penalised
    xc, yc = x - x.mean(dim=0), y - y.mean(dim=0)
    weight = torch.linalg.solve(xc.mT @ xc + torch.eye(5), xc.mT @ yc).mT
    assert torch.allclose(whole.solve(1.0)[0].double(), weight, atol=1e-6)
    assert torch.allclose(whole.solve(1.0)[1].double(), y.mean(dim=0) - weight @ x.mean(dim=0), atol=1e-6)


def test_a_linear_target_is_recovered():
    x, weight, bias = torch.randn(50, 6), torch.randn(3, 6), torch.randn(3)
    ridge = Ridge()
    ridge.update(x, x @ weight.mT + bias)
    found = ridge.solve(0.0)
    assert torch.allclose(found[0], weight, atol=1e-5) and torch.allclose(found[1], bias, atol=1e-5)


def test_targets_are_log_scores_of_kvzip_plus(model):
    hidden, scores = collect(model, Words(), IDS[0])
    cache = sc.compressed_cache("knorm:0", model)
    cache.tokenizer = Words()
    with torch.no_grad():
        states = model(IDS, cache=cache, output_hidden_states=True).hidden_states
    method = parse_cache_spec("kvzip:0.5,sinks=0,plus=true")[0]
    for layer, score in enumerate(reread_scores(cache, model.model, method, (0, 0), IDS[0])):
        assert torch.allclose(scores[layer], score.log().mT)
        with torch.no_grad():
            assert torch.allclose(hidden[layer], model.model.layers[layer].input_layernorm(states[layer][0]), atol=1e-5)
    words = Words()
    words.chat_template = "some"
    assert collect(model, words, IDS[0])[0][0].shape == (20, 32)  # the template's own tokens are left out


def test_an_mlp_learns_what_a_line_cant():
    x = torch.randn(600, 2)
    y = x[:, :1].abs()
    options = FitOptions(kind="mlp", neurons=32, batch=32)
    (w1, b1), (w2, b2) = fitting._fit_mlp(iter([(x[:100], y[:100]), (x[100:], y[100:])]), options)
    predicted = torch.nn.functional.gelu(x @ w1.mT + b1) @ w2.mT + b2
    assert 1 - (y - predicted).square().mean() / y.var() > 0.9
    again = fitting._fit_mlp(iter([(x, y)]), options)
    assert torch.equal(again[0][0], w1)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_files_are_those_of_kvpress(model, tmp_path, kind):
    options = FitOptions(kind=kind, rows=20, neurons=7, epochs=2)
    fit_surrogate(model, Words(), TEXTS, tmp_path / "out", options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    hidden = {"linear": None, "mlp": 7}[kind]
    assert config == {"model_type": "kvzap", "input_dim": 32, "output_dim": 2, "hidden_dim": hidden, "n_modules": 3}
    names = {"linear": ["layers.0.bias", "layers.0.weight"], "mlp": ["layers.0.0.bias", "layers.0.2.weight"]}[kind]
    found = read_surrogate(str(tmp_path / "out"))
    assert set(names) <= set(found.tensors())
    assert found.scores(1, 3, torch.randn(1, 5, 32), 2).shape == (1, 2, 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_stopped_fit_goes_on_to_the_same_files(model, fitted, tmp_path, monkeypatch):
    options, out = FitOptions(rows=20, seed=1), tmp_path / "surrogate"
    read, whole = [], fitting.collect

    def stops(*arguments):
        read.append(1)
        if len(read) == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(fitting, "collect", stops)
    with pytest.raises(KeyboardInterrupt):
        fit_surrogate(model, Words(), TEXTS, out, options)
    assert not out.exists()
    with pytest.raises(OutputError, match="pass --resume to go on"):
        fit_surrogate(model, Words(), TEXTS, out, options)
    with pytest.raises(OutputError, match="had another model, text or rows"):
        fit_surrogate(model, Words(), TEXTS.flip(0), out, options, resume=True)
    fit_surrogate(model, Words(), TEXTS, out, options, resume=True)
    assert len(read) == 5
    for name in ("config.json", "model.safetensors"):
        assert (out / name).read_bytes() == (fitted.folder / name).read_bytes()


def test_what_cant_be_fitted(model, fitted, tmp_path):
    with pytest.raises(DataError, match="at least 2, got 1"):
        fit_surrogate(model, Words(), TEXTS[:1], tmp_path / "out", FitOptions(rows=20))
    with pytest.raises(UsageError, match="at most the 24 tokens"):
        fit_surrogate(model, Words(), TEXTS, tmp_path / "out")
    with pytest.raises(OptionError, match="did you mean 'linear'"):
        FitOptions(kind="lineer")
    with pytest.raises(OutputError, match="exists"):
        fit_surrogate(model, Words(), TEXTS, fitted.folder, FitOptions(rows=20))
    broken = make_tiny("llama")
    broken.model.layers[1].self_attn.o_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(NonFiniteError):
        fit_surrogate(broken, Words(), TEXTS, tmp_path / "out", FitOptions(rows=20))
    assert not (tmp_path / "out").exists()


def test_the_command(cli, tiny_checkpoint, tmp_path):
    command = ["cache", "fit", tiny_checkpoint, "--samples", 2, "--length", 32, "--rows", 16, "--out", tmp_path / "out"]
    run = cli(*command, "--json", "--quiet")
    assert run.code == 0, run.err
    assert json.loads(run.out)["held_out"] == 1 and (tmp_path / "out" / "fit.json").is_file()
    again = cli(*command)
    assert again.code == 1 and len(again.err.strip().splitlines()) == 1
    over = cli(*command, "--overwrite")
    assert over.code == 0 and "held-out" in over.out and "threshold=" in over.out


# -- the method --------------------------------------------------------------------------------------------------------


def spec_of(fitted, share=0.5, more=""):
    return f"kvzap:surrogate={fitted.folder},threshold={fitted.thresholds[share]},window={WINDOW}{more}"


def test_greedy_generation_equals_a_reference_that_hides_what_was_evicted(model, fitted):
    surrogate, threshold = read_surrogate(str(fitted.folder)), fitted.thresholds[0.5]

    def rule(module, there):
        low = surrogate.scores(module.layer_idx, 3, module.inputs[None], 2)[0] < threshold
        low[:, -WINDOW:] = False
        return there & ~low

    cache = sc.compressed_cache(spec_of(fitted, more=",decoding=true"), model)
    found = generate(model, IDS, new=12, cache=cache)
    assert torch.equal(found.tokens[0], slow(model, IDS, 12, rule))
    for layer in cache.layers:
        assert layer.keys.shape[2] == WINDOW and (layer.store.lengths + WINDOW < 31).any()
    assert not torch.equal(found.tokens, generate(model, IDS, new=12).tokens)
    prompt_only = sc.compressed_cache(spec_of(fitted), model)
    generate(model, IDS, new=12, cache=prompt_only)
    assert prompt_only.report()["bytes_held"] > cache.report()["bytes_held"]


@pytest.mark.parametrize("more", ["", ",decoding=true"])
def test_a_padded_batch_equals_one_by_one_and_a_loaded_cache_goes_on(model, fitted, tmp_path, more):
    spec, both = spec_of(fitted, more=more), tiny_ids(windows=2, length=20)
    padded = 15 if more else 10  # shorter than the window at first; without more, that would leave it whole
    mask = torch.ones_like(both)
    mask[1, :padded] = 0
    together = generate(model, both, mask, new=12, cache=sc.compressed_cache(spec, model))
    for b, padding in enumerate((0, padded)):
        alone = generate(model, both[b : b + 1, padding:], new=12, cache=sc.compressed_cache(spec, model))
        assert torch.equal(alone.tokens[0], together.tokens[b])
    cache = sc.compressed_cache(spec, model)
    with torch.no_grad():
        model(IDS, cache=cache)
        cache.save(tmp_path / "cache.safetensors")
        loaded = sc.load_cache(tmp_path / "cache.safetensors", model, spec)
        for t in range(8):
            assert torch.equal(*(model(IDS[:, t : t + 1], cache=c).logits for c in (loaded, cache)))


def test_thresholds_at_both_ends(model, fitted):
    dense = generate(model, IDS, new=8)
    for threshold, window in ((-1e9, True), (1e9, False)):
        spec = f"kvzap:surrogate={fitted.folder},threshold={threshold},window={WINDOW},decoding=true"
        cache = sc.compressed_cache(spec, model)
        found = generate(model, IDS, new=8, cache=cache)
        assert torch.equal(found.logits, dense.logits) == window
        if not window:
            assert all(entry["tokens_kept"] == [[WINDOW, WINDOW]] for entry in cache.report()["layers"])


def test_a_sparsity_and_wrappers(model, fitted):
    for spec, heads in (
        (f"kvzap:0.5,surrogate={fitted.folder},window={WINDOW}", [10, 10]),
        (f"adakv(kvzap:surrogate={fitted.folder},window={WINDOW}):0.5", None),
    ):
        cache = sc.compressed_cache(spec, model)
        with torch.no_grad():
            model(IDS, cache=cache)
        for entry in cache.report()["layers"]:
            assert sum(entry["tokens_kept"][0]) == 20 and heads in (None, entry["tokens_kept"][0])


def test_what_cant_be(model, fitted, tmp_path):
    for spec, error, words in (
        ("kvzap:0.5,threshold=-4", UsageError, "as a threshold or as a sparsity"),
        ("kvzap:decoding=true", OptionError, "decoding needs a threshold"),
        ("adakv(kvzap:threshold=-4)", OptionError, "a fraction of the prompt"),
        ("decoding(kvzap)", OptionError, "equally many tokens"),
        (f"key_rerotation({spec_of(fitted, more=',decoding=true')})", OptionError, "equally many tokens"),
        (f"{spec_of(fitted, more=',decoding=true')}+mustafar:0.5", UsageError, "mustafar removes elements"),
    ):
        with pytest.raises(error, match=words):
            parse_cache_spec(spec)
    for spec, of, error, words in (
        ("kvzap:threshold=-4", model, UsageError, "fit one with 'secateur cache fit MODEL"),
        (f"kvzap:threshold=-4,surrogate={tmp_path}", model, CorruptFileError, "holds no surrogate"),
        (spec_of(fitted), make_tiny("llama", num_hidden_layers=2), PlanMismatchError, "and the model has 2, 32 and 2"),
    ):
        with pytest.raises(error, match=words) as caught, torch.no_grad():
            of(tiny_ids(windows=1, length=200), cache=sc.compressed_cache(spec, of))
        assert "\n" not in str(caught.value)
    (tmp_path / "model.safetensors").write_bytes((fitted.folder / "model.safetensors").read_bytes())
    for config in ("[]", '{"n_modules": 3}', '{"n_modules": 4, "input_dim": 32, "output_dim": 2}', "no json"):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(CorruptFileError):
            read_surrogate(str(tmp_path))
