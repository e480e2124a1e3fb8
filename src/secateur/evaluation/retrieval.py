"""Retrieval tasks that are made here, at any length: a fact is hidden at some depth of a long text, and asked for.

``niah`` hides sentences (needles) in a text that says nothing else: "The secret number of the amber otter is 48213."
With ``keys`` above 1 there are as many of them, of which one is asked for (RULER's single and multi-key needles).
``kv`` is a long list of keys and values, all of them alike, of which one is asked for (key-value retrieval).

A case is text in four parts, context, question, lead and answer; the lead is the beginning of the sentence that the
answer ends, as in RULER, so that a base model knows what is wanted. It is always read behind the compressed cache.
Question-agnostic, the context alone is compressed, and the question comes later; question-aware, the question is the
end of what is compressed. The order of methods differs a lot between the two.

Source: C.-P. Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", COLM 2024,
arXiv:2404.06654; N. F. Liu et al., "Lost in the Middle", TACL 2024, arXiv:2307.03172. Texts and words are our own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.errors import UsageError, nearest
from secateur.observe.calibration import start_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("niah", "kv")
HAYSTACKS = ("noise", "text")
_NOISE = (
    "The rain fell on the fields. The road went on between the hills. A door was open, and nobody came. "
    "The river was slow and brown. There were clouds in the west. Then it was evening, and the lamps were lit."
)
_ADJECTIVES = re.findall(
    r"\w+",
    """
    amber bitter brave calm clever cloudy crimson distant eager early faded gentle golden hidden hollow icy ivory
    jolly keen late little lonely loud lucky misty modest narrow noble odd olive pale patient proud quick quiet
    rapid rusty scarlet shy silent silver sleepy smooth solid stormy strange sunny sweet tall tender tiny velvet
    violet warm weary wild windy wise wooden young
    """,
)
_NOUNS = re.findall(
    r"\w+",
    """
    anchor apple arrow badger basket beacon bell bridge button candle canyon castle cedar clock comet compass copper
    cricket dolphin drum falcon feather fiddle forest fountain garden glacier hammer harbor hazel heron island
    kettle ladder lantern lemon lizard marble meadow mirror moth needle ocean orchard otter owl paddle parrot pebble
    pepper piano pillow pine planet pony raven ribbon rocket saddle sailor salmon shadow shepherd sparrow spider
    spoon station stone summit thimble thunder tiger tower turnip valley violin walnut wheel whistle willow window
    winter zebra
    """,
)


@dataclass(frozen=True)
class Case:
    """One question. All ids are [tokens] int64; ``depth`` is the fraction of the context before the needle."""

    task: str
    length: int
    depth: float
    context: Tensor
    question: Tensor
    lead: Tensor
    answer: Tensor
    text: str
    """the answer, as it must stand in what the model writes"""

    def parts(self, question_aware: bool) -> tuple[Tensor, Tensor]:
        """(what is compressed, what is read behind it before the answer)."""
        if question_aware:
            return torch.cat([self.context, self.question]), self.lead
        return self.context, torch.cat([self.question, self.lead])


@dataclass(frozen=True)
class Retrieval:
    """``niah:length=1024/4096,depths=5,keys=1,haystack=noise,digits=5,samples=1``, or ``kv`` without keys and haystack.

    ``length`` is that of the whole prompt with its answer, in tokens, one or several separated by slashes; ``depths``
    their number, evenly from the beginning to the end; ``samples`` cases are made of each.
    """

    kind: str = "niah"
    lengths: tuple[int, ...] = (1024,)
    depths: int = 5
    keys: int = 1
    haystack: str = "noise"
    digits: int = 5
    samples: int = 1

    @classmethod
    def parse(cls, text: str) -> Retrieval:
        """Raises UsageError for an unknown kind or setting, or a number out of range."""
        kind, _, rest = text.partition(":")
        if kind not in KINDS:
            raise UsageError(f"unknown retrieval task '{text}'{nearest(kind, KINDS)} (they are {', '.join(KINDS)})")
        known = ("length", "depths", "digits", "samples") + (("keys", "haystack") if kind == "niah" else ())
        found: dict[str, str] = {}
        for pair in filter(None, rest.split(",")):
            key, equals, value = (piece.strip() for piece in pair.partition("="))
            if key not in known or not equals:
                raise UsageError(
                    f"{kind} has no setting '{pair.strip()}'{nearest(key, known)} (it has {', '.join(known)})"
                )
            found[key] = value
        if found.get("haystack", "noise") not in HAYSTACKS:
            raise UsageError(f"{kind}: haystack must be one of {', '.join(HAYSTACKS)}, got '{found['haystack']}'")
        lengths = tuple(_whole(kind, "length", one, 64) for one in found.get("length", "1024").split("/"))
        numbers = {
            key: _whole(kind, key, found[key], 1) for key in ("depths", "keys", "digits", "samples") if key in found
        }
        if numbers.get("keys", 1) > len(_ADJECTIVES) * len(_NOUNS) // 4:
            raise UsageError(
                f"{kind}: keys must be at most {len(_ADJECTIVES) * len(_NOUNS) // 4}, got {numbers['keys']}"
            )
        return cls(kind, tuple(dict.fromkeys(lengths)), haystack=found.get("haystack", "noise"), **numbers)

    @property
    def name(self) -> str:
        """The kind, with what makes it harder."""
        harder = [f"keys={self.keys}"] if self.keys > 1 else []
        harder += [f"haystack={self.haystack}"] if self.haystack != "noise" else []
        return f"{self.kind}:{','.join(harder)}" if harder else self.kind

    def count(self) -> int:
        """How many cases there are."""
        return len(self.lengths) * self.depths * self.samples

    def cases(self, tokenizer: PreTrainedTokenizerBase, seed: int = 0, text: str | None = None) -> Iterator[Case]:
        """All cases, the same ones for the same seed. ``text`` is the haystack where that is asked for.

        Raises UsageError for a length that has no room for the needles, and for a text that is shorter.
        """
        if self.haystack == "text" and text is None:
            raise UsageError(f"{self.name} hides its needles in a text: give one")
        for length in self.lengths:
            for place in range(self.depths):
                depth = place / (self.depths - 1) if self.depths > 1 else 0.5
                for sample in range(self.samples):
                    generator = random.Random(f"{seed} {self.name} {length} {place} {sample}")
                    yield self._case(tokenizer, length, depth, self._maker(depth, generator, text))

    def _maker(self, depth: float, generator: random.Random, text: str | None) -> _Needles | _List:
        if self.kind == "kv":
            return _List(depth, self.digits, generator)
        hay = _sentences(text or "") if self.haystack == "text" else _sentences(_NOISE)
        return _Needles(depth, self.digits, generator, self.keys, hay, endless=self.haystack == "noise")

    def _case(self, tokenizer: PreTrainedTokenizerBase, length: int, depth: float, maker: _Needles | _List) -> Case:
        def parts(units: int) -> list[list[int]]:
            return _split_ids(tokenizer, maker.texts(units))

        def fits(units: int) -> bool:
            return units <= maker.most and sum(map(len, parts(units))) <= length

        low, high = maker.least, 2 * maker.least
        if not fits(low):
            raise UsageError(f"{self.name}: a prompt of {length} tokens has no room for what is hidden in it")
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        if low == maker.most:
            raise UsageError(f"{self.name}: the text is too short to fill {length} tokens; take a longer one")
        context, question, lead, answer = (torch.tensor(part, dtype=torch.int64) for part in parts(low))
        return Case(self.name, length, depth, context, question, lead, answer, maker.texts(low)[-1].strip())


class _List:
    """Context, question, lead and answer of a list of ``units`` keys, of which one at ``depth`` is asked for."""

    least, most = 2, 2**20

    def __init__(self, depth: float, digits: int, generator: random.Random) -> None:
        self._depth, self._digits, self._generator = depth, digits, generator
        self._codes: dict[str, str] = {}

    def texts(self, units: int) -> tuple[str, str, str, str]:
        # drawn as they are needed, so that a longer list begins with the shorter one
        while len(self._codes) < units:
            name = f"{_name(self._generator)} {self._generator.randrange(100, 1000)}"
            self._codes.setdefault(name, _number(self._generator, self._digits))
        codes = list(self._codes.items())[:units]
        key, code = codes[round(self._depth * (units - 1))]
        lines = "".join(f"The code of {name} is {number}.\n" for name, number in codes)
        return f"A list of names and their codes:\n{lines}", *_asked(f"code of {key}", code)


class _Needles:
    """The same of a text of ``units`` sentences; the needle that is asked for lies at ``depth``, others anywhere."""

    least = 1

    def __init__(
        self, depth: float, digits: int, generator: random.Random, keys: int, hay: Sequence[str], *, endless: bool
    ) -> None:
        self._hay = hay
        self.most = 2**20 if endless else len(hay)
        numbers: dict[str, str] = {}
        while len(numbers) < keys:
            numbers.setdefault(_name(generator), _number(generator, digits))
        self._needles = [f"The secret number of the {name} is {number}. " for name, number in numbers.items()]
        self._places = [depth, *(generator.random() for _ in range(keys - 1))]
        self._key, self._number = next(iter(numbers.items()))

    def texts(self, units: int) -> tuple[str, str, str, str]:
        hay = [self._hay[i % len(self._hay)] for i in range(units)]
        # from the end, so that a place counts the hay before it and nothing else
        for place, needle in sorted(zip(self._places, self._needles, strict=True), reverse=True):
            hay.insert(round(place * units), needle)
        context = f"Remember the secret numbers that are hidden in this text.\n{''.join(hay).strip()}\n"
        return context, *_asked(f"secret number of the {self._key}", self._number)


def _asked(what: str, answer: str) -> tuple[str, str, str]:
    return f"Question: What is the {what}?\n", f"Answer: The {what} is", f" {answer}"


def _name(generator: random.Random) -> str:
    return f"{generator.choice(_ADJECTIVES)} {generator.choice(_NOUNS)}"


def _number(generator: random.Random, digits: int) -> str:
    return str(generator.randrange(10 ** (digits - 1), 10**digits))


def _sentences(text: str) -> list[str]:
    """Sentences with a space behind each. Raises UsageError where there are none."""
    found = [f"{piece.strip()} " for piece in re.split(r"(?<=[.!?])\s+|\n+", text) if piece.strip()]
    if not found:
        raise UsageError("a text in which needles are hidden must hold sentences")
    return found


def _split_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of the texts joined, cut where each ends; a token across a border belongs to the later text."""
    ids, ends = [], [0]
    for count in range(1, len(texts) + 1):
        before, ids = ids, tokenizer("".join(texts[:count]), add_special_tokens=False, verbose=False)["input_ids"]
        if count > 1:
            ends.append(next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before)))
    ends.append(len(ids))
    parts = [ids[start:stop] for start, stop in pairwise(ends)]
    return [[*start_token(tokenizer), *parts[0]], *parts[1:]]


def _whole(kind: str, key: str, value: str, least: int) -> int:
    if not value.isdecimal() or int(value) < least:
        raise UsageError(f"{kind}: {key} must be a whole number of at least {least}, got {value!r}")
    return int(value)
