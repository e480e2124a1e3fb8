"""The KV cache: tokens, channels and elements removed while a model runs, with bytes that are really saved."""

from secateur.cache.compressed import CompressedCache, Compressing, compress_cache, compressed_cache, load_cache
from secateur.cache.report import CacheReport

__all__ = ["CacheReport", "CompressedCache", "Compressing", "compress_cache", "compressed_cache", "load_cache"]
