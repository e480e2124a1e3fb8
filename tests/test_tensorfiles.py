"""Safetensors files piece by piece: what is written equals the library's bytes, what is read is checked."""

import json
import struct
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.errors import CorruptFileError
from secateur.tensorfiles import DTYPES, Made, read_header, write_tensors


def tensors():
    torch.manual_seed(0)
    found = {f"x.{name}": torch.randint(0, 2, (3, 5)).to(dtype) for name, dtype in DTYPES.items() if name != "F8_E8M0"}
    return {**found, "empty": torch.empty(0, 4), "scalar": torch.tensor(1.5), "ü": torch.arange(7)}


def _bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_the_bytes_are_those_of_the_library(tmp_path):
    save_file(tensors(), str(tmp_path / "a"), metadata={"format": "pt"})
    size = write_tensors(tmp_path / "b", tensors())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert size == (tmp_path / "b").stat().st_size


def test_tensors_come_back_whole_and_in_parts(tmp_path):
    write_tensors(tmp_path / "a", tensors())
    found = read_header(tmp_path / "a")
    for name, tensor in tensors().items():
        read = found[name].read()
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(_bytes(read), _bytes(tensor))
    assert found["ü"].read_flat(2, 3).tolist() == [2, 3, 4]
    assert torch.equal(found["x.F32"].rows(1, 2), tensors()["x.F32"][1:])


def test_a_file_is_put_together_from_others(tmp_path):
    write_tensors(tmp_path / "a", {"x": torch.arange(5_000_000), "y": torch.ones(3)})
    stored = read_header(tmp_path / "a")
    write_tensors(tmp_path / "b", {"z": stored["x"], "w": Made(torch.float32, (2,), lambda: torch.zeros(2))})
    loaded = load_file(str(tmp_path / "b"))
    assert torch.equal(loaded["z"], torch.arange(5_000_000))
    assert torch.equal(loaded["w"], torch.zeros(2))


def test_a_tensor_other_than_promised_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="promised"):
        write_tensors(tmp_path / "b", {"w": Made(torch.float32, (2,), lambda: torch.zeros(3))})


def _file(path, header, data=b"\0" * 8):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def _x(**changes):
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "no mapping"),
        (b'{"x": 1, "x": 2}', "twice"),
        ({"x": 3}, "no mapping"),
        (_x(dtype="F3"), "unknown dtype"),
        (_x(dtype=["F32"]), "unknown dtype"),
        (_x(shape=[-2]), "no valid shape"),
        (_x(shape=[True]), "no valid shape"),
        (_x(shape=[1 << 70]), "no valid shape"),
        (_x(shape=[3]), "takes 12 bytes"),
        (_x(data_offsets=[0]), "no valid shape"),
        (_x(data_offsets=[4, 12]), "does not begin"),
        (_x(shape=[4], data_offsets=[0, 16]), "tensors end at"),
        (_x(shape=[1], data_offsets=[0, 4]), "tensors end at"),
        ({**_x(), "y": _x()["x"]}, "does not begin"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, reason):
    with pytest.raises(CorruptFileError, match=reason):
        read_header(_file(tmp_path / "x", header))


def test_oversized_and_short_files_are_refused(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CorruptFileError, match="more than the format allows"):
        read_header(path)
    path.write_bytes(struct.pack("<Q", 1000) + b"{}")
    with pytest.raises(CorruptFileError, match="claims 1000 bytes"):
        read_header(path)
    path.write_bytes(b"abc")
    with pytest.raises(CorruptFileError, match="3 bytes"):
        read_header(path)
    with pytest.raises(CorruptFileError, match="can't read"):
        read_header(tmp_path / "none")


def test_at_most_two_large_tensors_are_made_before_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.ahead.AHEAD_BYTES", 1)
    alive, most = 0, 0

    def make() -> torch.Tensor:
        nonlocal alive, most
        tensor = torch.zeros(1 << 20)
        alive += 1
        most = max(most, alive)
        weakref.finalize(tensor, gone)
        return tensor

    def gone() -> None:
        nonlocal alive
        alive -= 1

    made = {f"{number:02}": Made(torch.float32, (1 << 20,), make) for number in range(20)}
    write_tensors(tmp_path / "file.safetensors", made)
    assert len(load_file(tmp_path / "file.safetensors")) == 20
    assert most <= 3 and alive == 0  # the last may still be on its way out
