"""The package says of itself what is true: version, dependencies, extras, Python version, licence."""

import ast
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import secateur

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it where Python lacks it
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path(secateur.__file__).parent
DISTRIBUTION = {"PIL": "pillow", "yaml": "pyyaml", "lm_eval": "lm-eval", "compressed_tensors": "compressed-tensors"}
DISTRIBUTION |= {"sklearn": "scikit-learn"}
# What a file written for the user's Python may import: the shipped modelling file runs inside transformers.
STANDARD = set(sys.stdlib_module_names) | {"pydoc_data", "secateur"}
# Arrived with Python 3.11 or later; 3.10 must work.
TOO_NEW = {
    "typing": {"Self", "Never", "LiteralString", "Required", "NotRequired", "Unpack", "assert_never", "override"},
    "enum": {"StrEnum"},
    "datetime": {"UTC"},
    "asyncio": {"TaskGroup", "timeout"},
    "itertools": {"batched"},
    "contextlib": {"chdir"},
}


def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return found[0].lower().replace("_", "-")


def installed() -> metadata.Distribution:
    try:
        return metadata.distribution("secateur")
    except metadata.PackageNotFoundError:
        pytest.skip("secateur is on the path but not installed")


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def third_party_imports(at_top: bool) -> set[str]:
    """Distributions that the package imports: at the top of a file, or anywhere."""
    found = set()
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf8"))
        for node in tree.body if at_top else ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return {DISTRIBUTION.get(name, name).replace("_", "-") for name in found - STANDARD}


def test_the_version_has_one_source() -> None:
    assert "version" in project()["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+([ab]\d+|rc\d+|\.dev\d+)?", secateur.__version__)
    assert installed().version == secateur.__version__


def test_what_is_imported_is_declared() -> None:
    lists = [project()["dependencies"], *project()["optional-dependencies"].values()]
    assert third_party_imports(at_top=False) <= {name_of(r) for declared in lists for r in declared}


def test_the_core_imports_no_extra_at_the_top() -> None:
    assert third_party_imports(at_top=True) <= {name_of(r) for r in project()["dependencies"]}


def test_messages_name_the_extra_that_brings_the_module() -> None:
    extras = {name: {name_of(r) for r in needed} for name, needed in project()["optional-dependencies"].items()}
    text = "\n".join(path.read_text(encoding="utf8") for path in sources())
    calls = re.findall(r'require_extra\(\s*"(\w+)[\w.]*",\s*"(\w+)"', text)
    assert calls
    for module, extra in calls:
        assert DISTRIBUTION.get(module, module) in extras[extra], (module, extra)
    assert set(re.findall(r"secateur\[([a-z]+)\]", text)) <= set(extras)


def test_all_holds_every_user_extra() -> None:
    extras = project()["optional-dependencies"]
    inside = set(re.findall(r"[\w-]+", re.sub(r".*\[(.*)\]", r"\1", extras["all"][0])))
    assert inside == set(extras) - {"all", "test", "dev"}
    # and the README says what each is for
    [install] = re.findall(r"^## Install$(.*?)^## ", (ROOT / "README.md").read_text(encoding="utf8"), re.M | re.S)
    assert inside <= set(re.findall(r"`(\w+)`\s\(", install))


def test_torch_and_transformers_are_ranges() -> None:
    ranges = {name_of(r): r for r in project()["dependencies"]}
    assert ranges["torch"] == "torch>=2.6"
    assert ranges["transformers"] == "transformers>=5"


def test_sources_parse_as_python_310() -> None:
    for path in sources():
        ast.parse(path.read_text(encoding="utf8"), filename=str(path), feature_version=(3, 10))


def test_no_name_newer_than_python_310() -> None:
    wrong = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.ImportFrom) and node.module in TOO_NEW:
                wrong += [f"{path.name}: {a.name}" for a in node.names if a.name in TOO_NEW[node.module]]
            if isinstance(node, ast.Import):
                wrong += [f"{path.name}: tomllib" for a in node.names if a.name == "tomllib"]
    assert wrong == []


def test_no_pickle() -> None:
    banned = re.compile(r"\b(import pickle\b|from pickle\b|pickle\.\w|torch\.save\(|torch\.load\()")
    # the one room that reads pickles, when asked, and tensors alone
    found = [p for p in sources() if banned.search(p.read_text(encoding="utf8"))]
    assert [p.name for p in found] == ["pickles.py"]
    calls = re.findall(r"torch\.load\((.*)\)", found[0].read_text(encoding="utf8"))
    assert len(calls) == 2 and all("weights_only=True" in call for call in calls)
    assert len(banned.findall(found[0].read_text(encoding="utf8"))) == len(calls)


def test_the_licence_is_apache() -> None:
    assert project()["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf8")
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_the_command_is_installed() -> None:
    scripts = {e.name: e.value for e in installed().entry_points if e.group == "console_scripts"}
    assert scripts == {"secateur": "secateur.cli:main"}


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "secateur", "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert secateur.__version__ in done.stdout


@pytest.mark.skipif("SECATEUR_TEST_WHEEL" not in os.environ, reason="only `make wheel-test` tests the wheel")
def test_the_wheel_is_what_is_tested() -> None:
    assert ROOT not in SOURCE.parents
