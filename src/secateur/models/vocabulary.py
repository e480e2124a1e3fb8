"""The vocabulary of a model: which tokens its configs name, and model and tokenizer without some of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from secateur.errors import PlanMismatchError, UnsupportedModelError
from secateur.observe.calibration import builtin_text
from secateur.plans import Plan
from secateur.structure.lexicon import VOCABULARY, Lexicon, cut_document, independent, read_lexicon

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# lists of tokens to keep from being written: one that has left can't be
_BANNED = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
_NAMED = ("_token_id", "_token_ids", "_token_index")

# characters of the text on which tokenizers are compared, beside a probe of what English lacks
_CHECKED = 20_000
_PROBE = "naïve café — 12,345.67 €\n\tif x != None:\r\n你好，世界 Ελληνικά русский 日本語 🚀 <s></s> \u0000\ufffd"


def lexicon_of(tokenizer: PreTrainedTokenizerBase | None, rows: int) -> Lexicon:
    """What is known of the tokens of a model with so many rows; without a tokenizer nothing but their number.

    Raises UnsupportedModelError for a tokenizer that can't be cut.
    """
    return independent(rows) if tokenizer is None else read_lexicon(_document(tokenizer), rows)


def named_tokens(model: PreTrainedModel) -> dict[int, str]:
    """The tokens that config and generation config name, with the entry that does."""
    rows = _rows(model)
    found: dict[int, str] = {}
    for holder in _configs(model):
        for key in _keys(holder, _NAMED):
            value = getattr(holder, key)
            found |= {i: key for i in ([value] if isinstance(value, int) else value) if 0 <= i < rows}
    return found


def renumber(model: PreTrainedModel, kept: Tensor) -> None:
    """Let configs and modules say what a model says whose rows are cut already; ``kept`` are ascending old ids.

    Raises PlanMismatchError when a token has left that a config names.
    """
    new = {old: i for i, old in enumerate(kept.tolist())}
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    rows = embedding.num_embeddings
    for holder in _configs(model):
        for key in _keys(holder, _NAMED):
            setattr(holder, key, _moved(getattr(holder, key), new, rows, key))
        for key in _keys(holder, _BANNED):
            setattr(holder, key, _left(getattr(holder, key), new))
    if head is not None and head.weight.shape[0] != len(kept):
        # a head that was tied still has the old table
        head.weight = embedding.weight
        head.out_features = len(kept)
    text = model.config.get_text_config()
    for holder in {id(c): c for c in (model.config, text)}.values():
        holder.vocab_size = len(kept)
    embedding.num_embeddings = len(kept)
    if embedding.padding_idx is not None:
        embedding.padding_idx = new[embedding.padding_idx % rows]
    for module in model.modules():
        held = vars(module)
        if isinstance(held.get("vocab_size"), int):
            module.vocab_size = len(kept)  # type: ignore[assignment]
        if module is not embedding and isinstance(held.get("padding_idx"), int):
            module.padding_idx = embedding.padding_idx  # type: ignore[assignment]


def fitted(tokenizer: PreTrainedTokenizerBase | None, plans: Sequence[Plan]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the model that ``plans`` cut one after the other; one that fits already comes back as it is.

    Raises what ``cut_tokenizer`` raises.
    """
    for plan in plans:
        tokenizer = fitted_to(tokenizer, plan.keep.get(VOCABULARY))
    return tokenizer


def fitted_to(tokenizer: PreTrainedTokenizerBase | None, kept: Tensor | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer with these tokens alone, unless it has no others; None keeps all."""
    if tokenizer is None or kept is None:
        return tokenizer
    # what no token has leaves first, so that a tokenizer which fits into fewer rows is that of the cut model
    return cut_tokenizer(tokenizer, kept) if _highest(tokenizer) >= len(kept) else tokenizer


def cut_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Tensor) -> PreTrainedTokenizerBase:
    """The tokenizer with the tokens ``kept`` alone, ascending ids, which become 0, 1, ...

    It is a plain ``PreTrainedTokenizerFast``. Both are held against each other on text.
    Raises UnsupportedModelError for a tokenizer that can't be cut, or that wouldn't read text as before.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    new = {old: i for i, old in enumerate(kept.tolist())}
    backend = Tokenizer.from_str(json.dumps(cut_document(_document(tokenizer), new)))
    dense: Any = tokenizer
    wanted = {token: new[i] for token, i in dense.get_vocab().items() if i in new}
    if backend.get_vocab() != wanted:
        token = next(iter(set(backend.get_vocab().items()) ^ set(wanted.items())))[0]
        raise UnsupportedModelError(f"the library tokenizers gives {token!r} another id when the vocabulary is cut")
    named = {name: token for name, token in dense.special_tokens_map.items() if isinstance(token, str)}
    extra = [token for token in getattr(dense, "extra_special_tokens", None) or () if token in wanted]
    shown = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "model_input_names")
    cut: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: token for name, token in named.items() if token in wanted},
        **{name: getattr(dense, name) for name in shown if getattr(dense, name, None) is not None},
        **({"extra_special_tokens": extra} if extra else {}),
    )
    cut.chat_template = dense.chat_template
    check_round_trip(tokenizer, cut, new)
    return cut


def check_round_trip(dense: PreTrainedTokenizerBase, cut: PreTrainedTokenizerBase, new: Mapping[int, int]) -> None:
    """Lines whose tokens all stay are read as before, and every line is written as before. UnsupportedModelError."""
    before: Any = dense
    after: Any = cut
    for line in (*builtin_text("evaluation")[:_CHECKED].splitlines(keepends=True), _PROBE):
        for special in (False, True):
            old = before(line, add_special_tokens=special)["input_ids"]
            ids = after(line, add_special_tokens=special)["input_ids"]
            same = [new[i] for i in old] == ids if all(i in new for i in old) else True
            written, wanted = after.decode(ids), before.decode(old)
            if wanted != line:
                # some decoders put spaces between tokens, of which there may be more now
                written, wanted = ("".join(text.split()) for text in (written, wanted))
            if not same or written != wanted:
                raise UnsupportedModelError(
                    f"without the tokens that leave, the tokenizer reads {line[:60]!r} in another way"
                )


def _document(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise UnsupportedModelError(
            f"a {type(tokenizer).__name__} can't be cut: secateur cuts vocabularies of fast tokenizers (tokenizer.json)"
        )
    return json.loads(backend.to_str())


def _highest(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values(), default=-1)


def _rows(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr,arg-type]


def _configs(model: PreTrainedModel) -> list[Any]:
    holders = (model.config, model.config.get_text_config(), getattr(model, "generation_config", None))
    return list({id(holder): holder for holder in holders if holder is not None}.values())


def _keys(holder: Any, names: tuple[str, ...]) -> Iterator[str]:
    for key in sorted(vars(holder)):
        if key.endswith(names) and not key.startswith("_") and isinstance(getattr(holder, key), int | list | tuple):
            yield key


def _moved(value: Any, new: Mapping[int, int], rows: int, key: str) -> Any:
    if not isinstance(value, int):
        return type(value)(_moved(one, new, rows, key) for one in value)
    # -1, or an id behind the last row, names no token
    if not 0 <= value < rows or value in new:
        return new.get(value, value)
    raise PlanMismatchError(f"the plan removes token {value}, which the model needs: its config names it as {key}")


def _left(value: Any, new: Mapping[int, int]) -> list[Any]:
    if all(isinstance(one, int) for one in value):
        return [new[one] for one in value if one in new]
    return [_left(one, new) for one in value if all(i in new for i in one)]
