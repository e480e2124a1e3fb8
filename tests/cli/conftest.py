"""Plugins are forgotten after a test."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from secateur.methods import plugins, registry


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
