"""Training a cut model so that it stays cut: masks and widths through optimizer steps, sharding and restarts."""

from secateur.train.sharding import Sharded, fsdp2_accelerator
from secateur.train.shards import empty_model

__all__ = ["Sharded", "empty_model", "fsdp2_accelerator"]
