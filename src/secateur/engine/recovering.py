"""Recovery training of a decoder: its text, its masks, its teacher, and what a plan and a report say about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.errors import DataError, NonFiniteError, UsageError
from secateur.evaluation.perplexity import window_losses
from secateur.healing.recovery import Curve, RecoveryOptions
from secateur.healing.recovery.capacity import ranks_by_module
from secateur.healing.recovery.precision import settled
from secateur.healing.recovery.states import FinalStates
from secateur.healing.recovery.trainer import Windows, recover
from secateur.loop import Forgetful, Keeper
from secateur.models.decoders import decoder_blocks, is_linear
from secateur.models.fingerprint import display_name
from secateur.models.layout import rotated_parts
from secateur.models.surgery import with_tokens
from secateur.models.vocabulary import fitted
from secateur.observe.calibration import Tokens, load_tokens
from secateur.plans import Plan
from secateur.provenance import Recovery
from secateur.ranks import ALONE, Ranks
from secateur.structure.lexicon import VOCABULARY
from secateur.train.masks import masks_left, zeros_left

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]

# 4-bit formats have up to an eighth of their own
_MANY_ZEROS = 0.2


@dataclass(frozen=True)
class Teacher:
    """The dense model that a student is compared with, and its tokenizer where it has one.

    ``states`` remember what it made of batches of ids, for further students.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    states: FinalStates | None = None


@dataclass(frozen=True)
class Recovered:
    """What training did: ``record`` for the plan, ``curve`` for the report."""

    record: Recovery
    curve: Curve

    def on(self, plans: Sequence[Plan]) -> list[Plan]:
        """The plans of a model that was cut by them and then trained: the last one says so."""
        return [*plans[:-1], plans[-1].recovered(self.record)] if plans else []

    def section(self) -> dict[str, Any]:
        """What a report holds: the record with the curve."""
        curve = self.curve
        numbers = asdict(curve)
        numbers["teacher_perplexity"] = numbers.pop("teacher")
        return {**self.record.model_dump(mode="json"), **numbers, "steps": curve.steps, "closed": curve.closed}


def recover_decoder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    options: RecoveryOptions,
    *,
    plans: Sequence[Plan] = (),
    teacher: Teacher | None = None,
    source: str = "builtin",
    text_field: str | None = None,
    keeper: Keeper | None = None,
    ranks: Ranks = ALONE,
    progress: Progress = lambda stage, done, total: None,
) -> Recovered:
    """Train ``model``, which ``plans`` have cut, in place and in float32; it keeps its dtype.

    ``source`` is the text where the options name none. The last windows of the text are held out and measured.
    Raises UsageError, DataError, PlanMismatchError, NonFiniteError, MissingExtraError, and what ``keeper`` raises.
    """
    terms = options.terms(teacher is not None)
    teacher = None if teacher is None else narrowed(teacher, plans)
    compared = {"kl", "hidden"} & set(terms)
    if teacher is not None and compared:
        check_teacher(teacher, model, tokenizer, hidden="hidden" in terms)
    stored = {name: tensor.dtype for name, tensor in _tensors(model)}
    writer: Any = teacher.model if teacher is not None else model
    text = ranks.on_main(lambda: _text(options, source, tokenizer, text_field, writer))
    keeping = keeper or Forgetful()
    ranks.on_main(lambda: keeping.reads(text.info.sha256))
    # it may be a matter of timing, so one rank decides, and the first sitting
    dtype = ranks.on_main(lambda: keeping.settles("dtype", settled(options, model.device).dtype))
    options = replace(options, dtype=dtype)
    windows = _split(text, options)
    model.float()

    def measure(one: Any) -> float:
        return perplexity(one, windows.held_out)

    masks = masks_left(plans, model, keep_zeros=options.keep_zeros)
    zeros = 0.0 if masks else zeros_left(model)
    name, blocks = decoder_blocks(model)
    modules = [f"{name}.{path}" for path, module in blocks.named_modules() if is_linear(module)]
    curve = recover(
        model,
        windows,
        options,
        teacher=teacher.model if teacher is not None and compared else None,
        states=teacher.states if teacher is not None else None,
        layers=layers_left(plans, teacher.model if teacher is not None else model, len(blocks)),
        modules=modules,
        masks=masks,
        lora_ranks=ranks_of(plans, options, name, modules),
        keeper=keeping,
        measure=measure,
        ranks=ranks,
        pieces=lambda one: decoder_blocks(one)[1],
        progress=progress,
    )
    if _cast_back(model, stored):
        # what is measured last is what will be saved
        curve.measured[-1] = (curve.steps, ranks.on_main(lambda: measure(model)))
    if teacher is not None:
        dense = teacher.model
        curve.teacher = ranks.on_main(lambda: perplexity(dense, windows.held_out))
    record = Recovery(
        train=options.train,
        options=_said(replace(options, held_out=len(windows.held_out)), terms),
        data=text.info,
        teacher=display_name(teacher.model) if teacher is not None else "",
        tokens=curve.tokens,
        before=curve.measured[0][1],
        after=curve.measured[-1][1],
        notes=(_trained_away(zeros),) if zeros >= _MANY_ZEROS else (),
    )
    return Recovered(record, curve)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _cast_back(model: PreTrainedModel, stored: Mapping[str, torch.dtype]) -> bool:
    """Give every tensor the dtype that it had; returns whether any has had another."""
    changed = [(tensor, stored[name]) for name, tensor in _tensors(model) if tensor.dtype != stored[name]]
    for tensor, dtype in changed:
        # one by one: a cast of the model rounds rotary frequencies too, which are float32 beside weights of any dtype
        tensor.data = tensor.data.to(dtype)
    return bool(changed)


def _trained_away(zeros: float) -> str:
    return (
        f"{zeros:.0%} of the linear weights of the blocks were zero before training and no plan of this folder masks"
        " them, so they were trained as the others; with keep_zeros=true they stay zero"
    )


def perplexity(model: Any, ids_NT: Tensor) -> float:
    """Of windows [windows, length] int64. Raises NonFiniteError when the loss is NaN or the perplexity too large."""
    loss = float(window_losses(model, ids_NT).mean())
    if not loss < 700:
        raise NonFiniteError(f"the loss on the held-out text is {loss:g}")
    return math.exp(loss)


def narrowed(teacher: Teacher, plans: Sequence[Plan]) -> Teacher:
    """The dense model with the tokens that ``plans`` have left, so that both predict the same ones; it stays whole.

    A teacher of another vocabulary than that which the first of them cut comes back as it is.
    """
    cuts = [plan for plan in plans if VOCABULARY in plan.keep]
    embedding: Any = teacher.model.get_input_embeddings()
    if not cuts or len(embedding.weight) != cuts[0].groups[VOCABULARY]:
        return teacher
    kept = cuts[0].keep[VOCABULARY]
    for plan in cuts[1:]:
        kept = kept[plan.keep[VOCABULARY]]
    return Teacher(with_tokens(teacher.model, kept), fitted(teacher.tokenizer, cuts))


def check_teacher(
    teacher: Teacher, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, hidden: bool
) -> None:
    """Refuse a teacher whose predictions or hidden states are about other things than the student's. UsageError."""
    theirs, mine = (m.config.get_text_config() for m in (teacher.model, student))
    name = display_name(teacher.model)
    if theirs.vocab_size != mine.vocab_size:
        raise UsageError(
            f"the teacher {name} has a vocabulary of {theirs.vocab_size:,} tokens and the model one of"
            f" {mine.vocab_size:,}: their predictions can't be compared; give the model that was pruned"
        )
    if (
        teacher.tokenizer is not None
        and tokenizer is not None
        and teacher.tokenizer.get_vocab() != tokenizer.get_vocab()
    ):
        raise UsageError(f"the teacher {name} has another vocabulary than the model: give the model that was pruned")
    if hidden and rotated_parts(student) is not None:
        raise UsageError(
            f"the hidden states of the model are in other bases than those of the teacher {name}: leave hidden out of"
            " the loss"
        )
    if hidden and theirs.hidden_size != mine.hidden_size:
        raise UsageError(
            f"the hidden states of the teacher {name} have {theirs.hidden_size} entries and the model's"
            f" {mine.hidden_size}: leave hidden out of the loss"
        )


def ranks_of(
    plans: Sequence[Plan], options: RecoveryOptions, blocks: str, modules: Sequence[str]
) -> dict[str, int] | None:
    """Ranks of adapters by module, where the options ask for ranks that differ. Raises UsageError."""
    if options.train != "lora" or options.ranks == "uniform":
        return None
    allocations = [p.allocation for plan in plans for p in plan.provenance if p.allocation is not None]
    shares = allocations[-1].sparsities if allocations else {}
    return ranks_by_module(shares, blocks, modules, options.rank)


def layers_left(plans: Sequence[Plan], dense: PreTrainedModel, left: int) -> list[int]:
    """The blocks of ``dense`` that the ``left`` blocks of a model came from, as its plans say.

    Without plans that explain the difference they are spread evenly, the last on the last.
    """
    layers = list(range(len(decoder_blocks(dense)[1])))
    for plan in plans:
        if "layers" in plan.keep and plan.groups["layers"] == len(layers):
            layers = [layers[kept] for kept in plan.keep["layers"].tolist()]
    if len(layers) != left:
        layers = [layers[max(0, round((place + 1) * len(layers) / left) - 1)] for place in range(left)]
    return layers


def _text(
    options: RecoveryOptions,
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    text_field: str | None,
    writer: PreTrainedModel | None,
) -> Tokens:
    return load_tokens(
        options.data or source,
        tokenizer,
        samples=options.whole * options.batch + options.held_out,
        length=options.length,
        seed=options.seed,
        text_field=text_field,
        model=writer,
        allow_fewer=True,
    )


def check_text(
    options: RecoveryOptions, source: str, tokenizer: PreTrainedTokenizerBase | None, text_field: str | None
) -> None:
    """Read the text of a later training, unless a model is to write it. Raises DataError and UsageError."""
    if (options.data or source) != "self":
        _split(_text(options, source, tokenizer, text_field, None), options)


def _split(text: Tokens, options: RecoveryOptions) -> Windows:
    """The last windows of a text are held out: as many as are asked for, and at most a fifth of a short text."""
    count = len(text.ids)
    if count < 2:
        raise DataError(
            f"{text.info.source} gives one window of {options.length} tokens, and one more has to be held out:"
            " use a longer text, or a smaller --length"
        )
    held = min(options.held_out, max(1, count // 5))
    return Windows(text.ids[:-held], text.ids[-held:])


def _said(options: RecoveryOptions, terms: dict[str, float]) -> dict[str, Any]:
    """The options as they counted, without those that the record has in other places."""
    loss = "+".join(name if weight == 1 else f"{name}*{weight:g}" for name, weight in terms.items())
    said = asdict(replace(options, loss=loss, lr=options.peak_rate))
    return {key: value for key, value in said.items() if key not in ("train", "data")}
