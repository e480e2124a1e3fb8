"""A Sparsifier within the trainers of others: a resumed training is the uninterrupted one, bit for bit."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import secateur as sc
from conftest import build_llama
from secateur.errors import MissingExtraError, UsageError
from secateur.train import SparsifierCallback, lightning_callback
from sparse_training import STEPS, batch, network, same, sgd, sparsifier

ROWS = [{"input_ids": ids, "labels": ids} for ids in (list(range(start, start + 8)) for start in range(48))]


def trained(folder: Path, callback: SparsifierCallback, *, steps: int = 8, resume: bool = False, **changes):
    """A tiny Llama after so many steps of a Trainer that writes a checkpoint every four."""
    model = build_llama(num_hidden_layers=1)
    arguments = TrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        save_steps=4, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, seed=3,
        **changes,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=ROWS, callbacks=[callback])
    if steps < 8:
        trainer.add_callback(StopAt(steps))
    trainer.train(resume_from_checkpoint=resume or None)
    return model, trainer


class StopAt(SparsifierCallback.__bases__[0]):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **parts):
        control.should_training_stop = state.global_step >= self.step


def test_a_trainer_goes_on_to_the_bit(tmp_path):
    method = "rigl"
    options = {"sparsity": 0.6, "begin": 1, "end": 7, "every": 2, "exclude": ["lm_head"]}
    whole, _ = trained(tmp_path / "whole", first := SparsifierCallback(method=method, **options))
    trained(tmp_path / "parts", SparsifierCallback(method=method, **options), steps=4)
    parts, trainer = trained(tmp_path / "parts", again := SparsifierCallback(method=method, **options), resume=True)
    assert same(whole, parts) and again.sparsifier.log == first.sparsifier.log
    assert first.sparsifier.sparsity == pytest.approx(0.6, abs=1e-3) and first.sparsifier.steps_done == 8
    assert trainer.state.log_history[-2]["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert (tmp_path / "whole" / "checkpoint-8" / "sparsifier.safetensors").is_file()
    plan = first.sparsifier.plan()
    assert all(not whole.get_parameter(name)[~mask].any() for name, mask in plan.masks.items())
    # nobody watches the optimizer any more, and a checkpoint without masks is none to go on from
    (tmp_path / "parts" / "checkpoint-8" / "sparsifier.safetensors").unlink()
    with pytest.raises(UsageError, match=r"on at step 8, but checkpoint-8 of the output folder holds no sparsifier"):
        trained(tmp_path / "parts", SparsifierCallback(method=method, **options), resume=True)


def test_a_trainer_prunes_before_training_by_its_own_batches(tmp_path):
    options = {"sparsity": 0.6, "exclude": ["lm_head"]}
    whole, _ = trained(tmp_path / "whole", first := SparsifierCallback(method="snip", **options))
    trained(tmp_path / "parts", SparsifierCallback(method="snip", **options), steps=4)
    parts, _ = trained(tmp_path / "parts", SparsifierCallback(method="snip", **options), resume=True)
    assert same(whole, parts) and first.sparsifier.sparsity == pytest.approx(0.6, abs=1e-3)


def test_the_length_of_the_training_is_that_of_the_trainer(tmp_path):
    _, trainer = trained(tmp_path, callback := SparsifierCallback(method="granet", every=2), save_strategy="no")
    assert callback.sparsifier.method.steps == 8 and callback.sparsifier.method.last == 4
    with pytest.raises(UsageError, match="the trainer hasn't begun"):
        SparsifierCallback().on_train_end(None, None, None)
    assert trainer.state.global_step == 8


def accelerated(folder: Path, first: int, last: int, load: str | None = None, save: str | None = None):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model, optimizer = network(), None
    model, optimizer = accelerator.prepare(model, sgd(model))
    pruned = sparsifier(model, optimizer, "granet", sparsity=0.8)
    accelerator.register_for_checkpointing(pruned)
    if load:
        accelerator.load_state(str(folder / load))
    for number in range(first, last + 1):
        with accelerator.accumulate(model):
            x, y = batch(number)
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            pruned.step()
            optimizer.zero_grad()
    if save:
        accelerator.save_state(str(folder / save))
    AcceleratorState._reset_state(reset_partial_state=True)
    return accelerator.unwrap_model(model), pruned


def test_accelerate_goes_on_to_the_bit(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    whole, first = accelerated(tmp_path, 1, 2 * STEPS)
    accelerated(tmp_path, 1, 10, save="state")
    parts, again = accelerated(tmp_path, 11, 2 * STEPS, load="state")
    assert same(whole, parts) and first.log == again.log and first.steps_done == STEPS
    assert first.sparsity == pytest.approx(0.8, abs=1e-3)


def test_lightning_goes_on_to_the_bit(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, number, _):
            x, y = batch(int(number))
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return sgd(self)

    def fitted(epochs: int, resume: str | None = None) -> tuple[nn.Module, sc.Sparsifier]:
        # the rhythm is given, so that both halves have the same
        callback = lightning_callback(method="rigl", sparsity=0.8, begin=2, end=8, every=2, steps=STEPS)
        trainer = lightning.Trainer(
            max_epochs=epochs, callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(range(1, STEPS // 2 + 1), batch_size=1)
        module = Module()
        trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
        if epochs == 1:
            trainer.save_checkpoint(tmp_path / "half.ckpt")
        return module, callback.sparsifier

    whole, pruned = fitted(2)
    assert pruned.sparsity == pytest.approx(0.8, abs=1e-3) and pruned.steps_done == STEPS
    fitted(1)
    parts, again = fitted(2, str(tmp_path / "half.ckpt"))
    assert same(whole, parts) and again.log == pruned.log


def test_lightning_that_is_missing_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(MissingExtraError, match=r"needs lightning, .* pip install 'secateur\[lightning\]'"):
        lightning_callback(method="gmp", end=10)
