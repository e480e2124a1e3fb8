"""Imports point one way: the rooms and the edges between them are written down here, once."""

import ast
from pathlib import Path

import pytest

import secateur

SOURCE = Path(secateur.__file__).parent

# From the top down: a room may import the rooms below it that its line names, whether at the top of a file or
# inside a function. Imports for type checkers only are no dependencies.
BASE = {"errors", "files", "remote", "reading", "manifest", "tensorfiles", "progress", "versions", "ranks", "ahead"}
BASE |= {"usercode", "timing", "kinds", "latencytable", "options", "rowmasks", "journal", "finite", "memory", "pieces"}
BASE |= {"drawing", "provenance", ""}
ALLOWED: dict[str, set[str]] = {
    "__main__": {"cli"},
    "cli": {
        "trainer",
        "cache",
        "estimate",
        "networks",
        "rounds",
        "runs",
        "comparison",
        "cachestudy",
        "sweep",
        "recipes",
        "api",
        "engine",
        "allocators",
        "methods",
        "models",
        "runtimes",
        "evaluation",
        "report",
        "observe",
        "structure",
        "plans",
    },
    "trainer": {
        "rounds",
        "sweep",
        "runs",
        "recipes",
        "train",
        "networks",
        "methods",
        "models",
        "evaluation",
        "healing",
        "report",
        "loop",
        "observe",
        "plans",
    },
    "comparison": {"sweep", "recipes", "methods", "evaluation", "healing", "report", "structure", "plans"},
    "estimate": {
        "recipes",
        "healing",
        "allocators",
        "methods",
        "models",
        "allocate",
        "observe",
        "search",
        "solver",
        "report",
        "structure",
    },
    "runs": {
        "recipes",
        "healing",
        "loop",
        "engine",
        "allocators",
        "methods",
        "models",
        "observe",
        "report",
        "structure",
        "plans",
    },
    "sweep": {
        "estimate",
        "recipes",
        "api",
        "engine",
        "methods",
        "models",
        "evaluation",
        "observe",
        "healing",
        "report",
        "plans",
    },
    "recipes": {"api", "allocators", "methods", "allocate", "healing", "report", "plans"},
    "engine": {
        "evaluation",
        "train",
        "loop",
        "allocators",
        "methods",
        "models",
        "report",
        "criteria",
        "allocate",
        "observe",
        "healing",
        "search",
        "structure",
        "plans",
    },
    "cachestudy": {"cache", "methods", "evaluation", "models", "observe", "report"},
    "cache": {"methods", "models", "observe", "report"},
    "rounds": {"train", "methods", "report", "criteria", "allocate", "structure", "plans"},
    "networks": {"methods", "report", "allocate", "observe", "healing", "structure", "plans"},
    "train": {"networks", "methods", "models", "criteria", "allocate", "observe", "structure", "plans"},
    "api": {
        "engine",
        "healing",
        "allocators",
        "networks",
        "methods",
        "allocate",
        "models",
        "runtimes",
        "evaluation",
        "verification",
        "report",
        "observe",
        "structure",
        "plans",
    },
    "evaluation": {"models", "observe", "report", "structure", "plans"},
    "verification": {"models", "structure", "plans"},
    "runtimes": {"models"},
    "models": {"observe", "report", "structure", "plans"},
    "allocators": {"methods", "criteria", "allocate", "observe", "search", "structure", "plans"},
    "methods": {"criteria", "allocate", "observe", "healing", "search", "solver", "structure", "plans"},
    "criteria": {"observe", "structure", "plans"},
    "allocate": {"structure", "plans"},
    "search": {"solver"},
    "healing": {"loop", "observe", "solver", "structure", "plans"},
    "loop": set(),
    "solver": set(),
    "observe": {"structure", "plans"},
    "report": {"structure", "plans"},
    "structure": {"plans"},
    "plans": set(),
    "ahead": set(),
    "errors": set(),
    "files": set(),
    "reading": set(),
    "manifest": {"reading"},
    "tensorfiles": set(),
    "remote": set(),
    "progress": set(),
    "versions": set(),
    "kinds": set(),
    "finite": set(),
    "provenance": set(),
    "memory": set(),
    "pieces": set(),
    "usercode": set(),
    "drawing": set(),
    "timing": set(),
    "options": set(),
    "latencytable": set(),
    "rowmasks": set(),
    "journal": {"errors", "files"},
    "ranks": set(),
    "": set(),
}
# Single edges against the direction, each with its reason.
EXCEPTIONS = {
    ("structure/anatomy.py", "report"): "an anatomy prints itself as the table that the report draws",
}


def room(module: str) -> str:
    """``secateur.methods.base`` → ``methods``; the package itself is the empty string."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imported_modules(tree: ast.Module) -> set[str]:
    """Modules of secateur that run-time imports name, wherever they stand."""
    found = set()
    for node in walk_runtime(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "secateur":
            found |= {f"secateur.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] == "secateur"}


def walk_runtime(node: ast.AST):
    """Like ``ast.walk``, but leaves out the bodies of ``if TYPE_CHECKING``."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield from walk_runtime(child)


def edges() -> list[tuple[str, str]]:
    """(file, room that it imports) for the whole package, own room left out."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        relative = path.relative_to(SOURCE)
        own = "" if str(relative) == "__init__.py" else relative.parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text(encoding="utf8"))
        targets = {room(name) if room(name) in ALLOWED else "" for name in imported_modules(tree)}
        found += [(relative.as_posix(), target) for target in sorted(targets - {own})]
    return found


def test_every_room_is_placed() -> None:
    rooms = {p.name.removesuffix(".py") for p in SOURCE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert rooms - {"__init__"} == set(ALLOWED) - {""}


def test_imports_point_one_way() -> None:
    wrong = []
    for file, target in edges():
        own = "" if file == "__init__.py" else file.split("/")[0].removesuffix(".py")
        if target not in ALLOWED[own] | BASE and (file, target) not in EXCEPTIONS:
            wrong.append(f"{file} must not import {target}")
    assert wrong == []


def test_no_exception_is_left_over() -> None:
    assert set(EXCEPTIONS) <= set(edges())


def test_allowed_edges_form_no_cycle() -> None:
    done: set[str] = set()
    left = dict(ALLOWED)
    while left:
        free = [name for name, targets in left.items() if targets <= done]
        assert free, f"cycle among {sorted(left)}"
        done |= set(free)
        left = {name: targets for name, targets in left.items() if name not in done}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from secateur.plans import Plan", {"secateur.plans"}),
        ("def f():\n    import secateur.api", {"secateur.api"}),
        ("from secateur import errors", {"secateur.errors"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from secateur.api import plan", set()),
        ("import torch", set()),
    ],
)
def test_the_walk_finds_imports(text: str, expected: set[str]) -> None:
    assert imported_modules(ast.parse(text)) == expected


def test_no_relative_imports() -> None:
    relative = [
        f"{path.relative_to(SOURCE)}:{node.lineno}"
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []
