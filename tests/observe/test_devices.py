"""Blocks on several devices: who lies where, and that nothing of one device meets anything of another.

No second device is needed: torch's fake tensors have a device by name (of a kind that every build knows) and no data,
and refuse to mix like real ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode

import secateur as sc
from secateur.errors import UsageError
from secateur.methods import make_method
from secateur.models.opening import open_source
from secateur.models.sources import Source
from secateur.observe import Gram, Moments, SequenceMoments, Similarity, SumSquares
from secateur.observe import driver as driver_module
from secateur.observe.driver import BlockWalk
from secateur.recipes import make_recipe

LAYERS, HIDDEN = 5, 8
STATISTICS = {"gram": Gram, "moments": Moments, "sequences": SequenceMoments, "squares": SumSquares}


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (["cpu:0"], [0, 0, 0, 0, 0]),
        (["cpu:0", "cpu:1"], [0, 0, 0, 1, 1]),
        (["cpu:0", "cpu:1", "cpu:2"], [0, 0, 1, 1, 2]),
        ([f"cpu:{i}" for i in range(10)], [0, 2, 4, 6, 8]),
    ],
)
def test_neighbouring_blocks_share_a_device(devices, expected, make_llama):
    source = Source(make_llama(num_hidden_layers=LAYERS), [torch.device(name) for name in devices])
    assert [source.device_of(layer).index for layer in range(LAYERS)] == expected
    assert source.device == torch.device(devices[0])


def test_blocks_are_opened_where_they_belong(tiny_checkpoint, tiny_llama):
    # a device without data can hold a block, though not run it
    devices = [torch.device("cpu"), torch.device("meta")]
    stream, _ = open_source(tiny_checkpoint, device=["cpu", "meta"])
    for source in (Source(tiny_llama, devices), stream):
        for layer, device in enumerate(devices):
            tensors = source.open(layer, torch.bfloat16).state_dict().values()
            assert {(t.device, t.dtype) for t in tensors} == {(device, torch.bfloat16)}
        assert {p.device for p in source.model.parameters()} <= {torch.device("cpu"), torch.device("meta")}
    stream.close()


class Block(nn.Module):
    """One linear layer and what a decoder hands to its blocks, all on one device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN, bias=False, device="meta")
        self.linear.weight = nn.Parameter(torch.empty(HIDDEN, HIDDEN, device=device), requires_grad=False)

    def forward(self, hidden_states: Tensor, mask: Tensor, *, places: tuple[Tensor, Tensor]) -> tuple[Tensor]:
        return (self.linear(hidden_states + mask) * places[0] + places[1],)


class Shell(nn.Module):
    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        super().__init__()
        self.blocks, self.rows = blocks, torch.empty(16, HIDDEN, device=device)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        x = nn.functional.embedding(input_ids, self.rows)
        places = (torch.empty_like(x), torch.empty_like(x))
        mask = torch.empty_like(x[:1])
        for block in self.blocks:
            x = block(x, mask, places=places)[0]
        return x


class Decoder:
    """What a walk needs, on devices that this machine need not have."""

    def __init__(self, devices: list[str]) -> None:
        self.devices = [torch.device(name) for name in devices]
        self.blocks = nn.ModuleList(Block(self.device) for _ in range(LAYERS))

    @property
    def device(self) -> torch.device:
        return self.devices[0]

    def device_of(self, layer: int) -> torch.device:
        return self.devices[layer * len(self.devices) // LAYERS]

    def open(self, layer: int, dtype: torch.dtype) -> nn.Module:
        return Block(self.device_of(layer))

    def shell(self, dtype: torch.dtype) -> nn.Module:
        return Shell(self.blocks, self.device)


class _Finite:
    """The answer of ``torch.isfinite`` for tensors without data."""

    def __init__(self, values: Tensor) -> None:
        pass

    def all(self) -> bool:
        return True


@pytest.fixture
def walk(monkeypatch) -> Any:
    monkeypatch.setattr(driver_module.torch, "isfinite", _Finite)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: id(self))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield BlockWalk(Decoder(["lazy:0", "lazy:1"]), torch.zeros(3, 4, dtype=torch.int64), dtype=torch.float32)


def test_the_fakes_refuse_to_mix_devices(walk):
    block = Block(torch.device("lazy:1"))
    with pytest.raises(Exception, match="same device"):
        block.linear(walk.hidden[0])


def test_hidden_states_arguments_and_statistics_follow_the_blocks(walk):
    for layer in range(LAYERS):
        device = torch.device("lazy", 0 if layer < 3 else 1)
        seen = walk.observe(walk.open(layer), layer, ["linear"], STATISTICS, advance=True)["linear"]
        assert walk.hidden[0].device == device
        found = {
            n: {t.device for t in s.state().values() if t.dim() and t.is_floating_point()} for n, s in seen.items()
        }
        assert found == {name: {device} for name in STATISTICS}
        merged = SumSquares()
        merged.merge(seen["squares"])
        assert merged.mean_per_sequence().device == device


def test_blocks_that_are_cut_or_left_out_follow_too(walk, monkeypatch):
    # the similarity of input and output is a number, which fakes don't have
    monkeypatch.setattr(Similarity, "update_pair", lambda self, before, after: self.pairs.append((before, after)))
    monkeypatch.setattr(Similarity, "pairs", [], raising=False)
    for layer in range(LAYERS):
        if layer % 2:
            walk.advance(walk.open(layer), layer)
        else:
            walk.observe_block(walk.open(layer), layer, {"similarity": Similarity})
    devices = [{before.device, after.device} for before, after in Similarity.pairs]  # type: ignore[attr-defined]
    assert devices == [{torch.device("lazy:0")}, {torch.device("lazy:0")}, {torch.device("lazy:1")}]


@pytest.mark.parametrize("method", ["wanda", "flap", "sparsegpt", "shortgpt"])
def test_several_devices_give_the_bytes_of_one(method, cli, tiny_checkpoint, tmp_path):
    options = ["--method", method, "--sparsity", 0.5, "--samples", 4, "--length", 64, "--no-report", "--no-measure"]
    for out, devices in (("one", []), ("two", ["--devices", "cpu:0,cpu:1"])):
        run = cli("prune", tiny_checkpoint, *options, *devices, "--dtype", "float32", "--out", tmp_path / out)
        assert run.code == 0, run.err
    for file in ("model.safetensors", "plan/plan.safetensors", "plan/plan.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_targets_lie_where_their_block_does(monkeypatch, tiny_llama):
    from secateur.engine import decide

    seen = {}
    method = make_method("magnitude", {"sparsity": 0.5})
    monkeypatch.setattr(
        type(method), "score", lambda self, target, _: seen.setdefault(target.name, target.weight).cpu().abs()
    )
    source = Source(tiny_llama, [torch.device("cpu"), torch.device("meta")])
    # a score on the meta device has no order, so the run ends there; what it was asked about is known by then
    with pytest.raises(NotImplementedError, match="meta"):
        decide(method, source, None, dtype=torch.float32, batch_tokens=64, progress=lambda *_: None)
    assert {name: w.device.type for name, w in seen.items() if "self_attn.q_proj" in name} == {
        "model.layers.0.self_attn.q_proj": "cpu",
        "model.layers.1.self_attn.q_proj": "meta",
    }


def test_devices_of_a_recipe(cli, tiny_checkpoint, tmp_path):
    steps = [{"method": "wanda"}]
    assert make_recipe({"steps": steps, "devices": ["cuda:1", "cuda:0"]}, "it").device == "cuda:1"
    with pytest.raises(UsageError, match="it: give device or devices, not both"):
        make_recipe({"steps": steps, "device": "cuda:0", "devices": ["cuda:1"]}, "it")
    arguments = ["prune", tiny_checkpoint, "--method", "wanda", "--out", tmp_path / "out"]
    for devices, message in {
        "cpu,nowhere": "unknown device 'nowhere': give cpu, cuda, cuda:0 or mps",
        "cpu,": "unknown device ''",
        "meta": "tensors on the device meta have no values",
        "cpu,xla:0": "this machine has no device 'xla:0' that torch can use",
    }.items():
        run = cli(*arguments, "--devices", devices)
        assert run.code == 2 and message in run.err and "Traceback" not in run.err, run.err
    with pytest.raises(UsageError, match="this machine has no device 'xla'"):
        sc.load(tiny_checkpoint, device="xla")
    assert list(tmp_path.iterdir()) == []
