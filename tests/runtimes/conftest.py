"""A tokenizer like that of Gemma."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from secateur.observe.calibration import builtin_text


@pytest.fixture(scope="session")
def sentencepiece() -> PreTrainedTokenizerFast:
    """BPE over ▁ with bytes for what it doesn't know, as Gemma and Llama 2 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(builtin_text("calibration")[:20_000].split("\n"), trainer)
    state = json.loads(tokenizer.to_str())
    vocab = state["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    state["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    made = Tokenizer.from_str(json.dumps(state))
    made.add_tokens([AddedToken(token, normalized=False) for token in ("<turn>", "▁▁")])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template="{{ messages }}"
    )
