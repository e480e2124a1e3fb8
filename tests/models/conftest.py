"""The hub that tests of downloads and uploads talk to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_hub import FakeHub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub that huggingface_hub of this process talks to, an empty cache, and no token."""
    server = FakeHub()
    constants = "huggingface_hub.constants."
    monkeypatch.setattr(constants + "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants + "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants + "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants + "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
    # the fake hub speaks the older protocol for large files, which huggingface_hub keeps for such hubs
    monkeypatch.setattr(constants + "HF_HUB_DISABLE_XET", True)
    # a real chunk is larger than these models
    monkeypatch.setattr(constants + "DOWNLOAD_CHUNK_SIZE", 8192)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.close()
