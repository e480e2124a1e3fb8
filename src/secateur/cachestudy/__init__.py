"""Studies of the KV cache of one model: compressions side by side, and one that fits into so many bytes."""

from secateur.cachestudy.compare import compare_caches
from secateur.cachestudy.recommend import Recommendation, recommend_cache
from secateur.cachestudy.results import CacheComparison

__all__ = ["CacheComparison", "Recommendation", "compare_caches", "recommend_cache"]
