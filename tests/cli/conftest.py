"""A runner that sees what a shell sees, and a tiny checkpoint on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from secateur.cli import main
from secateur.methods import plugins, registry


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


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, make_llama, tiny_tokenizer) -> Path:
    """The folder of a tiny random Llama with its tokenizer: read it, don't write to it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_llama(max_position_embeddings=1024).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def forget_plugins() -> Iterator[None]:
    """What a test registers and imports from outside is forgotten; methods of ours that it was first to load stay."""
    modules = set(sys.modules)
    plugins.installed_methods.cache_clear()
    yield
    plugins.installed_methods.cache_clear()
    for name, method in list(registry._registered.items()):
        if not method.__module__.startswith("secateur."):
            del registry._registered[name]
    for name in set(sys.modules) - modules:
        if name.startswith(("secateur_plugin_", "outsider_")):
            del sys.modules[name]
