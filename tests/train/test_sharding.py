"""Models sharded over two gloo ranks: masks hold, one process gives the same, and what is saved comes back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import secateur as sc
import sharding_jobs as jobs
from families import make_tiny, tiny_ids
from ranks import run_ranks
from runs import plan_for
from secateur.errors import MissingExtraError, UsageError
from secateur.plans import Plan
from secateur.train import Sharded, fsdp2_accelerator

# tied embeddings and biases: parameters with two names, and some of one dimension
FAMILY = "llama-tied-bias"


def wanda_plan(model, folder: Path) -> Path:
    plan_for("wanda", model, tiny_ids(), sparsity=0.5).save(folder)
    return folder


def train_alone(family: str, plan: Plan) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same steps in one process, on the global batch, with masks by multiplication."""
    model = jobs.masked(family, plan)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), **jobs.LEARNING)
    losses = []
    for step in range(jobs.STEPS):
        ids = jobs.batch(step)
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.detach().item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, mask in plan.masks.items():
                parameters[name].mul_(mask)
    return {name: p.detach() for name, p in parameters.items()}, losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps on two ranks: ``sharded``, ``plain`` and the losses in one folder."""
    out = tmp_path_factory.mktemp("trained")
    wanda_plan(make_tiny(FAMILY), out / "plan")
    run_ranks(jobs.train, 2, out, out / "plan", FAMILY)
    return out


def test_two_ranks_train_like_one_process(trained: Path) -> None:
    alone, losses = train_alone(FAMILY, Plan.load(trained / "plan"))
    together, _ = sc.load(trained / "plain")
    for name, weight in together.named_parameters():
        torch.testing.assert_close(
            weight.detach(), alone[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    ranks = [json.loads((trained / f"losses-{rank}.json").read_text()) for rank in range(2)]
    assert [sum(pair) / 2 for pair in zip(*ranks, strict=True)] == pytest.approx(losses, rel=1e-5)


def test_a_masked_model_comes_back_on_two_ranks_and_on_one(trained: Path, tmp_path: Path) -> None:
    run_ranks(jobs.reload, 1, trained / "sharded", trained / "plain", tmp_path / "from-one")
    # and what one rank has written is read by two
    run_ranks(jobs.reload, 2, tmp_path / "from-one", trained / "plain", None)


def test_the_folder_holds_safetensors_and_text_only(trained: Path) -> None:
    files = [path for path in (trained / "sharded").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.suffix == ".safetensors" for path in files) == 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_cut_model_with_masks_keeps_its_widths_to_the_bit(family: str, tmp_path: Path) -> None:
    dense = make_tiny(family)
    flap = plan_for("flap", dense, tiny_ids(), sparsity=0.4)
    flap.save(tmp_path / "flap")
    model = sc.apply(flap, dense)
    sizes = {block.mlp.down_proj.in_features for block in model.model.layers} if family == "llama" else set()
    assert family != "llama" or len(sizes) > 1, "the widths must differ for this test to mean anything"
    wanda_plan(model, tmp_path / "wanda")
    run_ranks(jobs.save_cut, 2, tmp_path, [tmp_path / "flap", tmp_path / "wanda"], family)
    put_in, came_out = sc.load(tmp_path / "plain")[0], sc.load(tmp_path / "gathered")[0]
    assert jobs.equal(put_in, came_out) == []
    for path in sorted((tmp_path / "plain").rglob("*")):
        if path.is_file() and path.name not in ("README.md", "manifest.json"):
            assert path.read_bytes() == (tmp_path / "gathered" / path.relative_to(tmp_path / "plain")).read_bytes()
    for world in (2, 1) if family == "llama" else (2,):
        run_ranks(jobs.reload, world, tmp_path / "sharded", tmp_path / "plain", None)


def test_a_rank_may_hold_nothing_of_a_weight(tmp_path: Path) -> None:
    plan = wanda_plan(jobs.sliver(), tmp_path / "plan")
    assert jobs.SLIVER in Plan.load(plan).masks
    run_ranks(jobs.save_sliver, 2, tmp_path, plan)


def test_mistakes_are_one_sentence_on_every_rank(tmp_path: Path) -> None:
    dense = make_tiny("llama")
    wanda_plan(dense, tmp_path / "wanda")
    plan_for("flap", dense, tiny_ids(), sparsity=0.4).save(tmp_path / "flap")
    (tmp_path / "out").mkdir()
    run_ranks(jobs.refuse, 2, tmp_path / "out", tmp_path / "wanda", tmp_path / "flap")


def test_without_a_process_group() -> None:
    with pytest.raises(UsageError, match="there is no process group: start the script with torchrun"):
        fsdp2_accelerator(make_tiny("llama"))
    with pytest.raises(UsageError, match="there is no process group"):
        Sharded(make_tiny("llama"), None, None)  # type: ignore[arg-type]


def test_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r"needs accelerate.*pip install 'secateur\[train\]'"):
        fsdp2_accelerator(make_tiny("llama"))
    with pytest.raises(MissingExtraError, match=r"secateur\[train\]"):
        Sharded(make_tiny("llama"), None, None)  # type: ignore[arg-type]


def test_with_an_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.distributed.checkpoint.HuggingFaceStorageWriter")
    with pytest.raises(MissingExtraError, match=r"needs torch 2\.9 or newer"):
        Sharded(make_tiny("llama"), None, None)  # type: ignore[arg-type]
