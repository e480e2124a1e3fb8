"""What leads out of a folder, runs code or takes memory is refused before a weight is read."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch

import secateur as sc
from hand_cut import ragged, tiny
from secateur.errors import ModelLoadError
from secateur.models.loading import load_model
from secateur.models.saving import save_model
from secateur.tensorfiles import Stored

TOKENS = torch.tensor([[3, 1, 4, 15, 9]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded checkpoint to break."""
    return save_model(tiny("llama"), None, tmp_path / "room" / "tiny", max_shard_size="20KB")


def refusal(folder: Path, **options: bool) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load_model(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


# -- index and links --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["../{}", "{root}/{}", "..\\{}", "C:{}", "sub/{}", "", "."])
def test_an_index_names_files_of_its_folder_only(folder: Path, place: str) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shutil.copyfile(shard, folder.parent / shard.name)
    name = place.format(shard.name, root=folder.parent)
    edit(folder / "model.safetensors.index.json", lambda d: d["weight_map"].update({"lm_head.weight": name}))
    message = refusal(folder)
    assert "index.json names '" in message and message.endswith(", which is not a file in its folder")


def test_an_index_and_its_files_agree(folder: Path) -> None:
    first, second = sorted(path.name for path in folder.glob("*.safetensors"))[:2]
    index = folder / "model.safetensors.index.json"
    other = {"weight_map": {}}
    edit(index, other.update)
    weight_map = other["weight_map"]
    name = next(name for name, file in weight_map.items() if file == first)
    edit(index, lambda d: d["weight_map"].update({name: second}))
    assert f"{second} lacks '{name}', though the index" in refusal(folder)
    edit(index, lambda d: d["weight_map"].update({name: first}))
    shutil.copyfile(folder / first, folder / second)
    assert f"is in {first} and again in {second}" in refusal(folder)


def test_two_sets_of_weights_are_ambiguous(folder: Path) -> None:
    save_model(tiny("llama", seed=1), None, folder.parent / "single")
    shutil.copyfile(folder.parent / "single" / "model.safetensors", folder / "model.safetensors")
    assert "remove one of the two" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model-00001-of-00008.safetensors"])
def test_links_out_of_the_folder(folder: Path, name: str) -> None:
    name = name if (folder / name).exists() else sorted(folder.glob("*.safetensors"))[0].name
    (folder / name).rename(folder.parent / "outside")
    (folder / name).symlink_to("../outside")
    assert f"{name} is a link that leads out of the folder" in refusal(folder)


def test_links_inside_the_folder_and_to_it_are_fine(folder: Path) -> None:
    name = sorted(folder.glob("*.safetensors"))[0].name
    (folder / name).rename(folder / "blob")
    (folder / name).symlink_to("blob")
    (folder.parent / "link").symlink_to(folder)
    assert load_model(folder.parent / "link")[0] is not None


def test_the_cache_of_the_hub_is_fine(folder: Path) -> None:
    cache = folder.parent / "models--a--b"
    snapshot = cache / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    (cache / "blobs").mkdir()
    folder.rename(snapshot)
    for path in list(snapshot.iterdir()):
        path.rename(cache / "blobs" / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    assert load_model(snapshot)[0] is not None
    (snapshot / "config.json").unlink()
    shutil.copyfile(cache / "blobs" / "config.json", folder.parent / "config.json")
    (snapshot / "config.json").symlink_to("../../../config.json")
    assert "config.json is a link that leads out" in refusal(snapshot)


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any read of weights, ours or that of transformers, is an error of its own kind."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Stored, "read_flat", fail)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", fail)
    monkeypatch.setattr("torch.load", fail)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"intermediate_size": 44}, "has shape [48, 40], but config.json asks for [48, 44]"),
        ({"vocab_size": 10**12}, f"but config.json asks for [{10**12}, 48]"),
        ({"num_hidden_layers": 10**9}, "config.json asks for 1,000,000,000 layers, its files hold 30 tensors"),
        ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight and 8 more are missing from the weights"),
        ({"attention_bias": True}, "self_attn.k_proj.bias and 11 more are missing"),
        ({"transformers_weights": "other.safetensors"}, "has the entry 'transformers_weights'"),
        ({"_attn_implementation": "someone/kernel"}, "asks for code from the hub"),
        ({"attn_implementation": "someone/kernel"}, "asks for code from the hub"),
    ],
)
def test_a_config_that_lies(folder: Path, changes: dict, sentence: str, nothing_is_read: None) -> None:
    edit(folder / "config.json", lambda d: d.update(changes))
    assert sentence in refusal(folder)


def test_weights_of_another_kind(folder: Path, nothing_is_read: None) -> None:
    path = next(p for p in folder.glob("*.safetensors") if b'"model.norm.weight"' in p.read_bytes())
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"model.norm.weight":{"dtype":"F32"', b'"model.norm.weight":{"dtype":"I32"'))
    assert "model.norm.weight is stored as int32, but secateur prunes float weights only" in refusal(folder)


def test_an_oversized_header(folder: Path, nothing_is_read: None) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])
    assert "more than the format allows" in refusal(folder)


def test_json_bombs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (folder / "config.json").read_text()
    (folder / "config.json").write_text("[" * 200_000)
    assert refusal(folder) == f"{folder}/config.json is nested too deeply"
    (folder / "config.json").write_text(whole)
    monkeypatch.setattr("secateur.reading.read_json.__defaults__", (1000,))
    assert "model.safetensors.index.json has more than 1 kB" in refusal(folder)


def test_a_pipe_is_no_file(folder: Path) -> None:
    import os

    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert "there is no config.json" in refusal(folder)


def test_packed_shapes_are_checked(tmp_path: Path, nothing_is_read: None) -> None:
    model = tiny("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[:, 1:] = 0
    folder = save_model(model, None, tmp_path / "out", format="packed")
    whole = (folder / "config.json").read_text()
    for shape, sentence in {
        (40, 480): f"the bitmap of {name} must hold 2400 bytes, got [240]",
        (39, 48): f"the bitmap of {name} must hold 234 bytes",
        (48, 40): f"{name} has shape [48, 40], but config.json asks for [40, 48]",
        (-40, -48): f"no valid shape for the packed tensor {name}",
    }.items():
        (folder / "config.json").write_text(whole)
        edit(
            folder / "config.json",
            lambda d, shape=shape: d["secateur"]["packed"]["tensors"].update({name: list(shape)}),
        )
        assert sentence in refusal(folder)
    (folder / "config.json").write_text(whole)
    edit(folder / "config.json", lambda d: d["secateur"].update(base="PreTrainedTokenizerFast"))
    assert "names no causal language model to cut: 'PreTrainedTokenizerFast'" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("adapter_config.json", "holds an adapter"), (".metadata", "is a distributed checkpoint with a pickled index")],
)
def test_folders_that_lead_elsewhere(folder: Path, name: str, sentence: str) -> None:
    (folder / name).write_text("{}")
    assert sentence in refusal(folder)


# -- pickles ----------------------------------------------------------------------------------------------------------


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "boom"))


def pickled(model, folder: Path, *, shards: int = 1, legacy: bool = False) -> Path:
    save_model(model, None, folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "manifest.json").unlink()
    state = model.state_dict()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        return folder
    weight_map = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(state)}
    for file in set(weight_map.values()):
        torch.save({n: t for n, t in state.items() if weight_map[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_pickles_stay_closed(tmp_path: Path, nothing_is_read: None) -> None:
    folder = pickled(tiny("llama"), tmp_path / "out")
    message = refusal(folder)
    assert "only pickled ones" in message and "--allow-pickle (allow_pickle=True)" in message


@pytest.mark.parametrize("options", [{}, {"shards": 3}, {"legacy": True}])
@pytest.mark.parametrize(
    "make", [lambda: tiny("llama"), lambda: tiny("gpt2"), lambda: tiny("llama", tie_word_embeddings=True)]
)
def test_pickles_on_request(tmp_path: Path, make, options: dict) -> None:
    model = make()
    folder = pickled(model, tmp_path / "out", **options)
    loaded, _ = sc.load(folder, allow_pickle=True)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    again, _ = sc.load(sc.save(loaded, None, tmp_path / "again"))
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_a_cut_model_in_a_pickle(tmp_path: Path) -> None:
    folder = pickled(ragged("llama"), tmp_path / "out")
    assert "holds pickled weights, which secateur never wrote" in refusal(folder, allow_pickle=True)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, legacy: bool) -> None:
    folder = pickled(tiny("llama"), tmp_path / "out")
    state = {**tiny("llama").state_dict(), "bomb": Bomb(tmp_path / "boom")}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert "holds more than tensors, which may be code" in refusal(folder, allow_pickle=True)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    assert "can't be read as plain weights" in refusal(folder, allow_pickle=True)
    assert not (tmp_path / "boom").exists()


def test_pickles_are_checked_like_other_weights(tmp_path: Path) -> None:
    folder = pickled(tiny("llama"), tmp_path / "out", shards=2)
    index = folder / "pytorch_model.bin.index.json"
    whole = index.read_text()
    edit(index, lambda d: d["weight_map"].update({"lm_head.weight": "../pytorch_model-0.bin"}))
    assert "not a file in its folder" in refusal(folder, allow_pickle=True)
    index.write_text(whole)
    (folder / "pytorch_model-1.bin").rename(folder / "away")
    assert "pytorch_model-1.bin is missing" in refusal(folder, allow_pickle=True)
    index.unlink()
    torch.save({"model.norm.weight": torch.ones(3)}, folder / "pytorch_model.bin")
    assert "config.json asks for 3 layers, its files hold 1" in refusal(folder, allow_pickle=True)
    state = {**tiny("llama").state_dict(), "model.norm.weight": torch.ones(3)}
    torch.save(state, folder / "pytorch_model.bin")
    assert "model.norm.weight has shape [3], but config.json asks for [48]" in refusal(folder, allow_pickle=True)
    torch.save([torch.ones(3)], folder / "pytorch_model.bin")
    assert "holds no state dict" in refusal(folder, allow_pickle=True)


def test_safetensors_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tiny("llama"), None, tmp_path / "out")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert sc.load(folder, allow_pickle=True)[0] is not None
