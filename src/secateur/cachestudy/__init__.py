"""Studies of the KV cache of one model: compressions side by side, and one that fits into so many bytes."""

from secateur.cachestudy.recommend import Recommendation, recommend_cache

__all__ = ["Recommendation", "recommend_cache"]
