"""Uploads to a hub on this machine: all in one commit or nothing, and refused early where they can't succeed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import secateur as sc
from fake_hub import TOKEN, FakeHub, Repo
from secateur import api
from secateur.errors import ModelLoadError, OutputError, SecateurError, UsageError
from secateur.models.card import model_card
from secateur.plans import Plan
from secateur.provenance import Fingerprint, Provenance

# huggingface_hub sends bytes in a way that its HTTP library calls old
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
PRUNE = ("--method", "magnitude", "--sparsity", 0.5, "--no-report")


@pytest.fixture
def logged_in(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    model, tokenizer = sc.load(tiny_checkpoint)
    model.secateur_name = "owner/base"  # type: ignore[assignment]
    plan = sc.plan(model, method="magnitude", sparsity=0.5)
    return Path(sc.save(sc.apply(plan, model), tokenizer, tmp_path / "out", plan=plan))


def refusal(error: type[SecateurError], folder: Path, repo_id: str = "me/small", **options: bool) -> str:
    with pytest.raises(error) as caught:
        sc.push(folder, repo_id, **options)
    message = str(caught.value)
    assert "\n" not in message and TOKEN not in message
    return message


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_is_pushed_loads(logged_in: FakeHub, checkpoint: Path) -> None:
    (checkpoint / ".hidden").write_text("mine")
    url = sc.push(checkpoint, "me/small")
    assert url == f"{logged_in.endpoint}/me/small"
    repo = logged_in.repos["me/small"]
    assert not repo.private
    assert set(repo.files()) == {".gitattributes", *names(checkpoint)} - {".hidden"}
    # the first is that of the repository itself
    assert len(repo.commits) == 2
    pushed, here = sc.load("me/small")[0].state_dict(), sc.load(checkpoint)[0].state_dict()
    assert all(torch.equal(pushed[name], here[name]) for name in here)


def test_the_card_is_one_of_the_hub(logged_in: FakeHub, checkpoint: Path) -> None:
    before = (checkpoint / "README.md").read_text()
    sc.push(checkpoint, "me/small")
    card = ModelCard(logged_in.repos["me/small"].files()["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.base_model == "owner/base" and "magnitude" in card.data.tags
    assert re.findall(r'from_pretrained\("([^"]*)"', card.text) == ["me/small", "me/small"]
    assert (checkpoint / "README.md").read_text() == before


@pytest.mark.parametrize("method", ["on", "null", "no", "wanda"])
def test_no_name_of_a_method_breaks_the_card(method: str) -> None:
    fingerprint = Fingerprint(architecture="", shapes="", weights="", num_layers=1, name="owner/base")
    plan = Plan(provenance=(Provenance(method=method, model=fingerprint),))
    head = yaml.safe_load(model_card("out", base_name="owner/base", plans=[plan]).split("---\n")[1])
    assert head["tags"] == ["secateur", "pruned", method]


def test_a_private_repository(logged_in: FakeHub, checkpoint: Path) -> None:
    sc.push(checkpoint, "me/small", private=True)
    assert logged_in.repos["me/small"].private


def test_private_into_a_public_repository_is_refused(logged_in: FakeHub, checkpoint: Path) -> None:
    logged_in.repos["me/small"] = Repo()
    logged_in.repos["me/small"].commit({".gitattributes": b""})
    expected = "me/small exists and is public: make it private on the hub, or leave --private out"
    assert refusal(OutputError, checkpoint, private=True) == expected


def test_a_repository_that_holds_a_model_is_refused_without_overwrite(logged_in: FakeHub, checkpoint: Path) -> None:
    old = {
        "config.json": b"{}",
        "LICENSE": b"mine",
        "model-00001-of-00002.safetensors": b"old",
        "model.safetensors.index.json": b"{}",
        "plan/step-1/plan.json": b"{}",
        "modeling_secateur.py": b"",
    }
    logged_in.repos["me/small"] = Repo()
    logged_in.repos["me/small"].commit(old)
    message = refusal(OutputError, checkpoint)
    assert message == "me/small exists on the hub and holds files: choose another name, or pass --overwrite"
    assert logged_in.repos["me/small"].files() == old
    sc.push(checkpoint, "me/small", overwrite=True)
    # a stale index would lead to the old shards
    assert set(logged_in.repos["me/small"].files()) == {"LICENSE", *names(checkpoint)}
    sc.load("me/small")


def test_the_same_again_uploads_no_weights(logged_in: FakeHub, checkpoint: Path) -> None:
    sc.push(checkpoint, "me/small")
    logged_in.requests.clear()
    sc.push(checkpoint, "me/small", overwrite=True)
    assert not [r for r in logged_in.requests if r.method == "PUT"]


@pytest.mark.parametrize("part", ["PUT /lfs", "/preupload/", "/commit/", "objects/batch"])
def test_an_upload_that_breaks_changes_nothing(
    logged_in: FakeHub, checkpoint: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    logged_in.repos["me/small"] = Repo()
    before = {"README.md": b"about"}
    logged_in.repos["me/small"].commit(before)
    logged_in.failing[part] = 503
    message = refusal(OutputError, checkpoint)
    assert message.startswith("can't push to me/small: ") and "503" in message
    assert logged_in.repos["me/small"].files() == before
    logged_in.failing.clear()
    sc.push(checkpoint, "me/small")
    sc.load("me/small")


def test_somebody_else_pushes_meanwhile(logged_in: FakeHub, checkpoint: Path) -> None:
    repo = logged_in.repos["me/small"] = Repo()
    repo.commit({"README.md": b"about"})
    theirs = {"README.md": b"about", "config.json": b"{}"}
    # after the check that the repository is free
    logged_in.meanwhile["/api/repos/create"] = lambda: repo.commit(theirs)
    assert refusal(OutputError, checkpoint).endswith("somebody else has pushed there meanwhile; try again")
    assert repo.files() == theirs


def test_no_right_to_write(logged_in: FakeHub, checkpoint: Path) -> None:
    logged_in.failing["/api/repos/create"] = 403
    expected = (
        "can't push to me/small: your HF_TOKEN may not write there: it needs the permission to write, and you to be"
    )
    assert refusal(OutputError, checkpoint).startswith(expected)


def test_no_token(hub: FakeHub, checkpoint: Path) -> None:
    expected = "pushing to me/small needs a token: set HF_TOKEN, or log in with 'hf auth login'"
    assert refusal(OutputError, checkpoint) == expected
    assert hub.requests == []


def test_a_wrong_token(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = refusal(OutputError, checkpoint)
    assert "the hub refuses your token" in message and "hf_wrong" not in message


def test_a_card_that_the_hub_refuses(logged_in: FakeHub, checkpoint: Path) -> None:
    card = checkpoint / "README.md"
    card.write_text(card.read_text().replace("base_model: owner/base", "base_model: /a/b/c"))
    message = refusal(OutputError, checkpoint)
    assert message.endswith('the hub refuses the model card: "base_model" with value must be a valid model id')
    assert set(logged_in.repos["me/small"].files()) == {".gitattributes"}


def test_nobody_is_there(logged_in: FakeHub, checkpoint: Path) -> None:
    logged_in.close()
    assert refusal(OutputError, checkpoint).startswith(f"can't push to me/small: {logged_in.endpoint} breaks off (")


@pytest.mark.parametrize("name", ["small", "me/small/x", "me/sm all", "me/..", "hf://me/small", "-/-"])
def test_names_that_are_none(logged_in: FakeHub, checkpoint: Path, name: str) -> None:
    assert "give OWNER/NAME" in refusal(UsageError, checkpoint, name)
    assert logged_in.requests == []


def test_half_a_checkpoint_is_not_pushed(logged_in: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    assert refusal(ModelLoadError, tmp_path / "gone").endswith("no such folder")
    assert "no config.json" in refusal(ModelLoadError, tmp_path)
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "corrupt or cut short" in refusal(ModelLoadError, checkpoint)
    assert logged_in.requests == []


# -- as a command ------------------------------------------------------------------------------------------------------


def test_prune_and_push(logged_in: FakeHub, cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    run = cli(
        "prune", tiny_checkpoint, *PRUNE, "--out", tmp_path / "out", "--push-to-hub", "me/small", "--private", "--json"
    )
    assert run.code == 0, run.err
    assert json.loads(run.out)["hub"] == f"{logged_in.endpoint}/me/small"
    assert logged_in.repos["me/small"].private
    assert sc.load("hf://me/small")[0].num_parameters() > 0
    run = cli("prune", tiny_checkpoint, *PRUNE, "--out", tmp_path / "two", "--push-to-hub", "me/two")
    assert f"pushed to {logged_in.endpoint}/me/two" in run.out and "me/small" not in run.out


def test_a_failed_push_leaves_the_folder_whole(logged_in: FakeHub, cli, tiny_checkpoint: Path, tmp_path: Path) -> None:
    logged_in.failing["/api/repos/create"] = 403
    out = tmp_path / "out"
    run = cli("prune", tiny_checkpoint, *PRUNE, "--out", out, "--push-to-hub", "me/small", "--quiet")
    assert run.code == 1 and run.out == "" and run.err.count("\n") == 1
    assert run.err.endswith(f"; the checkpoint is complete in {out}, and secateur.push uploads it\n")
    sc.load(out)


def test_an_interrupted_push_says_what_is_there(
    logged_in: FakeHub, cli, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "push", interrupt)
    out = tmp_path / "out"
    run = cli("prune", tiny_checkpoint, *PRUNE, "--out", out, "--push-to-hub", "me/small", "--quiet")
    assert (
        run.code == 130 and f"the checkpoint is complete in {out}" in run.err and "nothing was written" not in run.err
    )


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--push-to-hub", "small"], 2, "'small' lacks its owner: give OWNER/NAME"),
        (["--private"], 2, "--private is for --push-to-hub, which isn't given"),
        (["--push-to-hub", "me/taken"], 1, "me/taken exists on the hub and holds files"),
    ],
)
def test_what_can_not_be_pushed_is_refused_before_anything_is_loaded(
    logged_in: FakeHub, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments, code, said
) -> None:
    logged_in.repos["me/taken"] = Repo()
    logged_in.repos["me/taken"].commit({"config.json": b"{}"})
    monkeypatch.setattr(api, "load", lambda *a, **o: pytest.fail("a model was loaded"))
    run = cli("prune", "m", *PRUNE, "--out", tmp_path / "out", *arguments)
    assert run.code == code and said in run.err and run.err.count("\n") == 1


def test_a_url_is_no_folder_to_push(logged_in: FakeHub, cli) -> None:
    run = cli("prune", "m", *PRUNE, "--out", "memory://out", "--push-to-hub", "me/small")
    assert run.code == 2 and "--push-to-hub uploads a folder of this machine" in run.err


def test_no_option_takes_a_token(cli) -> None:
    for command in ("prune", "inspect", "evaluate"):
        assert "--token" not in cli(command, "--help").out


def test_what_lies_in_the_cache_is_pushed_with_its_files(logged_in: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    # the cache of huggingface_hub holds links to its own blobs
    blobs, linked = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    for number, name in enumerate(names(checkpoint)):
        shutil.copyfile(checkpoint / name, blobs / str(number))
        (linked / name).parent.mkdir(parents=True, exist_ok=True)
        (linked / name).symlink_to(blobs / str(number))
    sc.push(linked, "me/linked")
    assert set(logged_in.repos["me/linked"].files()) == {".gitattributes", *names(checkpoint)}
    (linked / "config.json").unlink()
    (linked / "config.json").symlink_to(checkpoint / "config.json")
    with pytest.raises(ModelLoadError, match=r"config\.json is a link that leads out of the folder"):
        sc.push(linked, "me/other")
