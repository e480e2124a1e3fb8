"""A GGUF file in llama.cpp: token ids, logits and greedy text.

The package llama-cpp-py-sync brings llama.cpp built, and its C functions as they are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# GGML_LOG_LEVEL_ERROR
ERROR = 4


class LlamaCpp:
    """One GGUF file in llama.cpp, on the CPU. Raises ValueError for a file that it refuses."""

    def __init__(self, file: str | Path, *, context: int, threads: int = 1) -> None:
        import llama_cpp_py_sync
        from llama_cpp_py_sync import _cffi_bindings as bindings

        self.name = f"llama.cpp {llama_cpp_py_sync.__llama_cpp_tag__}"
        self._ffi: Any = bindings.ffi
        self._lib: Any = bindings.get_lib()
        # it prints every tensor that it loads
        self._lib.llama_log_set(_listen(self._ffi), self._ffi.NULL)
        self._lib.llama_backend_init()
        options = self._lib.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(str(file).encode(), options)
        if self._model == self._ffi.NULL:
            raise ValueError(f"llama.cpp can't load {file}: {' '.join(_complaints)}")
        options = self._lib.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context
        options.n_threads = options.n_threads_batch = threads
        self._context = self._lib.llama_init_from_model(self._model, options)
        if self._context == self._ffi.NULL:
            raise ValueError(f"llama.cpp can't run {file}")
        self._vocabulary = self._lib.llama_model_get_vocab(self._model)
        self._tokens = self._lib.llama_vocab_n_tokens(self._vocabulary)

    def close(self) -> None:
        """Free what was loaded."""
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, without those that frame a sequence."""
        raw = text.encode()
        room = len(raw) + 8
        ids = self._ffi.new("llama_token[]", room)
        count = self._lib.llama_tokenize(self._vocabulary, raw, len(raw), ids, room, False, False)
        return list(ids[0:count])

    def logits(self, ids: Sequence[int]) -> Tensor:
        """[tokens, vocabulary] float32 of a sequence from its start."""
        self._reset()
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
                batch.seq_id[i][0] = 0
            self._decode(batch)
        finally:
            self._lib.llama_batch_free(batch)
        return self._read(self._lib.llama_get_logits(self._context), len(ids))

    def losses(self, ids_NT: Tensor) -> Tensor:
        """Mean negative log-likelihood in nats of every window, [windows] float64."""
        both = ((self.logits(ids_T.tolist())[:-1], ids_T[1:]) for ids_T in ids_NT)
        return torch.stack([torch.nn.functional.cross_entropy(*pair).double() for pair in both])

    def greedy(self, ids: Sequence[int], new: int) -> tuple[list[int], float, float]:
        """``new`` tokens after a prompt; seconds of the prompt, and of the new tokens."""
        self._reset()
        start = time.perf_counter()
        found = [self._next(ids)]
        middle = time.perf_counter()
        for _ in range(new):
            found.append(self._next(found[-1:]))
        return found[:new], middle - start, time.perf_counter() - middle

    def _next(self, ids: Sequence[int]) -> int:
        tokens = self._ffi.new("llama_token[]", list(ids))
        self._decode(self._lib.llama_batch_get_one(tokens, len(ids)))
        return int(self._read(self._lib.llama_get_logits_ith(self._context, -1), 1).argmax())

    def _reset(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _decode(self, batch: Any) -> None:
        code = self._lib.llama_decode(self._context, batch)
        if code:
            raise ValueError(f"llama.cpp can't compute a batch of {batch.n_tokens} tokens (code {code})")

    def _read(self, pointer: Any, rows: int) -> Tensor:
        raw = self._ffi.buffer(pointer, 4 * rows * self._tokens)
        return torch.from_numpy(np.frombuffer(raw, dtype=np.float32).copy()).reshape(rows, self._tokens)


# the callback must live as long as llama.cpp does
_callbacks: list[Any] = []
_complaints: list[str] = []


def _listen(ffi: Any) -> Any:
    """A callback that keeps the errors of the last file and drops everything else that is said."""
    _complaints.clear()
    if not _callbacks:

        def keep(level: int, text: Any, data: Any) -> None:
            if level == ERROR:
                _complaints.append(ffi.string(text).decode(errors="replace").strip())

        _callbacks.append(ffi.callback("void(enum ggml_log_level, const char *, void *)", keep))
    return _callbacks[0]
