"""The guide to hub and cloud runs, against a hub on this machine and a store in memory."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import secateur as sc
from fake_hub import TOKEN, FakeHub
from secateur.models import loading
from test_docs import ROOT, blocks, command_lines, is_shell


class Bucket(MemoryFileSystem):
    protocol = "s3"
    store: dict = {}  # noqa: RUF012 - the class attribute of the class above, of its own

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("s3://", "memory://"))


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_the_guide(hub: FakeHub, tiny_checkpoint: Path, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = hub.add("Qwen/Qwen3-0.6B", tiny_checkpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "_builtin", lambda name: tiny_checkpoint)
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Bucket)
    names: dict[str, object] = {}
    run_lines = 0
    for block in blocks(ROOT / "docs" / "guides" / "hub-and-cloud.md"):
        if is_shell(block):
            for line in command_lines(block):
                run = cli(*shlex.split(line)[1:])
                assert run.code == 0, f"{line}: {run.err}"
                run_lines += 1
        else:
            exec(compile(block.text, block.language, "exec"), names)
    assert run_lines == 6
    assert {"you/qwen3-24", "you/qwen3-again"} < set(hub.repos)
    assert all(hub.repos[name].private for name in hub.repos if name.startswith("you/"))
    assert {path.split("/")[3] for path in Bucket.store} == {"flap", "half"}
    assert sc.Plan.load(tmp_path / "out" / "qwen3-half" / "plan").model.revision == sha
