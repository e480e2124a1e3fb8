"""Training a cut model that is sharded over ranks with FSDP2, through Accelerate.

    accelerator = fsdp2_accelerator(model)
    sharded = Sharded(model, plan, accelerator, optimizer=torch.optim.AdamW(model.parameters()))
    for batch in batches:
        accelerator.backward(sharded.model(**batch).loss)
        sharded.optimizer.step()
        sharded.optimizer.zero_grad()
    sharded.save("step-1000")
    model = sharded.full_model()  # on rank 0: secateur.save(model, tokenizer, "out")

All ranks call every method together. Widths that differ from layer to layer are those of the modules and need
nothing; what a plan masks is zero again after every step.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.errors import UsageError, require_extra
from secateur.models.decoders import decoder_blocks
from secateur.models.weightless import weightless_copy
from secateur.ranks import join
from secateur.rowmasks import clear_masked, pack_rows, packed_shape, shard_like, unpack_rows, whole
from secateur.train.masks import check_zero, masks_of
from secateur.train.parts import reshard
from secateur.train.shards import check_same, checkpoint_library, read_contents, read_sharded, write_sharded

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from secateur.plans import Plan


def fsdp2_accelerator(
    model: PreTrainedModel,
    *,
    cpu: bool | None = None,
    plugin_options: dict[str, Any] | None = None,
    **options: Any,
) -> Accelerator:
    """An Accelerator that shards ``model`` block by block with FSDP2, over the CPU ranks of gloo too.

    ``cpu`` stays away from accelerators; by default that is so where there is none. ``plugin_options`` are those of
    Accelerate's FullyShardedDataParallelPlugin, and ``options`` those of its Accelerator.
    Raises MissingExtraError, or UsageError when the script was not started with torchrun or accelerate launch.
    """
    accelerate = require_extra("accelerate", "train", "sharded training")
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if "LOCAL_RANK" not in os.environ:
        _check_group()
        raise UsageError("the process group has no ranks for Accelerate: set RANK, LOCAL_RANK and WORLD_SIZE")
    _, blocks = decoder_blocks(model)
    wrapped = {
        "auto_wrap_policy": "transformer_based_wrap",
        "transformer_cls_names_to_wrap": sorted({type(block).__name__ for block in blocks}),
    }
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **{**wrapped, **(plugin_options or {})})
    cpu = not torch.accelerator.is_available() if cpu is None else cpu
    accelerator = accelerate.Accelerator(cpu=cpu, fsdp_plugin=plugin, **options)
    # Accelerate turns FSDP on for accelerators only; what it then does runs on CPU ranks as well. Its state is one
    # for the whole process and keeps the first plugin that it was given.
    accelerate.PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


class Sharded:
    """A cut model sharded over ranks, its optimizer, and masks that hold through training, saving and loading.

    ``model`` is what ``secateur.apply`` made of ``plan``, the same on every rank; it is sharded in place. The masks
    of ``plan`` are kept, as bits of this rank's rows only; a plan that masks nothing may be left out. ``optimizer``
    is prepared with the model, and each of its steps is followed by ``step_masks``.
    Raises UsageError, PlanMismatchError or MissingExtraError, on every rank, before anything is changed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan | None,
        accelerator: Accelerator,
        *,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        require_extra("accelerate", "train", "sharded training")
        checkpoint_library()
        _check_group()
        _check_accelerator(accelerator)
        masks = masks_of(plan, model)
        # only rank 0 is sure to have the weights: with cpu_ram_efficient_loading the others receive theirs
        self._ranks = join()
        with self._ranks.together():
            self._ranks.on_main(lambda: check_zero(model, masks))
        self._blank = weightless_copy(model)
        if optimizer is not None:
            optimizer.register_step_post_hook(lambda *_: self.step_masks())
        # Accelerate wants an optimizer with every model; one that is never used costs nothing
        chosen = torch.optim.SGD(model.parameters()) if optimizer is None else optimizer
        self.model, prepared = accelerator.prepare(model, chosen)
        self.optimizer = None if optimizer is None else prepared
        self._weights = self._sharded_weights()
        self._masks = {name: shard_like(pack_rows(mask), self._weights[name]) for name, mask in masks.items()}

    def step_masks(self) -> None:
        """Zero what the plan masks in this rank's weights; for optimizers that this object doesn't know."""
        reshard(self.model)
        for name, packed in self._masks.items():
            clear_masked(self._weights[name], packed)

    def mask_gradients(self) -> None:
        """Zero the gradients of masked weights: before clipping by norm, or to keep momentum free of them."""
        for name, packed in self._masks.items():
            gradient = self._weights[name].grad
            if gradient is not None:
                clear_masked(gradient, packed)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write weights and masks, each rank its part, to a new folder that all ranks see, all or nothing.

        The state of the optimizer is not part of it. Raises OutputError when the folder exists or can't be written.
        """
        reshard(self.model)
        write_sharded(self._ranks, folder, self._blank, self._weights, self._masks, overwrite=overwrite)

    def load(self, folder: str | Path) -> None:
        """Take weights and masks from what any number of ranks saved; the masks replace those of the plan.

        Raises ModelLoadError when the checkpoint is damaged or of a model of other widths, which is found out before
        anything is changed unless the disk fails half-way.
        """
        with self._ranks.together():
            contents = self._ranks.on_main(lambda: read_contents(Path(folder)))
        check_same(contents, self._weights, folder)
        reshard(self.model)
        masks = {}
        for name, shape in contents.masks.items():
            masks[name] = shard_like(torch.zeros(packed_shape(shape), dtype=torch.uint8), self._weights[name])
        read_sharded(folder, self._weights, masks)
        self._masks = masks
        self.step_masks()

    def full_model(self) -> PreTrainedModel | None:
        """The whole model on the CPU of rank 0, in eval mode, as ``secateur.save`` takes it; None on other ranks."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        # with both options the tensors are gathered one by one, and only rank 0 keeps them
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.model, options=options)
        if not self._ranks.main:
            return None
        model = copy.deepcopy(self._blank)
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        return model.to("cpu").eval()  # type: ignore[arg-type,return-value]

    def full_masks(self) -> dict[str, Tensor] | None:
        """The masks in the shapes of the weights, boolean on the CPU of rank 0, True = kept; None on other ranks."""
        masks = {}
        for name, packed in self._masks.items():
            gathered = whole(packed)
            if self._ranks.main:
                masks[name] = unpack_rows(gathered.cpu(), tuple(self._weights[name].shape))
        return masks if self._ranks.main else None

    def _sharded_weights(self) -> dict[str, Tensor]:
        """Parameters by name, tied ones once, and the buffers that a checkpoint holds."""
        weights: dict[str, Tensor] = dict(self.model.named_parameters())
        tied = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return weights | {n: t for n, t in self.model.state_dict().items() if n not in tied}


def _check_group() -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise UsageError("there is no process group: start the script with torchrun or accelerate launch")


def _check_accelerator(accelerator: Accelerator) -> None:
    state: Any = accelerator.state
    if not getattr(state, "is_fsdp2", False):
        raise UsageError("the accelerator doesn't shard with FSDP2: make it with secateur.train.fsdp2_accelerator")
    if state.fsdp_plugin.auto_wrap_policy is None:
        raise UsageError(
            "the accelerator would shard the model as one piece, which needs the memory of all of it: make it with"
            " secateur.train.fsdp2_accelerator, or give its plugin an auto_wrap_policy"
        )
