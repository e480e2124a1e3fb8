"""What the ranks of the sharding tests do; every function here runs in a process group (see ``ranks.py``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import secateur as sc
from families import make_tiny, tiny_ids
from ranks import on_disk
from secateur.errors import ModelLoadError, OutputError, PlanMismatchError, UsageError
from secateur.plans import Plan
from secateur.train import Sharded, empty_model, fsdp2_accelerator

STEPS = 3
SLIVER = "model.layers.0.mlp.up_proj.weight"
LEARNING = {"lr": 1e-2, "weight_decay": 0.1}


def batch(step: int) -> torch.Tensor:
    """The global batch of a step, [4, 16] int64."""
    return tiny_ids(4, 16, seed=100 + step)


def my_part(ids: torch.Tensor) -> torch.Tensor:
    size = len(ids) // dist.get_world_size()
    return ids[dist.get_rank() * size :][:size]


def wrap(model: Any, plan: Plan | None, **options: Any) -> Sharded:
    optimizer = torch.optim.AdamW(model.parameters(), **LEARNING)
    return Sharded(model, plan, fsdp2_accelerator(model, **options), optimizer=optimizer)


def masked(family: str, plan: Plan) -> Any:
    return sc.apply(plan, make_tiny(family), inplace=True)


def cut(family: str, plan: Plan) -> Any:
    """The model that ``plan`` cuts out of the tiny one of that family."""
    return sc.apply(plan, make_tiny(family))


def equal(first: Any, second: Any) -> list[str]:
    """Names of the tensors that differ between two models, by a single bit or in shape."""
    mine, theirs = first.state_dict(), second.state_dict()
    assert set(mine) == set(theirs)
    return [n for n in mine if mine[n].dtype != theirs[n].dtype or not torch.equal(mine[n], theirs[n])]


def whole(sharded: Sharded) -> dict[str, torch.Tensor]:
    """All weights on every rank, gathered the naive way: a second opinion on ``full_model``."""
    sharded.model.reshard()
    parameters = dict(sharded.model.named_parameters())
    return {n: p.detach().full_tensor() if isinstance(p, DTensor) else p for n, p in parameters.items()}


def train(rank: int, out: Path, plan_folder: Path, family: str) -> None:
    """Three steps with the masks of a plan; the weights after each go to ``out`` for the parent to compare."""
    plan = Plan.load(plan_folder)
    sharded = wrap(masked(family, plan), plan)
    assert sharded.optimizer is not None
    blocks = [type(m).__name__ for m in sharded.model.modules() if type(m).__name__.startswith("FSDP")]
    assert blocks.count("FSDPLlamaDecoderLayer") == 3
    rows = {n: -(-len(m) // 2) if rank == 0 else len(m) // 2 for n, m in plan.masks.items()}
    for name, bits in sharded._masks.items():
        # the masks of this rank's rows, an eighth of a byte per weight, and nothing else
        assert list(bits.to_local().shape) == [rows[name], -(-plan.masks[name].shape[1] // 8)]
    losses = []
    for step in range(STEPS):
        ids = my_part(batch(step))
        loss = sharded.model(input_ids=ids, labels=ids).loss
        losses.append(loss.detach().item())
        loss.backward()
        if step == STEPS - 1:  # masked gradients in every step would keep the weights at zero by themselves
            sharded.mask_gradients()
            for name, mask in plan.masks.items():
                gradient = dict(sharded.model.named_parameters())[name].grad.full_tensor()
                assert not gradient[~mask].any() and gradient[mask].any()
        sharded.optimizer.step()
        sharded.optimizer.zero_grad()
        for name, weight in whole(sharded).items():
            if name in plan.masks:
                assert not weight[~plan.masks[name]].any(), f"step {step}: {name} came back"
                assert weight[plan.masks[name]].any()
    sharded.save(out / "sharded")
    full = sharded.full_model()
    assert (full is None) == (rank != 0)
    gathered = whole(sharded)
    if full is not None:
        assert all(torch.equal(p, gathered[n]) for n, p in full.named_parameters())
        sc.save(full, None, out / "plain", plan=plan)
    (out / f"losses-{rank}.json").write_text(json.dumps(losses))


def reload(rank: int, source: Path, plain: Path, again: Path | None) -> None:
    """Load what other ranks saved, compare with the plain checkpoint, and save it once more from here."""
    sharded = wrap(empty_model(source), None)
    with torch.no_grad():  # FSDP keeps what it gathered here, and load must not leave it in use
        sharded.model(batch(0))
    sharded.load(source)
    with torch.no_grad():
        logits = sharded.model(batch(0)).logits
    full, masks = sharded.full_model(), sharded.full_masks()
    if rank == 0:
        expected, _ = sc.load(plain)
        assert equal(full, expected) == []
        assert full.config.to_dict().get("per_layer_config") == expected.config.to_dict().get("per_layer_config")
        plan = Plan.load(plain / "plan")
        assert masks is not None and set(masks) == set(plan.masks)
        assert all(torch.equal(masks[n], m) for n, m in plan.masks.items())
        with torch.no_grad():
            assert torch.equal(full(batch(0)).logits, expected(batch(0)).logits)
            assert torch.equal(logits, expected(batch(0)).logits)
    if again is not None:
        sharded.save(again)
    # the masks that came with the checkpoint hold in the next step
    ids = my_part(batch(0))
    sharded.model(input_ids=ids, labels=ids).loss.backward()
    assert sharded.optimizer is not None
    sharded.optimizer.step()
    weights, masks = whole(sharded), sharded.full_masks()
    for name, mask in (masks or {}).items():
        assert not weights[name][~mask].any()


def save_cut(rank: int, out: Path, plans: list[Path], family: str) -> None:
    """Shard a model with other widths in every layer, save it, and write the same model as a plain checkpoint."""
    steps = [Plan.load(folder) for folder in plans]
    model = make_tiny(family)
    for plan in steps:
        model = sc.apply(plan, model)
    if rank == 0:
        sc.save(model, None, out / "plain", plan=steps[-1])
    sharded = wrap(model, steps[-1])
    sharded.save(out / "sharded")
    full = sharded.full_model()
    if full is not None:
        sc.save(full, None, out / "gathered", plan=steps[-1])


def save_sliver(rank: int, out: Path, plan_folder: Path) -> None:
    """A bfloat16 model with one neuron per layer: the second rank has no row of it, and no bit of its mask."""
    plan = Plan.load(plan_folder)
    model = sc.apply(plan, sliver())
    expected = sc.apply(plan, sliver())
    sharded = wrap(model, plan)
    assert sharded._weights[SLIVER].to_local().shape[0] == 1 - rank
    sharded.save(out / "sharded")
    again = wrap(empty_model(out / "sharded"), None)
    again.load(out / "sharded")
    for full, masks in ((sharded.full_model(), sharded.full_masks()), (again.full_model(), again.full_masks())):
        if full is not None and masks is not None:
            assert full.dtype == torch.bfloat16 and equal(full, expected) == []
            assert all(torch.equal(masks[n], m) for n, m in plan.masks.items())


def sliver() -> Any:
    return make_tiny("llama", intermediate_size=1).to(torch.bfloat16)


def refuse(rank: int, out: Path, plan_folder: Path, cut_plan: Path) -> None:
    """Every mistake is one sentence on both ranks, and leaves nothing behind."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    plan, flap = Plan.load(plan_folder), Plan.load(cut_plan)
    with pytest.raises(UsageError, match="doesn't shard with FSDP2: make it with"):
        Sharded(make_tiny("llama"), plan, Accelerator(cpu=True))
    AcceleratorState._reset_state()
    PartialState._reset_state()
    whole_model = fsdp2_accelerator(make_tiny("llama"), plugin_options={"auto_wrap_policy": "no_wrap"})
    with pytest.raises(UsageError, match="shard the model as one piece"):
        Sharded(make_tiny("llama"), plan, whole_model)
    other = make_tiny("llama", intermediate_size=48)
    with pytest.raises(PlanMismatchError, match=r"masks model\.layers\.0\.mlp\S+ of shape .* has shape .* here"):
        wrap(other, plan)
    with pytest.raises(PlanMismatchError, match="weights that the plan masks and that aren't zero"):
        wrap(make_tiny("llama"), plan)
    with pytest.raises(PlanMismatchError, match=r"keeps \d+ units of layers\.0\S+, and this model has \d+ there"):
        wrap(make_tiny("llama"), flap)
    with pytest.raises(PlanMismatchError, match="cuts units and masks weights at once"):
        wrap(make_tiny("llama"), flap.merge(plan))

    sharded = wrap(masked("llama", plan), plan)
    sharded.save(out / "sharded")
    before = on_disk(out)
    with pytest.raises(OutputError, match="exists and is not empty"):
        sharded.save(out / "sharded")
    if rank == 0:
        (out / "file").write_text("")
    dist.barrier()
    with pytest.raises(OutputError, match="can't write to"):
        sharded.save(out / "file" / "sharded")
    dist.barrier()
    if rank == 0:
        (out / "file").unlink()
        assert on_disk(out) == before
    sharded.save(out / "sharded", overwrite=True)

    weights = whole(sharded)
    with pytest.raises(ModelLoadError, match=r"holds no sharded model: there is no sharded\.json"):
        sharded.load(out / "nothing")
    with pytest.raises(
        ModelLoadError, match=r"holds another model: \S+ is float32 \[32, 40\] there and float32 \[32, 48\]"
    ):
        wrap(other, None).load(out / "sharded")
    dist.barrier()
    if rank == 0:
        shard = next((out / "sharded" / "shards").glob("shard-00002-*"))
        shard.rename(out / "aside")
    dist.barrier()
    with pytest.raises(ModelLoadError, match=r"shard-00002-\S+ should have \d+ bytes and has 0: .* damaged"):
        sharded.load(out / "sharded")
    dist.barrier()
    if rank == 0:
        (out / "aside").write_bytes(b"\xff" * (out / "aside").stat().st_size)
        (out / "aside").rename(shard)
    dist.barrier()
    with pytest.raises(ModelLoadError, match=r"can't load \S+sharded: rank \d: "):
        sharded.load(out / "sharded")
    assert all(torch.equal(w, weights[n]) for n, w in whole(sharded).items())
