"""How often every tensor is read: what is larger than memory comes from the disk each time."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

import secateur as sc
from secateur import manifest
from secateur.cli.measuring import Measurement
from secateur.recipes import make_recipe
from secateur.runs.applying import apply_plans
from secateur.runs.run import Options, run_recipe
from secateur.tensorfiles import Stored, read_header

# a method that decides on the whole model cuts its blocks when all have been scored; the last one is still there then
BLOCKS_READ = {"wanda": ({}, 1), "sparsegpt": ({}, 1), "magnitude": ({"scope": "global"}, 2), "random_sp": ({}, 2)}

Reads = Counter[tuple[Path, str]]


@pytest.fixture(scope="module")
def dense(tmp_path_factory, make_llama, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    # so wide that the samples for two fingerprints are a small part of every matrix
    make_llama(num_hidden_layers=3, hidden_size=128, intermediate_size=256).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def reads(monkeypatch) -> Reads:
    """How often every tensor was read, by file and name, parts of it as fractions; and files that were hashed."""
    counted: Reads = Counter()
    read_flat, sha256 = Stored.read_flat, manifest.sha256

    def reading(self: Stored, first: int, count: int):
        counted[self.file, self.name] += Fraction(count, max(self.numel, 1))
        return read_flat(self, first, count)

    def hashing(path: Path) -> str:
        counted[path, "hash"] += 1
        return sha256(path)

    monkeypatch.setattr(Stored, "read_flat", reading)
    monkeypatch.setattr(manifest, "sha256", hashing)
    return counted


def of_dense(dense: Path, reads: Reads) -> dict[str, int]:
    """How often each matrix of the dense model was read as a whole."""
    file = dense / "model.safetensors"
    return {name: int(reads[file, name]) for name, s in read_header(file).items() if len(s.shape) == 2}


def of_room(name: str, reads: Reads) -> dict[str, Fraction]:
    """How often the tensors of files in a folder of this name were read."""
    return {what: n for (file, what), n in reads.items() if file.parent.name == name and file.suffix == ".safetensors"}


@pytest.mark.parametrize("method", BLOCKS_READ)
@pytest.mark.parametrize("format", ["dense", "packed"])
def test_a_run_reads_what_it_must(method, format, dense, tmp_path, reads):
    options, times = BLOCKS_READ[method]
    data = {
        "model": str(dense),
        "out": str(tmp_path / "out"),
        "format": format,
        "calibration": {"samples": 2, "length": 32},
        "steps": [{"method": method, "sparsity": 0.5, "options": options}],
    }
    job = make_recipe(data, "test")
    report = run_recipe(job, Options(measure=Measurement(job, None, measure=False)))
    # outside the blocks: once to look for NaN, while there is little to lose, and once to copy
    found = of_dense(dense, reads)
    wanted = {name: 1 if ".layers.2." in name else times if ".layers." in name else 2 for name in found}
    assert found == wanted
    # each cut block is read to be copied; the checkpoint is hashed and counted while it is written
    assert set(of_room("weights", reads).values()) == {1}
    assert of_room("out", reads) == {}
    counts = next(metric for metric in report.metrics if metric.name == "non-zero parameters").values
    for name, folder in (("dense", dense), ("pruned", tmp_path / "out")):
        model, _ = sc.load(folder, dtype="auto")
        assert counts[name] == sum(int(p.count_nonzero()) for p in model.parameters())
    assert [finding for finding in sc.verify(tmp_path / "out", dense) if not finding.ok] == []


def test_applying_a_plan_reads_what_it_must(dense, tmp_path, reads):
    model, _ = sc.load(dense)
    plan = sc.plan(model, method="magnitude", sparsity=0.5)
    apply_plans([plan], dense, tmp_path / "out")
    found = of_dense(dense, reads)
    assert found == {name: 1 if ".layers." in name else 2 for name in found}
    assert set(of_room("weights", reads).values()) == {1}
    assert of_room("out", reads) == {}
    assert [finding for finding in sc.verify(tmp_path / "out") if not finding.ok] == []


def test_masks_are_read_to_be_copied_and_for_nothing_else(dense, tmp_path, reads):
    data = {"samples": 2, "length": 32}
    sc.run({"model": str(dense), "out": str(tmp_path / "out"), "calibration": data, "steps": [{"method": "wanda"}]})
    assert set(of_room("plan", reads).values()) == {1}


def test_a_block_on_its_way_is_read_before_it_is_asked_for(dense):
    from secateur.models.opening import open_source

    source, _ = open_source(dense)
    names = [name for layer in range(3) for name in source.block_names(layer)]
    source.expect(names)
    stored = {name: source.stored[name].read() for name in names}
    source.stored = {}
    # all of so small a model has been asked for; what is out of turn isn't there
    assert all(source.tensor(name).equal(stored[name]) for name in names[:1])
    with pytest.raises(KeyError):
        source.tensor(names[5])
    assert all(source.tensor(name).equal(stored[name]) for name in names[1:])
    source.close()
