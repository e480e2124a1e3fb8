"""On GPUs that this machine need not have: nothing of it meets anything of the processor, and plans are the same."""

from __future__ import annotations

import pytest
import torch

import secateur as sc
from cache_prompts import Words
from channel_networks import Residual
from elsewhere import GPU, gpu, lies_on
from families import make_tiny, tiny_ids
from runs import QUICK, plan_for
from secateur.cli import main
from secateur.methods import ChannelMethod, TrainingMethod, get_method, list_methods
from sparse_training import batch, network, sgd, sparsifier

EVERY = list_methods()
DECODERS = [m for m in EVERY if not get_method(m).instead]
CHANNELS = [m for m in EVERY if issubclass(get_method(m), ChannelMethod)]
TRAINED = [m for m in EVERY if issubclass(get_method(m), TrainingMethod)]
CACHES = (
    "snapkv:0.5,window=4,kernel=3",
    "adakv(knorm:0.5)+mustafar:0.5,window=4,block=4",
    "think:0.5,recent=4",
    "h2o:0.5",
)


def test_what_lies_elsewhere_does_not_mix():
    with gpu():
        there, here = torch.zeros(3, device="cuda"), torch.ones(3)
        assert (there + 1).device == there[1:].device == torch.zeros_like(there).device == here.to(there).device == GPU
        assert there.cpu().device == here.device == torch.device("cpu") and there.is_cuda and not here.is_cuda
        assert (there + torch.tensor(1.0)).device == there[torch.tensor([0])].device == GPU
        other = there.to("cuda:1")
        assert other.device == (other * 2).device == torch.zeros(1, device="cuda:1").device == torch.device("cuda:1")
        for mixed in (
            lambda: there + here,
            lambda: there + other,
            lambda: torch.cat([there, here]),
            lambda: here[there.long()],
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        layer = torch.nn.Linear(3, 2).to("cuda")
        layer(there).sum().backward()
        assert layer.weight.device == layer.weight.grad.device == GPU
    assert there.device == torch.device("cpu")


@pytest.mark.parametrize("method", DECODERS)
def test_decoders(method):
    # what a vocabulary loses is no id of the others
    ids = tiny_ids().clamp(max=20) if method == "vocab" else tiny_ids()
    expected = plan_for(method, make_tiny("llama"), ids)
    with gpu():
        model = make_tiny("llama").to("cuda")
        plan = plan_for(method, model, ids)
        cut = sc.apply(plan, model)
        assert all(lies_on(parameter) == GPU for parameter in cut.parameters())
        if method != "vocab":
            assert cut(ids.to("cuda")).logits.device == GPU
    assert plan.keep.keys() == expected.keep.keys() and plan.masks.keys() == expected.masks.keys()
    assert all(torch.equal(plan.keep[name], kept) for name, kept in expected.keep.items())
    assert all(torch.equal(plan.masks[name], mask) for name, mask in expected.masks.items())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("flap", ["--set", "heal=refit"]),
        ("wanda", ["--allocate", "owl"]),
        ("magnitude", ["--heal", "lora:steps=2,batch=1,length=32"]),
        ("slicegpt", []),
        ("osscar", ["--target", "stream"]),
        ("loraprune", [f"--set={key}={value}" for key, value in QUICK["loraprune"].items()]),
        ("wanda_sp", ["--devices", "cuda:0,cuda:1"]),
        ("sparsegpt", ["--devices", "cuda:0,cuda:1"]),
    ],
)
def test_checkpoints(method, options, tiny_checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, again and again\n" * 60, encoding="utf8")
    read = ["--calibration", str(text), "--samples", "4", "--length", "32"]
    measured = ["--evaluate", f"perplexity:{text}", "--windows", "2"]
    where = [] if "--devices" in options else ["--device", "cuda"]
    command = ["prune", str(tiny_checkpoint), "--method", method, *where, "--no-estimate", *read, *measured]
    with gpu(), pytest.raises(SystemExit) as stop:
        main([*command, *options, "--out", str(tmp_path / "out"), "--quiet"])
    assert not stop.value.code and (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("method", CHANNELS)
def test_modules(method):
    def planned(device: str) -> tuple[torch.nn.Module, torch.Tensor, sc.Plan]:
        module = Residual().eval().to(device)
        x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1)).to(device)
        data = [(x, torch.arange(4, device=device)), (x + 1, torch.arange(4, device=device))]
        given = {"data": data} if get_method(method).needs else {}
        return module, x, sc.plan(module, example_inputs=(x,), method=method, sparsity=0.3, **given)

    _, _, expected = planned("cpu")
    with gpu():
        module, x, plan = planned("cuda")
        assert sc.apply(plan, module)(x).device == GPU
    assert plan.keep and all(torch.equal(plan.keep[name], kept) for name, kept in expected.keep.items())


@pytest.mark.parametrize("method", TRAINED)
def test_sparse_training(method):
    module = network()
    with gpu():
        module.to("cuda")
        optimizer = sgd(module)
        x, y = (tensor.to("cuda") for tensor in batch(0))
        pruned = sparsifier(module, optimizer, method, data=[(x, y)], example_inputs=(x,), sparsity=0.8)
        for _ in range(4):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
            pruned.step()
        pruned.load_state_dict(pruned.state_dict())
        assert pruned.masks and all(lies_on(mask) == GPU for mask in pruned.masks.values())


@pytest.mark.parametrize("spec", CACHES)
def test_caches(spec, monkeypatch):
    # the kernel of a GPU asks for its driver
    monkeypatch.setenv("SECATEUR_KERNELS", "torch")
    model, ids = make_tiny("llama"), tiny_ids(windows=2, length=24)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0

    def written(device: str) -> torch.Tensor:
        cache = sc.compressed_cache(spec, model.to(device), tokenizer=Words())
        given = {"attention_mask": mask.to(device), "max_new_tokens": 6, "do_sample": False}
        found = model.generate(ids.to(device), cache=cache, **given)
        assert lies_on(found).type == device and cache.report()["bytes_held"] > 0
        return found.cpu()

    expected = written("cpu")
    with gpu():
        assert torch.equal(written("cuda"), expected)


def test_a_device_without_float64_measures_and_trains_and_does_not_prune(tiny_checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, again and again\n" * 60, encoding="utf8")
    here = ["--device", "cuda", "--length", "32"]
    heal = ["heal", str(tiny_checkpoint), "--data", str(text), "--steps", "2", "--loss", "ce"]
    for code, said, command in (
        (2, "decided in sums of float64, which cuda doesn't have", ["prune", str(tiny_checkpoint), "--method", "flap"]),
        (0, "", ["evaluate", str(tiny_checkpoint), "--task", f"perplexity:{text}", "--windows", "2"]),
        (0, "", heal),
    ):
        more = ["--out", str(tmp_path / command[0])] if command[0] != "evaluate" else []
        with gpu(without=[torch.float64]), pytest.raises(SystemExit) as stop:
            main([*command, *here, *more])
        assert int(stop.value.code or 0) == code and said in capsys.readouterr().err
    assert not (tmp_path / "prune").exists()
