"""The config of a checkpoint in the DeciLM layout; this file travels with the checkpoint.

A Llama whose layers differ: ``block_configs`` has the sizes of each. vLLM and SGLang have a model of this kind and no
config for it. Nothing but transformers is needed.
"""

from transformers import LlamaConfig


class Block(dict):
    """A dictionary whose entries are attributes too; what it lacks, it has not."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def width_of(ffn_mult, hidden_size):
    """The FFN width that a multiplier stands for: a multiple of 256."""
    width = int(2 * ffn_mult * hidden_size / 3)
    return -(-width // 256) * 256


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [Block({part: Block(sizes) for part, sizes in block.items()}) for block in block_configs]
