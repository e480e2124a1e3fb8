"""2,000 mutated files: each is refused in one sentence or loads, and nothing outside its folder is touched.

The files are those that a user may get from somebody else: weights, their index, config.json, plans, recipes.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secateur.errors import SecateurError
from secateur.models.loading import load_model
from secateur.models.saving import save_model
from secateur.plans import Plan
from secateur.provenance import Fingerprint, Provenance
from secateur.recipes import load_recipe
from secateur.verification.plans import check_plan, open_plan

SECONDS = 20
EXAMPLES = {
    "header bytes": 450,
    "header": 400,
    "index": 250,
    "config": 300,
    "plan": 200,
    "plan tensors": 200,
    "recipe": 200,
}
RECIPE = """\
model: ./tiny
calibration: {source: builtin, samples: 8, length: 64, seed: 0}
steps:
  - method: flap
    sparsity: 0.2
  - method: wanda
    pattern: 2:4
    options: {use_variant: false}
evaluate: [size]
out: pruned
"""


def test_there_are_two_thousand() -> None:
    assert sum(EXAMPLES.values()) == 2000


# -- what a mutated file must not do ----------------------------------------------------------------------------------

_WATCHED: list[Path] = []
_TRESPASSES: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what happens outside the one folder, while one is watched; audit hooks can't be removed."""
    if not _WATCHED:
        return
    if event in ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        _TRESPASSES.append(f"{event} {arguments!r}")
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path = Path(os.path.abspath(os.fsdecode(arguments[0])))
        mode, flags = str(arguments[1] or ""), arguments[2] or 0
        writes = any(letter in mode for letter in "wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        inside = path.is_relative_to(_WATCHED[-1])
        neighbour = path.is_relative_to(_WATCHED[-1].parent) or path.is_relative_to("/etc")
        if not inside and (neighbour or (writes and not path.is_relative_to("/dev"))):
            _TRESPASSES.append(f"{event} {path} {mode}")


sys.addaudithook(_audit)


class Hang(BaseException):
    """Not an Exception, so that nothing on the way takes it for one."""


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Fail for anything that is opened outside ``folder``, and for work that doesn't end."""

    def stop(*_: object) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    _TRESPASSES.clear()
    _WATCHED.append(folder)
    try:
        yield
    finally:
        _WATCHED.pop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert _TRESPASSES == []


def survives(folder: Path, action: Callable[[], Any]) -> Any:
    """What ``action`` returns, or None when it refuses in one sentence; anything else is a failure."""
    before = sorted(folder.parent.rglob("*"))
    result = None
    with watched(folder):
        try:
            result = action()
        except SecateurError as error:
            message = str(error)
            assert message and "\n" not in message and "Traceback" not in message
            assert len(message) < 2000
    assert sorted(folder.parent.rglob("*")) == before
    return result


# -- files to break ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory, make_llama) -> Path:
    """A tiny sharded checkpoint with a plan in ``folder``, a whole copy of it, and a decoy outside."""
    root = tmp_path_factory.mktemp("fuzz")
    model = make_llama(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    save_model(model, None, root / "folder", max_shard_size="2KB")
    _plan().save(root / "folder" / "plan")
    (root / "folder" / "recipe.yaml").write_text(RECIPE)
    for shard in (root / "folder").glob("*.safetensors"):
        shutil.copyfile(shard, root / f"outside-{shard.name}")
    shutil.copytree(root / "folder", root.parent / f"{root.name}-whole")
    load_model(root / "folder")  # imports what loading needs, which opens files of its own
    return root / "folder"


def _plan() -> Plan:
    model = Fingerprint(architecture="LlamaForCausalLM", shapes="s", weights="w", num_layers=1)
    mask = torch.arange(24).reshape(4, 6) % 2 == 0
    return Plan(
        provenance=(Provenance(method="sparsegpt", model=model),),
        groups={"layers.0.mlp": 8},
        keep={"layers.0.mlp": torch.tensor([0, 2, 5])},
        masks={"a.weight": mask, "b.weight": mask},
        values={"a.weight": torch.arange(12.0)},
        biases={"a.bias": torch.ones(4)},
        scores={"layers.0.mlp": torch.rand(8)},
    )


@contextmanager
def replaced(folder: Path, name: str, content: bytes) -> Iterator[None]:
    """The file holds ``content`` within the block and its own again afterwards."""
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(whole)


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def loads(folder: Path) -> None:
    """Load the checkpoint; when it does, it must be the model that its config describes."""

    def load() -> Any:
        return load_model(folder)[0]

    model = survives(folder, load)
    if model is not None:
        with torch.no_grad():
            assert model(torch.tensor([[1, 2, 0]])).logits.shape[:2] == (1, 3)
        assert all(not p.is_meta for p in model.parameters())


# -- mutations --------------------------------------------------------------------------------------------------------

DEEP = "<100,000 lists in each other>"

ODD = st.sampled_from(
    [
        *(DEEP, DEEP, None, True, False, -1, 0, 1, 7, 2**31, 2**63, 10**15, 10**30, 1.5, float("inf"), float("nan")),
        *("", ".", "..", "x", "F32", "I64", "F8_E4M3", "a" * 400, "\0", "ü\ud7ff", "true", "llama", "gpt2"),
        *(
            "/etc/passwd",
            "../outside.safetensors",
            "..\\outside",
            "C:\\outside",
            "sub/x.safetensors",
            "someone/kernels",
        ),
        *([], {}, [[]], [0, 0], [-1], {"": {}}, DEEP),
    ]
)
SIZES = st.sampled_from(
    [DEEP, -1, 0, 1, 2, 3, 5, 16, 1000, 10**6, 10**9, 2**31, 2**63, 10**30, 1.5, "8", [8], True, None]
)
FRACTION = st.floats(0, 1, exclude_max=True)


@st.composite
def broken_bytes(draw: st.DrawFn, data: bytes, head: int) -> bytes:
    """``data`` with one to three edits; most of them within the first ``head`` bytes."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        limit = max(1, min(head, len(found)) if draw(st.integers(0, 9)) else len(found))
        place = int(draw(FRACTION) * limit)
        kind = draw(st.sampled_from(["flip", "set", "cut", "drop", "insert", "length", "append"]))
        if kind == "flip" and found:
            found[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and found:
            found[place] = draw(st.sampled_from(b'\0\xff{}[]",:0919'))
        elif kind == "cut":
            del found[place:]
        elif kind == "drop":
            del found[place : place + draw(st.integers(1, 9))]
        elif kind == "insert":
            found[place:place] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "append":
            found += draw(st.binary(min_size=1, max_size=9))
        else:
            length = draw(st.sampled_from([0, 1, 7, 100, len(data), 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1]))
            found[:8] = struct.pack("<Q", length)
    return bytes(found)


@st.composite
def broken_value(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three places replaced, removed, renamed or copied elsewhere."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            break
        parent, key = places[int(draw(FRACTION) * len(places))]
        kind = draw(st.sampled_from(["odd", "odd", "odd", "remove", "rename", "copy"]))
        if kind == "odd":
            parent[key] = copy.deepcopy(draw(ODD))
        elif kind == "remove":
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict):
            parent[str(draw(ODD))[:200]] = parent.pop(key)
        else:
            other, name = places[int(draw(FRACTION) * len(places))]
            # a copy, since a value that holds itself is no JSON
            parent[key] = json.loads(json.dumps(other[name])) if _has(other, name) else None
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(items):
        yield value, key
        yield from _places(child)


def _has(parent: Any, key: Any) -> bool:
    return key in parent if isinstance(parent, dict) else key < len(parent)


def _json(value: Any) -> bytes:
    return json.dumps(value).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000).encode()


def fuzz(name: str) -> Callable[[Any], Any]:
    """Run as many examples of this kind as its entry in ``EXAMPLES`` says."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=EXAMPLES[name], deadline=None, suppress_health_check=checks)


# -- the tests --------------------------------------------------------------------------------------------------------


@fuzz("header bytes")
@given(data=st.data())
def test_weights_with_broken_bytes(room: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(shards(room)))
    whole = (room / name).read_bytes()
    head = 8 + struct.unpack("<Q", whole[:8])[0]
    with replaced(room, name, data.draw(broken_bytes(whole, head))):
        loads(room)


@fuzz("header")
@given(data=st.data())
def test_weights_whose_header_lies(room: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(shards(room)))
    whole = (room / name).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = _json(data.draw(broken_value(json.loads(whole[8 : 8 + length]))))
    with replaced(room, name, struct.pack("<Q", len(header)) + header + whole[8 + length :]):
        loads(room)


@fuzz("index")
@given(data=st.data())
def test_broken_index(room: Path, data: st.DataObject) -> None:
    name = "model.safetensors.index.json"
    index = json.loads((room / name).read_text())
    if data.draw(st.booleans()):
        # every way to say: the same file, but outside
        place = data.draw(
            st.sampled_from(["../outside-{}", "..\\outside-{}", "{root}/outside-{}", "./{}", "sub/../{}"])
        )
        tensor = data.draw(st.sampled_from(sorted(index["weight_map"])))
        file = index["weight_map"][tensor]
        index["weight_map"][tensor] = place.format(file, root=room.parent)
        with replaced(room, name, _json(index)):
            assert survives(room, lambda: load_model(room)) is None
        return
    content = data.draw(st.one_of(broken_value(index).map(_json), broken_bytes(_json(index), 400)))
    with replaced(room, name, content):
        loads(room)


@fuzz("config")
@given(data=st.data())
def test_broken_config(room: Path, data: st.DataObject) -> None:
    config = json.loads((room / "config.json").read_text())
    kind = data.draw(st.sampled_from(["size", "size", "value", "value", "bytes"]))
    if kind == "size":
        sizes = sorted(key for key, value in config.items() if type(value) is int)
        content = _json({**config, data.draw(st.sampled_from(sizes)): data.draw(SIZES)})
    elif kind == "value":
        content = _json(data.draw(broken_value(config)))
    else:
        content = data.draw(broken_bytes(_json(config), 10**6))
    with replaced(room, "config.json", content):
        loads(room)


def plan_is_read_alike(folder: Path) -> None:
    """The two readers of plans, the one for use and the one that reads piece by piece, agree."""
    plan = survives(folder, lambda: Plan.load(folder / "plan"))
    again = survives(folder, lambda: check_plan(open_plan(folder / "plan")) or True)
    assert (plan is None) == (again is None)


@fuzz("plan")
@given(data=st.data())
def test_broken_plan(room: Path, data: st.DataObject) -> None:
    document = json.loads((room / "plan" / "plan.json").read_text())
    content = data.draw(st.one_of(*[broken_value(document).map(_json)] * 3, broken_bytes(_json(document), 10**6)))
    with replaced(room, "plan/plan.json", content):
        plan_is_read_alike(room)


@fuzz("plan tensors")
@given(data=st.data())
def test_broken_plan_tensors(room: Path, data: st.DataObject) -> None:
    name = "plan/plan.safetensors"
    whole = (room / name).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    if data.draw(st.booleans()):
        content = data.draw(broken_bytes(whole, len(whole)))
    else:
        header = _json(data.draw(broken_value(json.loads(whole[8 : 8 + length]))))
        content = struct.pack("<Q", len(header)) + header + whole[8 + length :]
    with replaced(room, name, content):
        plan_is_read_alike(room)


YAML = st.sampled_from(
    [
        *("&a ", "*a", "<<: *a", "? ", "!!python/object/apply:os.system ['true']", "!!binary '?'", "!!set {a}"),
        *("!!float x", "!!int x", "!!timestamp x", "!!bool x", "2001-99-99", "1" * 5000, "!!omap [a]", "&a [*a, *a]"),
        *("[" * 5000, "{a: " * 5000, "- " * 5000, "\t", "---\n", "%YAML 9", "'", '"', "|", ">", "#", "@", "`"),
        *("\x85", "~", "null", "[1, 2]", "{a: 1}", ": :", "-1", ".nan", ".inf", "1e999", "true", "x" * 2000),
    ]
)
VALUES = [match.span() for match in re.finditer(r"(?<=: )[^{\[\n][^,}\n]*|\{.*\}|\[.*\]", RECIPE)]


@fuzz("recipe")
@given(data=st.data())
def test_broken_recipe(room: Path, data: st.DataObject) -> None:
    text, kind = RECIPE, data.draw(st.sampled_from(["value", "value", "place", "bytes"]))
    if kind == "value":
        start, end = data.draw(st.sampled_from(VALUES))
        text = text[:start] + data.draw(YAML) + text[end:]
    if kind == "place":
        place = int(data.draw(FRACTION) * len(text))
        text = text[:place] + data.draw(YAML) + text[place + data.draw(st.integers(0, 8)) :]
    content = data.draw(broken_bytes(text.encode(), 10**6)) if kind == "bytes" else text.encode()
    with replaced(room, "recipe.yaml", content):
        survives(room, lambda: load_recipe(room / "recipe.yaml"))


def test_everything_is_whole_again(room: Path) -> None:
    # the mutations were put back, so that each example above began with a whole folder
    whole = room.parent.parent / f"{room.parent.name}-whole"
    for path in whole.rglob("*"):
        if path.is_file():
            assert (room / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert load_model(room)[0] is not None
