"""The manifest names every file, its size and its hash, and nothing else."""

import hashlib
import json

import pytest

from hand_cut import tiny
from secateur.errors import SecateurError
from secateur.manifest import read_manifest, write_manifest
from secateur.models.saving import save_model


def test_it_lists_what_is_there(tmp_path):
    (tmp_path / "b").write_bytes(b"x" * 3_000_000)
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "sub" / "deep" / "ü").write_bytes(b"")
    (tmp_path / "a").write_text("a")
    write_manifest(tmp_path)
    document = json.loads((tmp_path / "manifest.json").read_text(encoding="utf8"))
    assert list(document["files"]) == ["a", "b", "sub/deep/ü"]
    assert document["files"]["b"] == {
        "bytes": 3_000_000,
        "sha256": hashlib.sha256(b"x" * 3_000_000).hexdigest(),
    }
    first = (tmp_path / "manifest.json").read_bytes()
    write_manifest(tmp_path)
    # it leaves itself out, so writing it again changes nothing
    assert (tmp_path / "manifest.json").read_bytes() == first
    assert read_manifest(tmp_path) == {n: (f["bytes"], f["sha256"]) for n, f in document["files"].items()}


def test_every_saved_folder_has_one(tmp_path, tiny_tokenizer):
    folder = save_model(tiny("llama"), tiny_tokenizer, tmp_path / "out", max_shard_size="20KB")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(read_manifest(folder) or {}) == there - {"manifest.json"}


def test_no_manifest(tmp_path):
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    ("files", "version"),
    [
        ({"../x": {"bytes": 1, "sha256": "0" * 64}}, 1),
        ({"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}, 1),
        ({"a//b": {"bytes": 1, "sha256": "0" * 64}}, 1),
        ({"C:\\x": {"bytes": 1, "sha256": "0" * 64}}, 1),
        ({"x": {"bytes": True, "sha256": "0" * 64}}, 1),
        ({"x": {"bytes": 1, "sha256": "0"}}, 1),
        ({"x": 1}, 1),
        ([], 1),
        ({}, 2),
    ],
)
def test_a_malformed_manifest_is_refused(files, version, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"version": version, "files": files}))
    with pytest.raises(SecateurError, match="manifest"):
        read_manifest(tmp_path)
