"""A runner that sees what a shell sees, and a tiny checkpoint on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from secateur.cli import main


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
