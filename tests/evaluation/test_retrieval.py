"""Retrieval tasks: lengths, depths, seeds and protocols, and answers that a model which copies would give."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from secateur.errors import UsageError
from secateur.evaluation.continuation import continuation_losses, retrieved
from secateur.evaluation.retrieval import Retrieval


def texts(case, tokenizer):
    return [tokenizer.decode(part) for part in (case.context, case.question, case.lead, case.answer)]


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("niah:length=300,depths=3", "The secret number of the {} is {}."),
        ("niah:length=400,depths=2,keys=4,haystack=text", "The secret number of the {} is {}."),
        ("kv:length=300,depths=3", "The code of {} is {}."),
    ],
)
def test_what_is_asked_is_in_the_context(task, sentence, tiny_tokenizer):
    haystack = "It was the best of times. It was the worst of times! Was it? " * 200
    asked = Retrieval.parse(task)
    cases = list(asked.cases(tiny_tokenizer, 0, haystack))
    assert len(cases) == asked.count()
    for case in cases:
        context, question, lead, answer = texts(case, tiny_tokenizer)
        assert lead.endswith(" is") and answer == f" {case.text}" and len(case.text) == 5
        key = lead.removeprefix("Answer: The secret number of the ").removeprefix("Answer: The code of ")[: -len(" is")]
        assert context.count(sentence.format(key, case.text)) == 1 and key in question
        assert context.count("secret number of the") in (asked.keys, 0)
        place = context.index(sentence.format(key, case.text)) / len(context)
        assert abs(place - case.depth) < 0.25
        total = sum(len(part) for part in (case.context, case.question, case.lead, case.answer))
        assert asked.lengths[0] - 30 < total <= asked.lengths[0]


def test_cases_follow_the_seed(tiny_tokenizer):
    asked = Retrieval.parse("kv:length=200,depths=2,samples=2,digits=7")
    first, same, other = ([c.text for c in asked.cases(tiny_tokenizer, seed)] for seed in (0, 0, 1))
    assert first == same != other and len(set(first)) == 4 and all(len(text) == 7 for text in first)
    longer = next(Retrieval.parse("kv:length=200/300,depths=2,samples=2,digits=7").cases(tiny_tokenizer, 0))
    assert longer.text == first[0]


def test_protocols_split_where_the_question_stands(tiny_tokenizer):
    case = next(Retrieval.parse("niah:length=200,depths=1").cases(tiny_tokenizer))
    whole = torch.cat([case.context, case.question, case.lead])
    for aware in (False, True):
        assert torch.equal(torch.cat(case.parts(aware)), whole)
    assert len(case.parts(True)[0]) - len(case.parts(False)[0]) == len(case.question)
    assert case.depth == 0.5


def test_tokenizers_that_begin_with_bos_begin_with_it_once(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("secateur.evaluation.retrieval.start_token", lambda tokenizer: [0])
    case = next(Retrieval.parse("niah:length=200,depths=1").cases(tiny_tokenizer))
    assert case.context.tolist().count(0) == 1 and case.context[0] == 0


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("nih", "unknown retrieval task 'nih'; did you mean 'niah'"),
        ("kv:keys=2", "kv has no setting 'keys=2'"),
        ("niah:depths=0", "niah: depths must be a whole number of at least 1, got '0'"),
        ("niah:length=many", "niah: length must be a whole number"),
        ("niah:haystack=hay", "haystack must be one of noise, text, got 'hay'"),
        ("niah:keys=10000", "keys must be at most"),
    ],
)
def test_what_can_not_be_asked(task, message):
    with pytest.raises(UsageError, match=message):
        Retrieval.parse(task)


def test_lengths_and_texts_that_do_not_do(tiny_tokenizer):
    with pytest.raises(UsageError, match="a prompt of 64 tokens has no room"):
        list(Retrieval.parse("niah:length=64,keys=8").cases(tiny_tokenizer))
    with pytest.raises(UsageError, match="the text is too short to fill 1024 tokens"):
        list(Retrieval.parse("niah:haystack=text").cases(tiny_tokenizer, text="A short text."))
    with pytest.raises(UsageError, match="hides its needles in a text: give one"):
        list(Retrieval.parse("niah:haystack=text").cases(tiny_tokenizer))


class Output(dict):
    """Read as transformers' outputs are: by key and by attribute."""

    def __getattr__(self, name):
        return self[name]


class Copying(torch.nn.Module):
    """Writes what followed the longest run of tokens that ends the text, where it last stood."""

    device = torch.device("cpu")

    def __init__(self, vocabulary: int, seen: torch.Tensor) -> None:
        super().__init__()
        self.vocabulary, self.seen = vocabulary, seen.tolist()

    def forward(self, input_ids, use_cache, cache):
        logits = torch.zeros(1, input_ids.shape[1], self.vocabulary)
        for place, token in enumerate(input_ids[0].tolist()):
            cache.tokens.append(token)
            text = self.seen + cache.tokens
            for n in range(12, 0, -1):
                ends = [i for i in range(n, len(text) - 1) if text[i - n + 1 : i + 1] == text[-n:]]
                if ends and ends[-1] + 1 < len(text):
                    logits[0, place, text[ends[-1] + 1]] = 20.0
                    break
        return Output(logits=logits, cache=cache)


def test_answers_are_found_by_a_model_that_copies(tiny_tokenizer):
    case = next(Retrieval.parse("kv:length=300,depths=1").cases(tiny_tokenizer))
    cut = case.parts(False)[0]
    good = retrieved(
        Copying(len(tiny_tokenizer), cut), tiny_tokenizer, SimpleNamespace(tokens=[]), case, question_aware=False
    )
    assert good.found and case.text in good.written and good.log_likelihood > -0.01
    # the needle is gone
    bad = retrieved(
        Copying(len(tiny_tokenizer), cut[:20]), tiny_tokenizer, SimpleNamespace(tokens=[]), case, question_aware=False
    )
    assert not bad.found and bad.log_likelihood < -2


def test_losses_behind_a_cache_are_those_of_the_whole_text(tiny_llama):
    ids = torch.randint(2, 500, (40,), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=tiny_llama.config)
    with torch.no_grad():
        tiny_llama(ids[None, :30], cache=cache)
        expected = torch.nn.functional.cross_entropy(tiny_llama(ids[None]).logits[0, 30:-1], ids[31:], reduction="none")
    assert torch.allclose(continuation_losses(tiny_llama, cache, ids[30:]), expected, atol=1e-5)
    assert math.isfinite(float(expected.sum()))
