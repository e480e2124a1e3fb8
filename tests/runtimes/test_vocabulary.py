"""Tokenizers in GGUF files: llama.cpp's two algorithms, written down plainly, give the tokenizer's own ids."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from secateur.errors import UnsupportedModelError
from secateur.observe.calibration import builtin_text
from secateur.runtimes.vocabulary import WAYS, read_vocabulary

TEXT = "Two 42 words, don't panic:\n\n    return x[1234]  é 你\n"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3 += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def trained(steps, *, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([builtin_text("calibration")[:20_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def split(expression: str):
    return [pre_tokenizers.Split(Regex(expression), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]


@pytest.mark.parametrize(
    ("steps", "whole_words", "way"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], False, "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)], False, "smollm"),
        (split(LLAMA3.replace("{1,3}", "")), False, "qwen2"),
        (split(LLAMA3), True, "llama-bpe"),
        (split(LLAMA3), False, "dbrx"),
    ],
    ids=WAYS,
)
def test_ways_to_split_text_are_recognised(steps, whole_words: bool, way: str) -> None:
    tokenizer = trained(steps, ignore_merges=whole_words)
    vocabulary = read_vocabulary(tokenizer, 410)
    assert (vocabulary.model, vocabulary.way) == ("gpt2", way)
    assert vocabulary.tokens[:400] == tokenizer.convert_ids_to_tokens(range(400))
    assert vocabulary.types == [3] + 399 * [1] + 10 * [5] and vocabulary.tokens[400] == "[PAD400]"
    assert _byte_level(vocabulary, WAYS[way][0], TEXT) == tokenizer(TEXT)["input_ids"]


def _byte_level(vocabulary, expressions, text: str) -> list[int]:
    """Words by the expressions, then merges by their rank: llama.cpp's ``llm_tokenizer_bpe``."""
    words = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(e), "isolated") for e in expressions])
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(vocabulary.merges)}
    ids = []
    for word, _ in words.pre_tokenize_str(text):
        symbols = list(as_bytes.pre_tokenize_str(word)[0][0])
        while pairs := [(ranks[p], i) for i, p in enumerate(pairwise(symbols)) if p in ranks]:
            _, i = min(pairs)
            symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
        ids += [vocabulary.tokens.index(symbol) for symbol in symbols]
    return ids


def test_sentencepiece_scores_merge_as_the_ranks_do(sentencepiece: PreTrainedTokenizerFast) -> None:
    vocabulary = read_vocabulary(sentencepiece, len(sentencepiece))
    assert (vocabulary.model, vocabulary.way, vocabulary.merges) == ("llama", "default", [])
    kinds = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert [kinds[t] for t in ("<unk>", "<s>", "e", "<0x0A>", "<turn>", "▁▁")] == [2, 3, 1, 6, 4, 1]
    assert vocabulary.special == {"bos": 1, "eos": 2, "unk": 0} and not vocabulary.space_prefix
    assert vocabulary.chat_template == "{{ messages }}"
    assert _scored(vocabulary, TEXT) == sentencepiece(TEXT)["input_ids"]


def _scored(vocabulary, text: str) -> list[int]:
    """The neighbours with the highest score become one, from the left: llama.cpp's ``llm_tokenizer_spm``."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    symbols = list(text.replace(" ", "▁"))
    while pairs := [(-vocabulary.scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]:
        _, i = min(pairs)
        symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
    found = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


def test_what_has_no_equal_is_refused(sentencepiece: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UnsupportedModelError, match=r"knows no name of llama.cpp for \(known: gpt-2, smollm"):
        read_vocabulary(trained([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)]), 400)
    with pytest.raises(UnsupportedModelError, match="knows no name"):
        read_vocabulary(trained([pre_tokenizers.ByteLevel(add_prefix_space=True)]), 400)
    lower = trained([pre_tokenizers.ByteLevel(False)])
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UnsupportedModelError, match="knows no name"):
        read_vocabulary(lower, 400)
    with pytest.raises(UnsupportedModelError, match="ids up to 556, the model embeds 100 tokens"):
        read_vocabulary(sentencepiece, 100)
    state = json.loads(sentencepiece.backend_tokenizer.to_str())
    del state["model"]["vocab"]["<0x0A>"]
    unfinished = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    with pytest.raises(UnsupportedModelError, match="falls back to bytes, but has no tokens for them"):
        read_vocabulary(unfinished, 600)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    with pytest.raises(UnsupportedModelError, match="of type WordLevel; secateur writes BPE"):
        read_vocabulary(words, 2)


def test_tokens_around_the_text_are_noted(make_tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    plain, framed = make_tokenizer(), make_tokenizer()
    framed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    found = [read_vocabulary(tokenizer, 512) for tokenizer in (plain, framed)]
    assert [(v.add_bos, v.add_eos) for v in found] == [(False, False), (True, True)]
