"""ONNX in onnxruntime."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

import secateur as sc
from hand_cut import ragged, tiny
from secateur.errors import MissingExtraError, OutputError
from secateur.runtimes import onnx as writer

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """A cut model as ONNX; exporting takes seconds."""
    path = tmp_path_factory.mktemp("onnx")
    return Path(sc.convert(sc.save(ragged("llama"), tiny_tokenizer, path / "model"), path / "out", to="onnx"))


def test_onnxruntime_agrees(folder: Path) -> None:
    model, out = ragged("llama"), folder
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in ((1, 5), (4, 33)):
        ids = torch.randint(96, shape, generator=torch.Generator().manual_seed(1))
        (made,) = session.run(["logits"], {"input_ids": ids.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(made), model(ids).logits, atol=1e-4, rtol=1e-4)
    assert (out / "tokenizer.json").is_file()


def test_what_disagrees_is_not_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Program:
        """What an exporter with a fault might give: the graph of another model."""

        def save(self, path: str, external_data: bool) -> None:
            shutil.copyfile(folder / "model.onnx", path)

    monkeypatch.setattr(writer, "_exported", lambda module: Program())
    saved = sc.save(tiny("llama", seed=1), None, tmp_path / "model")
    with pytest.raises(OutputError, match="onnxruntime gives other logits than torch for"):
        sc.convert(saved, tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()


def test_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = sc.save(ragged("llama"), None, tmp_path / "model")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"writing ONNX needs onnxruntime.*pip install 'secateur\[onnx\]'"):
        sc.convert(saved, tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()
