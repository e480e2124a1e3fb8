"""Estimates of a model on the hub: its config is fetched, and nothing else."""

from pathlib import Path

import pytest

from secateur.errors import ModelLoadError
from secateur.estimate.outline import outline


def test_only_the_config_is_fetched(hub, tiny_checkpoint):
    hub.add("owner/tiny", tiny_checkpoint)
    sizes, files = outline("owner/tiny")
    assert files == [] and sizes.streamed
    assert sizes.stored == outline(tiny_checkpoint)[0].stored
    assert {Path(request.path).name for request in hub.requests if "/resolve/" in request.path} == {"config.json"}


def test_a_model_that_is_not_there_is_one_sentence(hub):
    with pytest.raises(ModelLoadError, match="there is no such model"):
        outline("owner/nothing")
