"""What many tests share: a tiny random Llama, a tiny tokenizer, their checkpoint, and a shell's view of a command."""

from __future__ import annotations

import multiprocessing.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tiers
from secateur import timing
from secateur.cli import main
from secateur.observe.calibration import builtin_text

# the same examples every time, and no verdict on the speed of a shared machine
settings.register_profile(
    "secateur",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("secateur")

torch.set_num_threads(1)

# A file runs as a whole on one worker, so the long ones start first and the short ones fill what is left at the end.
LONGEST = ("test_random_networks", "test_docs", "test_end_to_end", "test_ranks", "test_channel_methods", "test_sweep")


def pytest_configure() -> None:
    # made once per process and kept, and a socket's path may be 108 bytes long: not within the folder of some test
    multiprocessing.util.get_temp_dir()


COLLECTED = pytest.StashKey[list[pytest.Item]]()


@pytest.hookimpl(tryfirst=True)  # before -m leaves tests out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tiers.mark_slow(items)
    config.stash[COLLECTED] = list(items)
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture
def collected(pytestconfig: pytest.Config) -> list[pytest.Item]:
    """All tests that were found, those included that -m leaves out."""
    return pytestconfig.stash[COLLECTED]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protocols don't say what other processes did meanwhile, so that they are the same wherever tests run."""
    monkeypatch.setattr(timing, "ran_and_waited", lambda: (0, 0))


def build_tokenizer(vocab_size: int = 512, **arguments: object) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on part of the built-in text; ``<s>`` is token 0 and ``</s>`` token 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([builtin_text("calibration")[:60_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **arguments)


def build_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A random Llama: 2 layers, hidden 32, 4 query heads on 2 key-value heads, 64 FFN neurons, 512 tokens."""
    settings = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Shared by all tests: don't change it."""
    return build_tokenizer()


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A fresh model for every test, always with the same weights."""
    return build_llama()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """``build_tokenizer``, for tests that change what they get."""
    return build_tokenizer


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """``build_llama``, for tests that need several models or other sizes."""
    return build_llama


@dataclass(frozen=True)
class Run:
    """Exit code and the two streams of one command."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Run one command line in this process: ``cli("prune", folder, "--dry-run")``."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Run:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        streams = capsys.readouterr()
        return Run(int(stop.value.code or 0), streams.out, streams.err)

    return run


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measurements are kept in a folder of the session, in the processes that tests start too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECATEUR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, make_llama, tiny_tokenizer) -> Path:
    """The folder of a tiny random Llama with its tokenizer: read it, don't write to it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_llama(max_position_embeddings=1024).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
