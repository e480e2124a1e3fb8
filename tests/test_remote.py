"""Outputs at URLs: uploaded when whole, what makes them a checkpoint last, and refused early where they can't be."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import secateur as sc
from secateur import api
from secateur.errors import MissingExtraError, OutputError, SecateurError, UsageError
from secateur.files import check_output, output_folder
from secateur.plans import Plan
from secateur.remote import is_url, place

PRUNE = ("--method", "magnitude", "--sparsity", 0.5, "--no-report", "--quiet")
LAST = ["plan/plan.json", "manifest.json", "config.json"]


class Store(MemoryFileSystem):
    """A store in memory that counts, and fails when it is told to."""

    protocol = "store"
    store: dict = {}  # noqa: RUF012 - the class attribute of the class above, of its own
    pseudo_dirs: list = [""]  # noqa: RUF012
    written: list[str] = []  # noqa: RUF012
    removed: list[str] = []  # noqa: RUF012
    broken: str = ""
    forbidden = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("store://", "memory://"))

    def put_file(self, lpath, rpath, *arguments, **options):
        if self.broken and rpath.endswith(self.broken):
            raise TimeoutError("the connection was lost")
        type(self).written.append(self._strip_protocol(rpath))
        return super().put_file(lpath, rpath, *arguments, **options)

    def rm_file(self, path):
        type(self).removed.append(self._strip_protocol(path))
        super().rm_file(path)

    def pipe_file(self, path, value, **options):
        if self.forbidden:
            raise PermissionError(errno.EACCES, "Access Denied")
        return super().pipe_file(path, value, **options)


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Store]]:
    for name, value in (
        ("store", {}), ("pseudo_dirs", [""]), ("written", []), ("removed", []), ("broken", ""), ("forbidden", False)
    ):  # fmt: skip
        monkeypatch.setattr(Store, name, value)
    fsspec.register_implementation("store", Store, clobber=True)
    yield Store
    fsspec.implementations.memory.MemoryFileSystem.store.clear()


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where temporary folders go, which must be gone in the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def plan(tiny_llama) -> Plan:
    return sc.plan(tiny_llama, method="magnitude_sp", sparsity=0.5)


def names(store: type[Store], root: str) -> list[str]:
    return sorted(path.removeprefix(root).lstrip("/") for path in store.store if path.startswith(root))


def refusal(error: type[SecateurError], url: str, **options: bool) -> str:
    with pytest.raises(error) as caught:
        check_output(url, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what arrives ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_arrives_whole_and_its_config_last(store, cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    run = cli("prune", tiny_checkpoint, *PRUNE, "--out", "store://bucket/models/small")
    assert run.code == 0, run.err
    assert "saved to store://bucket/models/small; copy it to a folder to load it" in run.out
    assert store.written[-3:] == [f"/bucket/models/small/{name}" for name in LAST]
    back = tmp_path / "back"
    fsspec.filesystem("store").get("/bucket/models/small", str(back), recursive=True)
    local = tmp_path / "local"
    assert cli("prune", tiny_checkpoint, *PRUNE, "--out", local).code == 0
    found = {p.relative_to(back).as_posix(): p.read_bytes() for p in back.rglob("*") if p.is_file()}
    expected = {p.relative_to(local).as_posix(): p.read_bytes() for p in local.rglob("*") if p.is_file()}
    assert set(found) == set(expected)
    # the report holds the time and the place
    different = {name for name in found if found[name] != expected[name]}
    assert different <= {"report.json", "README.md", "manifest.json"}
    sc.load(back)


def test_the_index_of_shards_is_among_the_last(store) -> None:
    with output_folder("store://b/x") as folder:
        for name in ("config.json", "manifest.json", "model.safetensors.index.json", "a.safetensors", "z.txt"):
            (folder / name).write_text(name)
    order = [path.rsplit("/", 1)[1] for path in store.written]
    assert order == ["a.safetensors", "z.txt", "model.safetensors.index.json", "manifest.json", "config.json"]


def test_python_and_plans_take_urls(store, tiny_llama, plan: Plan) -> None:
    assert plan.save("store://b/plan/") == "store://b/plan"
    assert store.written == ["/b/plan/plan.safetensors", "/b/plan/plan.json"]
    assert sc.save(tiny_llama, None, "store://b/model") == "store://b/model"
    assert "config.json" in names(store, "/b/model")


def test_plan_apply_and_merge_take_urls(store, cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for method, out in (("magnitude", "weights"), ("magnitude_sp", "units")):
        command = ("prune", tiny_checkpoint, "--method", method, "--sparsity", 0.5, "--no-report", "--quiet")
        assert cli(*command, "--out", tmp_path / out).code == 0
    run = cli("plan", "apply", tmp_path / "weights", tiny_checkpoint, "--out", "store://b/again", "--quiet")
    assert run.code == 0, run.err
    run = cli("plan", "merge", tmp_path / "weights", tmp_path / "units", "--out", "store://b/merged")
    assert run.code == 0, run.err
    assert names(store, "/b/merged") == ["plan.json", "plan.safetensors"]
    assert "config.json" in names(store, "/b/again")


def test_memory_of_fsspec_itself(plan: Plan) -> None:
    plan.save("memory://plans/a")
    assert fsspec.filesystem("memory").exists("/plans/a/plan.json")


def test_a_file_url_is_a_folder_of_this_machine(tmp_path: Path, plan: Plan) -> None:
    saved = plan.save(f"file://{tmp_path}/plan")
    assert saved == tmp_path / "plan"
    assert Plan.load(saved).groups == plan.groups
    with pytest.raises(OutputError, match="--overwrite"):
        plan.save(f"local://{tmp_path}/plan")


def test_what_is_a_url() -> None:
    assert is_url("s3://b/x") and is_url("abfs+dfs://b/x")
    assert not any(is_url(text) for text in ("out", "/out", "C:\\out", "file:///out", "local://out"))
    assert not is_url(Path("out"))
    assert place("out/") == Path("out") and place("s3://b/x/") == "s3://b/x"


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_exists_is_refused_before_anything_is_loaded(store, cli, plan: Plan, monkeypatch) -> None:
    plan.save("store://b/taken")
    before = dict(store.store)
    monkeypatch.setattr(api, "load", lambda *a, **o: pytest.fail("a model was loaded"))
    run = cli("prune", "m", *PRUNE, "--out", "store://b/taken")
    assert run.code == 1 and run.err.count("\n") == 1
    assert "store://b/taken exists and is not empty: choose another folder, or pass --overwrite" in run.err
    assert store.store == before
    fsspec.filesystem("store").pipe_file("/b/file", b"x")
    assert refusal(OutputError, "store://b/file") == "store://b/file is a file; give a folder that doesn't exist yet"


def test_overwrite_replaces_the_whole_folder(store, plan: Plan) -> None:
    old = fsspec.filesystem("store")
    for name in ("config.json", "model.safetensors.index.json", "model-1.safetensors", "deep/er.txt", "plan.json"):
        old.pipe_file(f"/b/x/{name}", b"old")
    old.pipe_file("/b/xyz", b"a neighbour")
    plan.save("store://b/x", overwrite=True)
    assert names(store, "/b/x/") == ["plan.json", "plan.safetensors"]
    assert "/b/xyz" in store.store
    # the config goes before anything else changes: what is left of the old is no checkpoint
    assert store.removed[0].endswith("/config.json")


def test_no_right_to_write_is_noticed_before_anything_is_loaded(store, cli, monkeypatch) -> None:
    monkeypatch.setattr(api, "load", lambda *a, **o: pytest.fail("a model was loaded"))
    monkeypatch.setattr(Store, "forbidden", True)
    run = cli("prune", "m", *PRUNE, "--out", "store://b/x")
    assert run.code == 1 and run.err == "error: can't write to store://b/x: Access Denied; nothing was left there\n"


def test_the_check_leaves_nothing(store) -> None:
    check_output("store://b/x")
    assert names(store, "/b") == []


@pytest.mark.parametrize(
    ("url", "error", "said"),
    [
        ("s4://b/x", UsageError, "s4://b/x: unknown protocol 's4'; did you mean 's3'?"),
        ("nonsense://b/x", UsageError, "nonsense://b/x: unknown protocol 'nonsense'; known are s3, gs, abfs, sftp"),
        ("https://host/x", UsageError, "https://host/x can't be written to: give a folder, or a URL such as s3://b"),
        ("zip::s3://b/x", UsageError, "zip::s3://b/x can't be written to: give a folder, or a URL such as"),
        ("hf://owner/x", UsageError, "hf://owner/x: write to a folder here, and upload it with --push-to-hub"),
        ("memory://", UsageError, "memory:// names no folder: give one, as in memory://bucket/folder"),
    ],
)  # fmt: skip
def test_urls_that_can_not_be_written(url: str, error: type[SecateurError], said: str) -> None:
    assert refusal(error, url).startswith(said)


def test_a_protocol_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # an earlier test's, if any
    message = refusal(MissingExtraError, "s3://bucket/x")
    assert message == "s3://bucket/x can't be written to: install s3fs to access S3"


def test_fsspec_itself_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    expected = "writing to s3://bucket/x needs fsspec, which is not installed: pip install 'secateur[cloud]'"
    assert refusal(MissingExtraError, "s3://bucket/x") == expected


def test_the_root_of_a_bucket_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    # the package for s3 need not be here
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", MemoryFileSystem)
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (None, "bucket"))
    assert refusal(UsageError, "s3://bucket") == "s3://bucket names no folder: give one, as in s3://bucket/folder"


def test_a_link_to_itself_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert refusal(OutputError, str(tmp_path / "loop")).startswith(f"can't write to {tmp_path}/loop: ")


def test_a_url_in_a_path_has_lost_a_slash() -> None:
    with pytest.raises(UsageError, match=r"give a URL as text, 's3://…', not as a Path"):
        check_output(Path("s3://bucket/x"))


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["model.safetensors", "config.json"])
def test_an_upload_that_breaks_leaves_nothing_there(
    store, cli, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "broken", broken)
        run = cli("prune", tiny_checkpoint, *PRUNE, "--out", "store://b/x")
    assert run.code == 1 and run.err.count("error:") == 1
    assert "can't write to store://b/x: the connection was lost; nothing was left there; x.run holds what" in run.err
    assert names(store, "/b") == []
    # nothing is pruned again once the connection is back
    assert cli("prune", tiny_checkpoint, *PRUNE, "--out", "store://b/x", "--resume").code == 0
    assert "config.json" in names(store, "/b/x") and not (tmp_path / "x.run").exists()


def test_a_kill_in_the_middle_leaves_no_checkpoint(store, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(self, path) -> None:
        raise SystemError("nobody is left to tidy up")

    monkeypatch.setattr(Store, "broken", "config.json")
    monkeypatch.setattr(Store, "rm_file", dead)
    with pytest.raises(OutputError), output_folder("store://b/x") as folder:
        for name in ("config.json", "model.safetensors.index.json", "model.safetensors"):
            (folder / name).write_text("x")
    assert "config.json" not in names(store, "/b/x")


def test_a_file_that_arrives_short_is_noticed(store, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Store.put_file

    def short(self, local, remote, **options):
        put(self, local, remote, **options)
        self.store[remote].seek(0)
        self.store[remote].truncate(10)

    monkeypatch.setattr(Store, "put_file", short)
    with pytest.raises(OutputError, match=r"plan.safetensors arrived with 10 of \d+ bytes"):
        plan.save("store://b/x")
    assert names(store, "/b") == []


def test_an_interrupt_leaves_nothing(store, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Store.put_file

    def interrupted(self, local, remote, **options):
        put(self, local, remote, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "put_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plan.save("store://b/x")
    assert names(store, "/b") == []


def test_a_block_that_fails_uploads_nothing(store) -> None:
    with pytest.raises(ValueError, match="mine"), output_folder("store://b/x") as folder:
        (folder / "a").write_text("x")
        raise ValueError("mine")
    assert store.written == []


def test_a_full_disk_of_this_machine(store, tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(tiny_llama), "save_pretrained", full)
    with pytest.raises(OutputError, match=r"can't write store://b/x: No space left on device; nothing was left behind"):
        sc.save(tiny_llama, None, "store://b/x")
    assert store.written == []


def test_outputs_find_home_and_nobody_else_s(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place("~/out") == tmp_path / "out" and place(Path("~/out")) == tmp_path / "out"
    with output_folder("~/out") as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "out/x").read_text() == "x"
    with pytest.raises(UsageError, match="~nobody_here/out: this machine knows nobody of the name nobody_here"):
        check_output("~nobody_here/out")
