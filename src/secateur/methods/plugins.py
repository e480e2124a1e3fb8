"""Methods from outside the package: Python files and modules named by the user, and installed entry points.

A plugin is ordinary code that calls ``secateur.register``. An installed package announces its methods in its metadata,
one entry point per method, named like the method and pointing at the module that registers it:

    [project.entry-points."secateur.methods"]
    tide = "my_package.tide"
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import entry_points

from secateur.errors import UsageError
from secateur.usercode import file_module, import_file, import_module, is_file

PLUGIN = "plugin"
GROUP = "secateur.methods"


@cache
def installed_methods() -> dict[str, str]:
    """Method name → module, from the entry points of installed packages; nothing is imported."""
    return {point.name: point.module for point in entry_points(group=GROUP)}


def load_plugin(source: str) -> None:
    """Import a Python file (``./tide.py``) or module (``my_package.tide``) so that it registers its methods.

    A plugin that is loaded already is left alone. Raises UsageError when it is missing, fails, or registers nothing.
    """
    from secateur.methods.registry import list_methods

    name = file_module(source) if is_file(source) else source
    if name in sys.modules:
        return
    before = set(list_methods())
    (import_file if is_file(source) else import_module)(source, PLUGIN)
    if set(list_methods()) <= before and name not in installed_methods().values():
        raise UsageError(f"plugin {source} registers no method: decorate a Method with @secateur.register('name')")
