"""How a cut model is trained: the options, and the text in which they are given with ``heal``.

    lora                            with all defaults
    norms:steps=100,lr=1e-3         with some options
    refit+lora:loss=kl+hidden*0.1   after a repair without training

Defaults of the adapters (rank 8, alpha 16, dropout 0.05, all matrices of the blocks) are those of LLM-Pruner and
LoRAPrune (arXiv:2305.11627, arXiv:2305.18403); norms and biases alone are PERP's (arXiv:2312.15230). Steps and batch
are so few that two cores bear them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.errors import OptionError, UsageError, nearest
from secateur.options import check_options, option, option_values

KINDS = ("lora", "full", "norms")
TERMS = ("ce", "kl", "hidden")
# peak learning rates where none is given; what is trained alone may move further than everything at once
RATES = {"lora": 1e-3, "full": 1e-4, "norms": 1e-3}

_TRAINING = re.compile(rf"(?:^|\+)({'|'.join(KINDS)})(?::(.*))?$")
_TERM = re.compile(r"(\w+)(?:\*([0-9.eE+-]+))?")


@dataclass(frozen=True, kw_only=True)
class RecoveryOptions:
    """Options of recovery training. Raises OptionError for one that is out of range."""

    train: str = option("lora", "what is trained: adapters, everything, or norms and biases alone", choices=KINDS)
    steps: int = option(300, "steps of the optimiser", unit="steps", ge=1)
    batch: int = option(4, "windows of a step, of all ranks together", unit="windows", ge=1)
    micro: int = option(0, "windows of one forward, whose gradients add up; 0: all of a step", unit="windows", ge=0)
    length: int = option(256, "tokens of a window", unit="tokens", ge=2)
    loss: str = option(
        "", "ce, kl and hidden, joined by + and weighted by *: kl+hidden*0.1 (default: kl with a teacher)"
    )
    temperature: float = option(1.0, "temperature of the logits that kl compares", gt=0)
    lr: float = option(0.0, "peak learning rate; 0: 1e-3 for lora and norms, 1e-4 for full", ge=0)
    warmup: float = option(0.1, "fraction of the steps in which the learning rate rises", ge=0, le=1)
    schedule: str = option(
        "cosine", "behind the warm-up: half a cosine, or (wsd) constant and a linear fall", choices=("cosine", "wsd")
    )
    cooldown: float = option(0.1, "fraction of the steps in which a wsd falls", ge=0, le=1)
    floor: float = option(0.0, "what the learning rate falls to, as a fraction of the peak", ge=0, le=1)
    done: int = option(0, "steps of the same training that earlier stages have done", unit="steps", ge=0)
    total: int = option(0, "steps of all stages together; 0: there is one", unit="steps", ge=0)
    decay: float = option(0.0, "weight decay of AdamW", ge=0)
    clip: float = option(1.0, "largest norm of the gradients of a step; 0: any", ge=0)
    rank: int = option(8, "rank of the adapters", ge=1)
    ranks: str = option(
        "uniform",
        "the same rank everywhere, or (importance) ranks that follow what an allocator let every block keep (IG-LoRA)",
        choices=("uniform", "importance"),
    )
    alpha: float = option(16.0, "adapters count alpha / rank times", gt=0)
    dropout: float = option(0.05, "fraction of an adapter's inputs that is left out", ge=0, lt=1)
    targets: str = option("", "modules that get adapters, joined by +: q_proj+v_proj (default: all of the blocks)")
    dtype: str = option(
        "auto",
        "dtype of the forwards, weights stay as they are; auto: bfloat16 where the device multiplies it faster, on a"
        " processor in steps of 512 tokens or more",
        choices=("auto", "float32", "bfloat16"),
    )
    checkpointing: bool = option(False, "compute activations again for the gradients instead of keeping them")
    fsdp: bool = option(
        False, "share weights, gradients and the optimiser's state among the ranks (FSDP2), if there are several"
    )
    data: str = option("", "text to train on: builtin, self, a file or a data set (default: the calibration text)")
    held_out: int = option(16, "last windows of the text, which are measured and not trained on", unit="windows", ge=1)
    measure: int = option(0, "steps from one measurement to the next; 0: a tenth of all", unit="steps", ge=0)
    keep_zeros: bool = option(False, "let every weight that is zero stay zero, also where no plan masks it")
    seed: int = option(0, "seed of adapters, dropout and the order of the windows", ge=0)

    def __post_init__(self) -> None:
        check_options(self, "heal")
        if self.loss:
            _terms(self.loss)
        if self.done + self.steps > self.whole:
            raise OptionError(f"heal: {self.done} steps done and {self.steps} more exceed a total of {self.total}")

    @property
    def whole(self) -> int:
        """Steps of the training that these are part of, or all of."""
        return self.total or self.done + self.steps

    @property
    def peak_rate(self) -> float:
        """The learning rate at the end of the warm-up."""
        return self.lr or RATES[self.train]

    @property
    def measured_every(self) -> int:
        """Steps between two measurements of the held-out text."""
        return self.measure or max(1, self.steps // 10)

    def terms(self, teacher: bool) -> dict[str, float]:
        """The weight of every term of the loss; ``teacher`` says whether there is one. Raises UsageError."""
        found = _terms(self.loss) if self.loss else {"kl" if teacher else "ce": 1.0}
        for name in ("kl", "hidden"):
            if name in found and not teacher:
                raise UsageError(f"the loss {name} compares with a dense model: name it with --teacher (teacher=)")
        return found


def _terms(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in text.split("+"):
        match = _TERM.fullmatch(part.strip())
        name = match[1] if match else part.strip()
        if match is None or name not in TERMS or name in found:
            raise OptionError(
                f"heal: loss joins {', '.join(TERMS)} by +, each once and with a weight behind * where it isn't 1,"
                f" got '{text}'{nearest(name, TERMS)}"
            )
        try:
            found[name] = float(match[2]) if match[2] else 1.0
        except ValueError:
            raise OptionError(f"heal: the weight of {name} must be a number, got '{match[2]}'") from None
        if not found[name] > 0:
            raise OptionError(f"heal: the weight of {name} must be above 0, got '{match[2]}'")
    return found


def make_recovery(options: Mapping[str, Any]) -> RecoveryOptions:
    """Options from values or from their texts. Raises OptionError."""
    return RecoveryOptions(**option_values("heal", RecoveryOptions, options, "'secateur heal --help' lists them"))


def parse_recovery(text: str) -> RecoveryOptions:
    """``lora`` or ``lora:steps=300,rank=8``. Raises UsageError and OptionError."""
    before, recovery = split_heal(text)
    if recovery is None or before is not None:
        raise UsageError(f"training is one of {', '.join(KINDS)}, with options behind a colon, got '{text}'")
    return recovery


def with_training(text: str, common: str | None) -> str:
    """The ``heal`` text of one method, with the training that is ``common`` to all where it has none of its own.

    ``none`` wants none. Raises UsageError and OptionError.
    """
    repair, training = split_heal(common)
    if common is None or training is None or text == "none" or split_heal(text)[1] is not None:
        return text
    return f"{text}+{common[len(repair) + 1 :] if repair else common}"


def stages_of(text: str, fractions: Sequence[float]) -> list[str]:
    """A ``heal`` text for every stage of a training, which has these fractions of its steps; alike without a training.

    Raises UsageError when a stage would have no step.
    """
    repair, training = split_heal(text)
    if training is None:
        return [text] * len(fractions)
    ends = [round(training.steps * sum(fractions[: stage + 1])) for stage in range(len(fractions))]
    found, done = [], 0
    own = text[len(repair) + 1 :] if repair else text
    kept = [pair for pair in own.partition(":")[2].split(",") if pair and pair.partition("=")[0].strip() != "steps"]
    for end in ends:
        if end <= done:
            raise UsageError(f"{training.steps} steps of training are too few for {len(fractions)} stages: give more")
        pairs = [*kept, f"steps={end - done}", f"done={done}", f"total={training.steps}"]
        found.append(f"{repair + '+' if repair else ''}{training.train}:{','.join(pairs)}")
        done = end
    return found


def split_heal(text: str | None, seed: int = 0) -> tuple[str | None, RecoveryOptions | None]:
    """(repair without training, training) of a ``heal`` text; None for what isn't asked for.

    ``seed`` is that of the training where the text has none. Raises UsageError and OptionError.
    """
    if text is None:
        return None, None
    match = _TRAINING.search(text)
    if match is None:
        if ":" in text or "+" in text:
            word = text.partition(":")[0].rpartition("+")[2]
            raise UsageError(
                f"heal takes a repair, a training, or one + the other, as in refit+lora:steps=300;"
                f" '{text}' names no training{nearest(word, KINDS) or '; there are ' + ', '.join(KINDS)}"
            )
        return text, None
    options: dict[str, str] = {}
    for pair in match[2].split(",") if match[2] is not None else ():
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        if not key or not equals or key in options or key == "train":
            raise UsageError(f"training is NAME or NAME:KEY=VALUE,KEY=VALUE, each key once, got '{match[0]}'")
        options[key] = value
    return text[: match.start()] or None, make_recovery({"train": match[1], "seed": seed, **options})
