"""The public surface is small and pinned: adding or removing a name is a decision, not an accident."""

import importlib.resources
import pkgutil
import subprocess
import sys

import pytest

import secateur as sc

EXPORTED = [
    "Plan",
    "Result",
    "SecateurError",
    "Sparsifier",
    "__version__",
    "anatomy",
    "apply",
    "compare",
    "compare_caches",
    "compress_cache",
    "compressed_cache",
    "convert",
    "densities",
    "describe",
    "evaluate",
    "heal",
    "instability",
    "list_methods",
    "load",
    "load_cache",
    "lottery",
    "plan",
    "pq_index",
    "prune",
    "push",
    "recommend_cache",
    "register",
    "rule",
    "run",
    "save",
    "verify",
]


def test_exported_names() -> None:
    assert sorted(sc.__all__) == EXPORTED
    assert dir(sc) == EXPORTED


@pytest.mark.parametrize("name", EXPORTED)
def test_every_exported_name_resolves(name: str) -> None:
    assert getattr(sc, name) is not None


def test_exported_functions_and_classes_say_what_they_do() -> None:
    undocumented = [n for n in EXPORTED if n != "__version__" and not (getattr(sc, n).__doc__ or "").strip()]
    assert undocumented == []


def test_no_exported_name_is_a_sub_package() -> None:
    # importing secateur.x binds the name x on the package, which would hide a function of that name
    modules = {module.name for module in pkgutil.iter_modules(sc.__path__)}
    assert modules & set(EXPORTED) == set()


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'prun'"):
        _ = sc.prun  # type: ignore[attr-defined]


def test_import_is_light() -> None:
    code = "import sys, secateur; print([m for m in ('torch', 'transformers', 'rich', 'numpy') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_listing_methods_does_not_load_transformers() -> None:
    code = "import sys, secateur; secateur.list_methods(); print('transformers' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "False"


def test_the_package_names_its_types_for_checkers() -> None:
    root = importlib.resources.files("secateur")
    assert (root / "py.typed").is_file()
