"""The forms in which a model can leave for another runtime, and the one way to write any of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.errors import UsageError, nearest
from secateur.files import check_output, check_output_file, output_file, output_folder
from secateur.models.loading import quiet
from secateur.models.opening import open_source
from secateur.remote import is_url, place
from secateur.runtimes.deci import write_deci
from secateur.runtimes.gguf import TYPES, write_gguf
from secateur.runtimes.onnx import write_onnx

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from secateur.models.sources import Source


@dataclass(frozen=True, kw_only=True)
class Target:
    """One form: ``write(source, tokenizer, path, dtype)`` fills a file or an empty folder."""

    write: Callable[[Source, PreTrainedTokenizerBase | None, Path, str], None]
    advice: str
    """how to run what lies at ``{out}``"""
    dtypes: tuple[str, ...] = ("auto",)
    is_file: bool = False


TARGETS: dict[str, Target] = {
    "gguf": Target(
        write=write_gguf,
        advice="run it with llama.cpp:\n  llama-cli -m {out}",
        dtypes=("auto", *TYPES),
        is_file=True,
    ),
    "deci": Target(write=write_deci, advice="serve it with vLLM:\n  vllm serve {out} --trust-remote-code"),
    "onnx": Target(
        write=write_onnx,
        advice='run it with onnxruntime:\n  onnxruntime.InferenceSession("{out}/model.onnx")',
        dtypes=("auto", "float32"),
    ),
}


def convert_for(
    name: str | Path,
    out: str | Path,
    *,
    to: str,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Path | str:
    """Write the model ``name`` in the form ``to``; see ``secateur.convert``.

    Raises UsageError, OutputError, UnsupportedModelError, MissingExtraError, or what ``load`` raises.
    """
    if to not in TARGETS:
        known = ("safetensors", *TARGETS)
        raise UsageError(f"to must be one of {', '.join(known)}, got {to!r}{nearest(to, known)}")
    target = TARGETS[to]
    if dtype not in target.dtypes:
        allowed = ", ".join(target.dtypes)
        raise UsageError(f"dtype of {to} must be one of {allowed}, got {dtype!r}{nearest(dtype, target.dtypes)}")
    if target.is_file:
        if is_url(out):
            raise UsageError(f"{to} is written to a file of this machine, not to {out}")
        check_output_file(Path(place(out)), overwrite)
    else:
        check_output(out, overwrite)
    source, tokenizer = open_source(name, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    try:
        with output_file(place(out)) if target.is_file else output_folder(out, overwrite) as path, quiet():
            target.write(source, tokenizer, path, dtype)
    finally:
        source.close()
    return place(out)
