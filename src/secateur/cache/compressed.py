"""A cache for transformers that really holds less: what ``compressed_cache`` and ``compress_cache`` give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers.cache_utils import DynamicCache, DynamicLayer

from secateur.cache.hooks import attach, attention_modules, cache_argument, check_interface, decoder_of
from secateur.cache.layer import CompressedLayer, Steps
from secateur.cache.report import CacheReport, cache_report
from secateur.errors import UnsupportedModelError, UsageError
from secateur.methods.cachespec import parse_cache_spec
from secateur.methods.caching import CacheMethod, EvictionMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.methods.rereading import Reader


class CompressedCache(DynamicCache):
    """A KV cache from which tokens, channels or elements are removed at the end of the prompt, and their memory freed.

    It takes the place of a ``DynamicCache`` in the model that it was made for. Layers with full attention are
    compressed; layers with a sliding window keep what they keep anyway. Positions go on from the original length of the
    prompt.
    """

    def __init__(
        self, methods: tuple[CacheMethod, ...], model: PreTrainedModel, tokenizer: Reader | None = None
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{config.model_type} shares its cache between layers or has an encoder: only decoders with one cache"
                " per layer can be compressed"
            )
        if not (modules := attention_modules(model)):
            raise UnsupportedModelError(f"{type(model).__name__} has no attention layers that are known")
        check_interface(modules[0])
        super().__init__(config=config)
        self.methods, self.tokenizer, self.argument = methods, tokenizer, cache_argument(decoder_of(model).forward)
        self.attachment = attach(model)
        self.warned: set[str] = set()
        steps, count = Steps.of(methods), len(self.layers)
        # sliding windows and linear attention have types of their own
        self.layers: list[Any] = [
            CompressedLayer(index, count, steps) if type(layer) is DynamicLayer else layer
            for index, layer in enumerate(self.layers)
        ]
        if not any(isinstance(layer, CompressedLayer) for layer in self.layers):
            raise UnsupportedModelError(
                f"no layer of this {config.model_type} attends to the whole text, so that there is nothing to compress:"
                " sliding windows are small already"
            )

    @property
    def pending(self) -> bool:
        """Whether the prompt was read, and it isn't decided yet what leaves."""
        return any(isinstance(layer, CompressedLayer) and layer.pending is not None for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        # of all layers before any: those that evicted nothing could do what others can't
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def report(self) -> CacheReport:
        """Bytes and what stays of every layer: a dict that prints as a table."""
        return cache_report(self)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write this cache to a safetensors file, exactly as it is; ``load_cache`` reads it.

        Raises UsageError for a cache that has read nothing, UnsupportedModelError for layers of a kind that isn't
        known, and OutputError for a file that exists (unless ``overwrite``) or can't be written.
        """
        from secateur.cache.saving import save_cache

        model = self.attachment.model()
        if model is None:
            raise UsageError("the model of this cache is gone, so that the cache can't say of which model it is")
        save_cache(self, cast("PreTrainedModel", model), path, overwrite)

    def __repr__(self) -> str:
        names = "+".join(method.name for method in self.methods)
        return f"CompressedCache({names}, {self.get_seq_length()} tokens)"


def check_tokenizer(methods: tuple[CacheMethod, ...], tokenizer: Reader | None) -> None:
    """Raises UsageError when a method lets the model read its prompt again, and there is no tokenizer for that."""
    for method in methods:
        if isinstance(method, EvictionMethod) and method.rereads and not method.is_identity and tokenizer is None:
            raise UsageError(
                f"{method.name} lets the model read its prompt again behind a request in words, and needs the tokenizer"
                f" for it: compressed_cache('{method.name}', model, tokenizer=tokenizer)"
            )


def compressed_cache(spec: str, model: PreTrainedModel, *, tokenizer: Reader | None = None) -> CompressedCache:
    """An empty cache for one prompt (or a batch) and what follows it, compressed as ``spec`` says.

    ``spec`` is ``snapkv:0.5``, ``mustafar:k=0.7,v=0.7``, several joined by ``+``, or a wrapper around another method,
    ``adakv(snapkv:0.5)``; numbers are fractions removed. Give it to ``model.generate`` or to the model itself as
    ``cache`` (``past_key_values`` before transformers 5.24). ``tokenizer`` is needed by ``kvzip`` alone. Raises
    UsageError or UnsupportedModelError.
    """
    methods = parse_cache_spec(spec)
    check_tokenizer(methods, tokenizer)
    return CompressedCache(methods, _decoder(model), tokenizer)


def load_cache(path: str | Path, model: PreTrainedModel, spec: str | None = None) -> CompressedCache:
    """The cache that ``cache.save(path)`` wrote, for the same model: it goes on as the saved one would, bit for bit.

    ``spec``, if given, must be what the cache was made with. Raises CorruptFileError for a file that is no whole cache,
    PlanMismatchError for another model, UsageError for another spec.
    """
    from secateur.cache.saving import read_cache

    return read_cache(path, _decoder(model), None if spec is None else parse_cache_spec(spec))


@dataclass
class Compressing:
    """What ``compress_cache`` gives: the ``cache`` that was made last."""

    cache: CompressedCache | None = None

    def report(self) -> CacheReport:
        """That of the cache that was made last. Raises UsageError when there is none yet."""
        if self.cache is None:
            raise UsageError("no cache was made yet: the model wasn't called, or with use_cache=False")
        return self.cache.report()


@contextmanager
def compress_cache(model: PreTrainedModel, spec: str, *, tokenizer: Reader | None = None) -> Iterator[Compressing]:
    """Within this context every new cache of the model is a compressed one; also in pipelines, which take no cache.

    ``spec`` and ``tokenizer`` as in ``compressed_cache``. Raises UsageError for a cache of another kind that the model
    is called with.
    """
    methods, made = parse_cache_spec(spec), Compressing()
    check_tokenizer(methods, tokenizer)
    name = cache_argument(_decoder(model).forward)

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = kwargs.get(name)
        if isinstance(given, CompressedCache) or (given is None and kwargs.get("use_cache") is False):
            return args, kwargs
        if given is not None and (type(given) is not DynamicCache or given.offloading or given.get_seq_length()):
            kind = type(given).__name__
            if type(given) is DynamicCache:
                kind += " that is offloaded" if given.offloading else " that isn't empty"
            raise UsageError(f"a cache is compressed from the beginning, and the model was called with a {kind}")
        made.cache = CompressedCache(methods, module, tokenizer)
        return args, {**kwargs, name: made.cache}

    CompressedCache(methods, model, tokenizer)  # what can't be done is said before anything is
    # in front of an outer context, which leaves a compressed cache that it is given alone
    handle = model.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    try:
        yield made
    finally:
        handle.remove()


def _decoder(model: Any) -> PreTrainedModel:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"the model must be one of transformers, got {type(model).__name__}")
    return model
