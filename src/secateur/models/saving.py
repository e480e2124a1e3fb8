"""Writing a checkpoint that other tools load: plain where the stock class can hold it, self-describing otherwise."""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from secateur.errors import UsageError, nearest
from secateur.files import output_folder
from secateur.manifest import write_manifest
from secateur.models import modeling_secateur
from secateur.models.card import model_card
from secateur.models.decoders import check_decoder
from secateur.models.families import FAMILIES
from secateur.models.layout import is_stock, layout_of, native_config, plain, stock_accepts
from secateur.models.loading import check_finite, quiet
from secateur.models.packed import PACKED_VERSION, pack
from secateur.models.shards import parse_size
from secateur.models.vocabulary import fitted
from secateur.plans import Plan
from secateur.remote import place
from secateur.report.folder import write_documents
from secateur.report.report import BYTES_ON_DISK
from secateur.tensorfiles import Tally

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from secateur.report import Report

__all__ = ["FORMATS", "plain", "save_model"]

FORMATS = ("dense", "packed")
_MODELLING_FILE = "modeling_secateur.py"


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    plan: Plan | Sequence[Plan] | None = None,
    report: Report | None = None,
    html: bool = False,
    format: str = "dense",
    overwrite: bool = False,
    base_name: str | None = None,
    max_shard_size: str | int = "5GB",
) -> Path | str:
    """Write model, tokenizer, plan, report and model card to ``folder``, all or nothing; returns the folder.

    ``plan`` may be a sequence, one plan per step: they go to ``plan/step-1``, ``plan/step-2``, … With ``html`` the
    report is drawn too. What the report can only know now is filled in: output, plainness, bytes on disk, seconds.
    ``format`` is ``dense`` (zeros stay) or ``packed`` (bitmap and values). A model that the stock class can't hold,
    and a packed one, carries its modelling file for ``trust_remote_code``. The model in memory stays as it is.
    Raises UsageError for an unknown format or another network, UnsupportedModelError for adapters, NonFiniteError for
    NaN or inf in the weights, and OutputError when the folder exists or the disk is full.
    """
    if format not in FORMATS:
        raise UsageError(f"format must be one of {', '.join(FORMATS)}, got {format!r}{nearest(format, FORMATS)}")
    check_decoder(model)
    plans = [] if plan is None else [plan] if isinstance(plan, Plan) else list(plan)
    with output_folder(folder, overwrite=overwrite) as path:
        write_checkpoint(
            path,
            folder,
            model,
            tokenizer,
            plans=plans,
            report=report,
            html=html,
            format=format,
            base_name=base_name,
            max_shard_size=parse_size(max_shard_size),
        )
    return place(folder)


def write_checkpoint(
    path: Path,
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    plans: Sequence[Plan],
    report: Report | None,
    html: bool,
    format: str,
    base_name: str | None = None,
    max_shard_size: int = parse_size("5GB"),
) -> None:
    """All that ``save_model`` writes, in ``path``, an empty folder that will have the name ``folder``.

    ``max_shard_size`` is in bytes. Raises NonFiniteError for NaN or inf in the weights.
    """
    started = time.perf_counter()
    check_finite(model)
    remote = write_model(model, path, format, max_shard_size)
    document_folder(
        path,
        folder,
        tokenizer=fitted(tokenizer, plans),
        plans=plans,
        report=report,
        html=html,
        format=format,
        plain=not remote,
        base_name=base_name or (plans[0].model.name if plans else "") or model.config.name_or_path or "",
        started=started,
    )


def document_folder(
    path: Path,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    plans: Sequence[Plan],
    report: Report | None,
    html: bool,
    format: str,
    plain: bool,
    base_name: str = "",
    started: float | None = None,
    tallies: Mapping[str, Tally] | None = None,
) -> None:
    """Everything in a checkpoint but weights and config: tokenizer, plans, report, model card, manifest.

    ``path`` is where the files lie now, ``folder`` the name that they will have. Plans that are there are replaced.
    ``tallies`` are those of the weight files that were written just now, by name.
    """
    started = time.perf_counter() if started is None else started
    if tokenizer is not None:
        tokenizer.save_pretrained(str(path))
    if report is not None:
        _complete(report, path, str(folder), plain=plain, seconds=time.perf_counter() - started)
    name = base_name or (plans[0].model.name if plans else "")
    card = model_card(Path(folder).name, base_name=name, plans=plans, report=report, format=format, remote=not plain)
    write_documents(path, plans, report, card, html=html)
    write_manifest(path, {name: tally.sha256 for name, tally in (tallies or {}).items()})


def _complete(report: Report, path: Path, output: str, *, plain: bool, seconds: float) -> None:
    report.output, report.plain = output, plain
    report.seconds["save"] = seconds
    written = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    for metric in report.metrics:
        if metric.name == BYTES_ON_DISK and len(metric.values) > 1:
            # measured before anything was written; now the format is known
            metric.values[list(metric.values)[-1]] = float(written)


def write_model(model: PreTrainedModel, path: Path, format: str, max_shard_size: int) -> bool:
    """Weights, config and generation config of a model in memory; True when the folder needs its modelling file.

    ``max_shard_size`` is in bytes.
    """
    state_dict, shapes = _unique(model.state_dict()), {}
    if format == "packed":
        state_dict, shapes = pack(state_dict)
    config, remote = _config_of(model, shapes)
    # transformers writes into the config that it saves; what counts is written after it
    with quiet(), _lent_config(model, copy.deepcopy(config)):
        model.save_pretrained(
            str(path),
            state_dict=state_dict,
            max_shard_size=max_shard_size,
            # transformers maps the published names of some families to its own, though not for remote code
            save_original_format=not remote,
        )
    _write_config_files(model, path, config, remote)
    return remote


def write_config(model: PreTrainedModel, path: Path, packed: Mapping[str, list[int]]) -> bool:
    """All of a checkpoint but its weights; ``packed`` are the dense shapes of packed ones.

    ``model`` may lie on the meta device. Returns True when the folder needs its modelling file.
    """
    config, remote = _config_of(model, packed)
    _write_config_files(model, path, config, remote)
    write_generation_config(model, path)
    return remote


def write_generation_config(model: PreTrainedModel, path: Path) -> None:
    """How the model writes unless asked otherwise: what ends a text, and how tokens are drawn."""
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        with quiet():
            model.generation_config.save_pretrained(str(path))


def _write_config_files(model: PreTrainedModel, path: Path, config: PreTrainedConfig, remote: bool) -> None:
    # a class of the user's own comes along with its code, and ours only where it is needed
    ours = type(model).__module__.endswith(_MODELLING_FILE.removesuffix(".py"))
    if not (remote or ours) and getattr(model, "_auto_class", None) is not None:
        from transformers.dynamic_module_utils import custom_object_save

        writer: Any = custom_object_save  # which its annotation lets take no config
        writer(model, str(path), config=config)
    with quiet():
        config.save_pretrained(str(path))
    if remote:
        copy_modelling_file(path)
    else:
        (path / _MODELLING_FILE).unlink(missing_ok=True)  # a class loaded as remote code brings its own


def _config_of(model: PreTrainedModel, packed: Mapping[str, list[int]]) -> tuple[PreTrainedConfig, bool]:
    layout = layout_of(model)
    if packed:
        layout["packed"] = {"version": PACKED_VERSION, "tensors": dict(packed)}
    return saved_config(model, layout, str(model.dtype).removeprefix("torch."))


def saved_config(model: PreTrainedModel, layout: dict[str, Any], dtype: str) -> tuple[PreTrainedConfig, bool]:
    """(the config to save, whether the folder needs its modelling file) for a model that differs so from the stock."""
    native = native_config(model.config)
    packed = bool(layout.get("packed", {}).get("tensors"))
    remote = packed or not is_stock(layout) or not stock_accepts(native)
    config = _remote_config(native, layout, type(model.base_model).__name__) if remote else native
    config.dtype = dtype
    config.architectures = [f"Pruned{layout['base']}" if remote else layout["base"]]
    return config, remote


def copy_modelling_file(path: Path) -> None:
    """Put the code that loads a checkpoint which the stock class can't into its folder."""
    shutil.copyfile(modeling_secateur.__file__, path / _MODELLING_FILE)


def _unique(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the later names of tied weights, which are tied again on loading."""
    seen: dict[tuple[int, Any], str] = {}
    for name, tensor in state_dict.items():
        seen.setdefault((tensor.data_ptr() or id(tensor), tensor.shape), name)
    return {name: state_dict[name] for name in seen.values()}


@contextmanager
def _lent_config(model: PreTrainedModel, config: PreTrainedConfig) -> Iterator[None]:
    own = model.config
    model.config = config
    try:
        yield
    finally:
        model.config = own


def _remote_config(config: PreTrainedConfig, layout: dict[str, Any], base_model: str) -> PreTrainedConfig:
    """The config of a checkpoint that only its modelling file may load.

    Stock transformers ignores remote code where it knows the model type. So that it fails rather than drop biases or
    fill packed weights with random numbers, the FFN width is given per layer only, and -1 for the whole model.
    """
    data = config.to_dict()
    sizes = {int(layer): values for layer, values in (data.pop("per_layer_config", None) or {}).items()}
    layers = {layer: dict(sizes.get(layer, {})) for layer in range(config.num_hidden_layers)}
    stock: dict[str, Any] = {}

    def spread(key: str, outer: int) -> None:
        stock[key] = data[key]
        for values in layers.values():
            values.setdefault(key, data[key])
        data[key] = outer

    family = FAMILIES.get(config.model_type)
    ffn_key = family.ffn_key if family else "intermediate_size"
    if ffn_key in data:
        spread(ffn_key, -1)
    if not stock_accepts(config):
        # the config class checks the number of heads of the whole model against the hidden size
        if not any("num_attention_heads" in values for values in layers.values()):
            spread("num_attention_heads", math.gcd(data["hidden_size"], data["num_attention_heads"]))
        data["allow_global_per_layer_attribute_access"] = True
    names = {"AutoModelForCausalLM": layout["base"], "AutoModel": base_model}
    data["auto_map"] = {auto: f"modeling_secateur.Pruned{name}" for auto, name in names.items()}
    data["secateur"] = {**layout, "config": stock}
    data["per_layer_config"] = {layer: values for layer, values in layers.items() if values}
    return type(config).from_dict(data)
