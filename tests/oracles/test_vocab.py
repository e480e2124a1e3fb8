"""Oracles of vocab: what stays is read and predicted as before, whatever kind of tokenizer it is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import secateur as sc
from families import FAMILY_CONFIGS, make_tiny, tiny_ids
from runs import plan_for
from secateur.errors import (
    BudgetError,
    OptionError,
    PlanMismatchError,
    SecateurError,
    UnsupportedModelError,
    UsageError,
)
from secateur.methods import make_method
from secateur.models.saving import plain
from secateur.models.vocabulary import cut_tokenizer, lexicon_of
from secateur.observe.calibration import builtin_text
from secateur.structure.lexicon import VOCABULARY, Lexicon

WORDS = builtin_text("calibration")[:20_000].split("\n")
IDS = tiny_ids()


def wrapped(tokenizer: Tokenizer, **more) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **more)


def byte_level(**model) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return wrapped(tokenizer, chat_template="{{ messages }}", model_max_length=77)


def every_split() -> PreTrainedTokenizerFast:
    """As Gemma and Llama 2 have it: every way to put a token together is a merge, and bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(WORDS, trainer)
    state = json.loads(tokenizer.to_str())
    vocab = state["model"]["vocab"]
    splits = [(t, t[:i], t[i:]) for t in vocab for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    state["model"]["merges"] = [[a, b] for t, a, b in sorted(splits, key=lambda s: (vocab[s[0]], vocab[s[1]]))]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    state["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    made = Tokenizer.from_str(json.dumps(state))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_tokens([AddedToken(token, normalized=False) for token in ("<turn>", "▁▁")])
    return wrapped(made, unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    return wrapped(tokenizer, unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.post_processor = processors.BertProcessing(("</s>", 1), ("<s>", 0))
    return wrapped(tokenizer, unk_token="<unk>")


KINDS = {"byte-level": byte_level, "ignore-merges": lambda: byte_level(ignore_merges=True), "every split": every_split}
KINDS |= {"unigram": unigram, "wordpiece": wordpiece}


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    """A tokenizer, the one that a third of its tokens is cut from, and the kept ids."""
    dense = KINDS[request.param]()
    lexicon = lexicon_of(dense, len(dense))
    counts = torch.bincount(torch.tensor(dense("\n".join(WORDS[:100]))["input_ids"]), minlength=len(dense))
    gone = [token for token, _ in make_method("vocab").order(lexicon, counts.tolist())]
    left = torch.ones(len(dense), dtype=torch.bool)
    left[gone[: len(dense) // 8 if request.param == "every split" else len(dense) // 3]] = False
    kept = left.nonzero().flatten()
    return dense, cut_tokenizer(dense, kept), {old: new for new, old in enumerate(kept.tolist())}


@settings(max_examples=40)
@given(st.text(max_size=30) | st.lists(st.sampled_from(" ".join(WORDS).split())).map(" ".join))
def test_what_stays_is_read_as_before_and_all_text_is_written_as_before(pair, text):
    dense, cut, new = pair
    ids = dense(text)["input_ids"]
    if all(i in new for i in ids):
        assert cut(text)["input_ids"] == [new[i] for i in ids]
    written, wanted = cut.decode(cut(text)["input_ids"]), dense.decode(ids)
    assert written == wanted


def test_every_kept_token_is_still_reached(pair):
    dense, cut, new = pair
    text = dense.convert_ids_to_tokens(list(new))
    assert cut.convert_ids_to_tokens(list(range(len(new)))) == text
    alone = [i for i in new if dense(dense.decode([i]), add_special_tokens=False)["input_ids"] == [i]]
    assert len(alone) > 30
    for i in alone:
        assert cut(dense.decode([i]), add_special_tokens=False)["input_ids"] == [new[i]]


def test_a_pair_that_leaves_is_read_as_its_parts():
    state = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    state |= {"pre_tokenizer": None, "post_processor": None, "decoder": None}
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    state["model"] = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["b", "c"], ["ab", "c"]]}
    dense = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    lexicon = lexicon_of(dense, 8)
    assert lexicon.needs == {3: (0, 1), 4: (1, 2), 5: (3, 2)}
    assert lexicon.fixed == {0, 1, 2} and lexicon.unused == {6, 7}
    # rows without a token, then bc, which is read once, then abc, whose three readings go to ab and c
    order = list(make_method("vocab").order(lexicon, [9, 9, 9, 1, 1, 3, 0, 0]))
    assert order == [(7, 0), (6, 0), (4, 1), (5, 3), (3, 4)]
    newest = make_method("vocab", {"rule": "last"}).order(lexicon, [9, 9, 9, 1, 1, 3, 0, 0])
    assert [token for token, _ in newest] == [7, 6, 5, 4, 3]
    cut = cut_tokenizer(dense, torch.tensor([0, 1, 2, 3]))
    assert cut("abcbc")["input_ids"] == [3, 2, 1, 2]
    merges = json.loads(cut.backend_tokenizer.to_str())["model"]["merges"]
    assert merges == [["a", "b"]]


def test_the_merge_that_makes_a_token_is_found_among_all_that_could(sentence="low"):
    state = json.loads(every_split().backend_tokenizer.to_str())
    vocab = {"<unk>": 0, "l": 1, "o": 2, "w": 3, "ow": 4, "lo": 5, "low": 6}
    state["model"] |= {"vocab": vocab, "byte_fallback": False}
    state["model"]["merges"] = [["o", "w"], ["l", "o"], ["lo", "w"], ["l", "ow"]]
    state["added_tokens"] = []
    dense = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), unk_token="<unk>")
    lexicon = lexicon_of(dense, 7)
    # o and w come together first, so that lo is no part of low
    assert lexicon.needs[6] == (1, 4)
    assert cut_tokenizer(dense, torch.tensor([0, 1, 2, 3, 4, 6]))(sentence)["input_ids"] == [5]


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_logits_of_what_stays_are_the_same(family):
    model = make_tiny(family).double()
    plan = plan_for("vocab", model, IDS, sparsity=0.4, dtype=torch.float64)
    cut, kept = sc.apply(plan, model), plan.keep[VOCABULARY]
    new = torch.full((96,), -1)
    new[kept] = torch.arange(len(kept))
    rows = IDS[(new[IDS] >= 0).all(dim=1)]
    rows = rows if len(rows) else kept[3:11][None]
    with torch.no_grad():
        before, after = model(rows).logits, cut(new[rows]).logits
    # bit by bit but for how sums over fewer columns are split
    torch.testing.assert_close(after, before[..., kept], rtol=1e-12, atol=1e-12)
    mass = before.softmax(-1)[..., kept].sum(-1, keepdim=True)
    torch.testing.assert_close(after.log_softmax(-1), before.log_softmax(-1)[..., kept] - mass.log())
    head, embedding = cut.get_output_embeddings(), cut.get_input_embeddings()
    assert (head.weight is embedding.weight) == model.config.tie_word_embeddings
    assert cut.config.vocab_size == embedding.num_embeddings == head.out_features == len(kept)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(cut.config, name) == new[getattr(model.config, name)]
    assert plain(cut)
    masked = sc.apply(plan, model, mask=True)
    with torch.no_grad():
        torch.testing.assert_close(masked(rows).logits[..., kept], before[..., kept], rtol=1e-12, atol=1e-12)


def test_lists_of_tokens_in_the_configs_follow(tiny_llama, tiny_tokenizer):
    tiny_llama.config.eos_token_id = [1, 300]
    tiny_llama.generation_config.eos_token_id = [1, 300]
    tiny_llama.generation_config.bad_words_ids = [[400, 5], [5, 6]]
    result = sc.prune(
        tiny_llama, tiny_tokenizer, method="vocab", sparsity=0.4, samples=4, length=64, options={"protect": "5-6"}
    )
    kept = result.plan.keep[VOCABULARY].tolist()
    assert {1, 300, 5, 6} <= set(kept) and 400 not in kept
    assert result.model.config.eos_token_id == result.model.generation_config.eos_token_id == [1, kept.index(300)]
    assert result.model.generation_config.bad_words_ids == [[5, 6]]


def test_the_saved_folder_is_one_that_stock_transformers_loads(tiny_llama, make_tokenizer, tmp_path):
    from transformers import GenerationConfig

    tokenizer = make_tokenizer(chat_template="{{ messages }}")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tiny_llama.resize_token_embeddings(520)
    tiny_llama.generation_config.pad_token_id = 512
    plan = sc.plan(tiny_llama, tokenizer, method="vocab", options={"round_to": 64}, samples=8, length=64)
    assert len(plan.keep[VOCABULARY]) == 320
    cut = sc.apply(plan, tiny_llama)
    # whichever of the two tokenizers is given, the folder has that of the cut model
    folders = [
        sc.save(cut, given, tmp_path / name, plan=plan)
        for name, given in (("a", tokenizer), ("b", sc.apply(plan, tokenizer)))
    ]
    assert (folders[0] / "tokenizer.json").read_bytes() == (folders[1] / "tokenizer.json").read_bytes()
    loaded, again = AutoTokenizer.from_pretrained(folders[0]), sc.apply(plan, tokenizer)
    assert len(loaded) <= 320 and loaded.pad_token == "<pad>" and loaded.chat_template == "{{ messages }}"
    assert loaded(WORDS[0])["input_ids"] == again(WORDS[0])["input_ids"]
    assert loaded.decode(loaded(WORDS[0])["input_ids"]) == WORDS[0]
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    ids = torch.tensor(loaded(WORDS[3])["input_ids"])[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, cut(ids).logits)
    assert GenerationConfig.from_pretrained(folders[0]).pad_token_id == loaded.pad_token_id
    assert not (folders[0] / "modeling_secateur.py").exists()
    assert all(finding.ok for finding in sc.verify(folders[0]))
    tokenizer.save_pretrained(folders[0])
    (folders[0] / "manifest.json").unlink()
    assert "the tokenizer has ids up to 512" in str(sc.verify(folders[0]))


def test_tokens_that_are_not_read_leave_by_a_threshold(tiny_llama, tiny_tokenizer):
    tokens = {"samples": 8, "length": 64}
    plan = sc.plan(tiny_llama, tiny_tokenizer, method="vocab", options={"min_count": 1}, **tokens)
    read = tiny_tokenizer(builtin_text("calibration")[: 8 * 64 * 8])["input_ids"][: 8 * 64]
    assert set(read) <= set(plan.keep[VOCABULARY].tolist())
    assert 0.1 < 1 - len(plan.keep[VOCABULARY]) / 512 < 0.9
    assert "tokens leave" in plan.provenance[0].notes[0]


def test_perplexities_are_about_the_same_text(tiny_llama, tiny_tokenizer):
    """Where all tokens of the windows stay, a cut model that predicts evenly has the size of its vocabulary."""
    for parameter in tiny_llama.parameters():
        parameter.data.zero_()
    asked = {"length": 64, "windows": 4}
    few = sc.prune(tiny_llama, tiny_tokenizer, method="vocab", sparsity=0.1, samples=40, length=64)
    table = sc.evaluate(
        [tiny_llama, few.model], tiny_tokenizer, ["perplexity:builtin"], tokenizers={"pruned": few.tokenizer}, **asked
    )
    values = table["perplexity"].values
    # and the same when it stands alone
    alone = {"pruned": few.model}
    own = {"tokenizers": {"pruned": few.tokenizer}, **asked}
    again = sc.evaluate(alone, tiny_tokenizer, ["perplexity:builtin"], **own)
    assert again["perplexity"].values["pruned"] == values["pruned"]
    with pytest.raises(UsageError, match="give it as the first"):
        sc.evaluate(alone, tiny_tokenizer, ["perplexity:self"], **own)
    assert values["dense"] == pytest.approx(512)
    # some tokens are read as two: that costs log(461) once more each
    assert 461 <= values["pruned"] < 461**1.1
    parts = table["perplexity"].parts["pruned"]
    assert min(parts) == pytest.approx(math.log(461), rel=0.02)


def test_what_cannot_be_cut_is_refused(tiny_llama, tiny_tokenizer, tmp_path):
    tokens = {"method": "vocab", "samples": 4, "length": 32}
    with pytest.raises(BudgetError, match=r"can't remove 460 of 512 tokens: 258 are symbols"):
        sc.plan(tiny_llama, tiny_tokenizer, sparsity=0.9, **tokens)
    with pytest.raises(BudgetError, match="protect names token 600, the vocabulary ends at 511"):
        sc.plan(tiny_llama, tiny_tokenizer, options={"protect": "600"}, **tokens)
    with pytest.raises(OptionError, match="protect lists ids and ranges of ids"):
        make_method("vocab", {"protect": "7-3"})
    with pytest.raises(OptionError, match="min_count is about what is read"):
        make_method("vocab", {"rule": "last", "min_count": 2})
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")), unk_token="?"
    )
    with pytest.raises(UnsupportedModelError, match="of type WordLevel; a vocabulary can be cut for BPE, Unigram"):
        lexicon_of(words, 2)

    class Slow:
        """A tokenizer without a document."""

    with pytest.raises(UnsupportedModelError, match="secateur cuts vocabularies of fast tokenizers"):
        lexicon_of(Slow(), 2)  # type: ignore[arg-type]
    plan = sc.plan(tiny_llama, tiny_tokenizer, sparsity=0.4, **tokens)
    with pytest.raises(UsageError, match="the model embeds 308 tokens: give the model's own tokenizer"):
        sc.plan(sc.apply(plan, tiny_llama), tiny_tokenizer, method="wanda", samples=4, length=32)
    tiny_llama.config.eos_token_id = int(plan.removed(VOCABULARY)[0])
    with pytest.warns(UserWarning), pytest.raises(PlanMismatchError, match="its config names it as eos_token_id"):
        sc.apply(plan, _other(tiny_llama))


def _other(model):
    model.lm_head.weight.data += 1
    return model


def run(folder: Path, out: Path, **more):
    calibration = {"samples": 8, "length": 64}
    steps = [{"method": "vocab", "sparsity": 0.4}, {"method": "magnitude_sp", "sparsity": 0.3}]
    recipe = {"model": str(folder), "out": str(out), "calibration": calibration, "steps": steps, "dtype": "float32"}
    return sc.run(recipe, **more)


def test_a_streamed_run_gives_what_memory_gives_and_the_plan_gives_it_again(
    tiny_checkpoint, tmp_path, monkeypatch, cli
):
    out = tmp_path / "out"
    run(tiny_checkpoint, out)
    dense, tokenizer = sc.load(tiny_checkpoint)
    asked = {"samples": 8, "length": 64}
    first = sc.prune(dense, tokenizer, method="vocab", sparsity=0.4, **asked)
    second = sc.prune(first.model, first.tokenizer, method="magnitude_sp", sparsity=0.3, **asked)
    cut, own = sc.load(out)
    assert own.get_vocab() == second.tokenizer.get_vocab() and len(own) == 308
    for name, tensor in second.model.state_dict().items():
        assert torch.equal(cut.state_dict()[name], tensor), name
    assert cut.config.eos_token_id == second.model.config.eos_token_id
    assert all(finding.ok for finding in sc.verify(out, tiny_checkpoint))
    again = tmp_path / "again"
    assert cli("plan", "apply", out, tiny_checkpoint, "--out", again).code == 0
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes(), name


def test_other_runtimes_get_the_vocabulary_that_is_left(tiny_checkpoint, tmp_path):
    gguf = pytest.importorskip("gguf")
    out = tmp_path / "out"
    recipe = {"model": str(tiny_checkpoint), "out": str(out), "calibration": {"samples": 8, "length": 64}}
    sc.run({**recipe, "steps": [{"method": "vocab", "sparsity": 0.4}]})
    sc.convert(out, tmp_path / "cut.gguf", to="gguf")
    reader = gguf.GGUFReader(tmp_path / "cut.gguf")
    _, tokenizer = sc.load(out)
    field = reader.fields["tokenizer.ggml.tokens"]
    tokens = [bytes(field.parts[i]).decode() for i in field.data]
    assert tokens == tokenizer.convert_ids_to_tokens(range(308))
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    assert list(embedding.shape) == [32, 308]


def test_a_teacher_with_all_tokens_needs_the_plan_that_took_some(tiny_llama, tiny_tokenizer):
    made = sc.prune(
        tiny_llama, tiny_tokenizer, method="vocab", sparsity=0.4, heal="lora:steps=1,loss=kl", samples=4, length=32
    )
    assert made.report.recoveries[0]["options"]["loss"] == "kl"
    with pytest.raises(SecateurError, match="their predictions can't be compared"):
        sc.heal(made.model, made.tokenizer, teacher=tiny_llama, steps=1, options={"batch": 1, "length": 32})


def test_training_reads_what_is_left(tiny_llama, tiny_tokenizer):
    made = sc.prune(tiny_llama, tiny_tokenizer, method="vocab", sparsity=0.4, samples=4, length=32)
    healed = sc.heal(
        made.model, tiny_tokenizer, plan=made.plan, steps=1, options={"batch": 1, "length": 32, "train": "norms"}
    )
    assert healed.model.config.vocab_size == 308 and healed.plans[0].provenance[0].recoveries


def test_an_unknown_vocabulary_loses_whatever_is_read_least():
    order = make_method("vocab").order(Lexicon(5, {}, frozenset({2})), [3, 1, 0, 1, 0])
    assert [token for token, _ in order] == [4, 3, 1, 0]
