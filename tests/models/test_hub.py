"""Hub ids against a hub on this machine: what is fetched, how a cut is mended, and one sentence for what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import secateur as sc
from fake_hub import TOKEN, FakeHub
from secateur.errors import ModelLoadError, SecateurError, UsageError
from secateur.models.hub import commit_of, split_name


@pytest.fixture
def source(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint with what else people keep in a repository."""
    folder = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "README.md").write_text("a model")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling_own.py").write_text("raise SystemError")
    (folder / "original").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "original" / "model.safetensors")
    return folder


def refusal(name: str, error: type[SecateurError] = ModelLoadError, **options) -> str:
    with pytest.raises(error) as caught:
        sc.load(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["owner/tiny", "hf://owner/tiny", "hf://models/owner/tiny", "hf://owner/tiny@main"])
def test_only_what_is_needed_is_fetched(hub: FakeHub, source: Path, name: str) -> None:
    sha = hub.add("owner/tiny", source)
    model, tokenizer = sc.load(name)
    assert same(model, sc.load(source)[0])
    assert tokenizer is not None
    assert sorted(hub.fetched()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    plan = sc.plan(model, method="magnitude", sparsity=0.5)
    assert (plan.model.name, plan.model.revision) == ("owner/tiny", sha)
    assert plan.model.label == f"owner/tiny@{sha[:12]}"


def test_a_second_load_fetches_nothing(hub: FakeHub, source: Path) -> None:
    hub.add("owner/tiny", source)
    sc.load("owner/tiny")
    hub.requests.clear()
    sc.load("owner/tiny")
    assert hub.fetched() == [] and hub.fetched("HEAD") == []


def test_the_cache_is_enough_when_the_hub_is_gone(hub: FakeHub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/tiny", source)
    first, _ = sc.load("owner/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert same(first, sc.load("hf://owner/tiny")[0])
    assert hub.requests == []


def test_shards_come_by_the_index(hub: FakeHub, make_llama, tiny_tokenizer, tmp_path: Path) -> None:
    model = make_llama()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    tiny_tokenizer.save_pretrained(tmp_path / "sharded")
    shards = {p.name for p in (tmp_path / "sharded").glob("*.safetensors")}
    assert len(shards) > 2
    shutil.copy(next((tmp_path / "sharded").glob("*.safetensors")), tmp_path / "sharded" / "consolidated.safetensors")
    hub.add("owner/sharded", tmp_path / "sharded")
    steps = []
    loaded, _ = sc.load("owner/sharded", progress=lambda *step: steps.append(step))
    assert same(loaded, model)
    assert {name for name in hub.fetched() if name.endswith(".safetensors")} == shards
    assert steps[-1] == ("download", 1, 1) and {stage for stage, _, _ in steps} == {"download"}


def test_an_index_fetches_no_pickle(hub: FakeHub, source: Path) -> None:
    (source / "model.safetensors").unlink()
    index = {"weight_map": {"a": "*", "b": "pytorch_model.bin", "c": "../../x.safetensors", "d": "gone.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.add("owner/tiny", source)
    assert "only pickled ones" in refusal("owner/tiny")
    assert not [name for name in hub.fetched() if name.endswith(".bin")]


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: FakeHub, source: Path, make_llama) -> None:
    old = hub.add("owner/tiny", source, "main", "v1", "refs/pr/1")
    make_llama(seed=1, max_position_embeddings=1024).save_pretrained(source)
    new = hub.add("owner/tiny", source, "main")
    assert sc.load("owner/tiny")[0].secateur_revision == new
    first = sc.load("owner/tiny", revision="v1")[0]
    assert first.secateur_revision == old
    assert not same(first, sc.load("owner/tiny")[0])
    for name, revision in (("owner/tiny", old), ("hf://owner/tiny@v1", None), ("hf://owner/tiny@v1", "v1")):
        assert same(first, sc.load(name, revision=revision)[0])
    assert same(first, sc.load("hf://owner/tiny@refs/pr/1")[0])


def test_a_push_in_between_does_not_mix_two_commits(hub: FakeHub, source: Path, make_llama) -> None:
    old = hub.add("owner/tiny", source)
    expected = sc.load(source)[0]
    make_llama(seed=1, num_hidden_layers=1, max_position_embeddings=1024).save_pretrained(source)
    hub.meanwhile["GET /owner/tiny/resolve"] = lambda: hub.add("owner/tiny", source)
    loaded, _ = sc.load("owner/tiny")
    assert hub.meanwhile == {} and loaded.secateur_revision == old
    assert same(loaded, expected)


# -- a network as it is ------------------------------------------------------------------------------------------------


def test_a_cut_download_goes_on_where_it_was(hub: FakeHub, source: Path) -> None:
    hub.add("owner/tiny", source)
    hub.cuts["model.safetensors"] = [50_000, 40_000]
    model, _ = sc.load("owner/tiny")
    assert same(model, sc.load(source)[0])
    asked = [r.range for r in hub.requests if r.method == "GET" and r.path.endswith("/model.safetensors")]
    starts = [int(a.removeprefix("bytes=").rstrip("-")) if a else 0 for a in asked]
    assert len(starts) == 3 and starts == sorted(starts) and starts[1] > 40_000 and starts[2] > 80_000


def test_a_download_that_always_breaks_leaves_nothing_that_counts(
    hub: FakeHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.add("owner/tiny", source)
    hub.cuts["model.safetensors"] = [0] * 100
    message = refusal("owner/tiny")
    assert message.startswith("owner/tiny is no folder here") and f"{hub.endpoint} doesn't answer" in message
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    hub.cuts.clear()
    assert same(sc.load("owner/tiny")[0], sc.load(source)[0])


def test_a_silent_server_is_asked_again(hub: FakeHub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.add("owner/tiny", source)
    hub.stalls["model.safetensors"] = (65536, 1.5)
    assert same(sc.load("owner/tiny")[0], sc.load(source)[0])
    assert len([r for r in hub.requests if r.range]) == 1


def test_a_slow_server_is_waited_for(hub: FakeHub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # longer in all than the time that a single read may take
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.add("owner/tiny", source)
    hub.trickle = 0.1
    assert same(sc.load("owner/tiny")[0], sc.load(source)[0])
    assert not [r for r in hub.requests if r.range]


def test_a_hub_that_is_out_of_order(hub: FakeHub, source: Path) -> None:
    hub.add("owner/tiny", source)
    hub.failing["/api/models"] = 503
    expected = f"owner/tiny can't be had from the hub: {hub.endpoint} is out of order or busy (HTTP 503)"
    assert refusal("hf://owner/tiny") == expected
    hub.failing = {"GET /owner/tiny/resolve": 403}
    assert refusal("hf://owner/tiny") == f"owner/tiny can't be had from the hub: {hub.endpoint} refuses (HTTP 403)"


def test_nobody_is_there(hub: FakeHub) -> None:
    hub.close()
    message = refusal("hf://owner/tiny")
    assert message.startswith(f"owner/tiny can't be had from the hub: {hub.endpoint} doesn't answer (")
    assert "refused" in message


def test_offline_and_not_in_the_cache(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refusal("hf://owner/tiny") == (
        "owner/tiny can't be had from the hub: HF_HUB_OFFLINE is set, and the cache doesn't hold it"
    )


# -- what is wrong with the request ------------------------------------------------------------------------------------


def test_a_repository_that_does_not_exist(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal("hf://owner/gone") == (
        "owner/gone can't be had from the hub: there is no such model, or it is private and HF_TOKEN is not set"
    )
    plain = refusal("owner/gone")
    assert plain.startswith("owner/gone is no folder here, no built-in model (gemma3-270m, smollm2-135m), and can't be")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert refusal("hf://owner/gone").endswith("there is no such model, or your HF_TOKEN may not read it")


def test_the_token_comes_from_the_environment(hub: FakeHub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/secret", source, private=True)
    assert "HF_TOKEN is not set" in refusal("owner/secret")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    sc.load("owner/secret")
    assert {r.token for r in hub.requests} == {None, TOKEN}


def test_the_stored_login_does_too(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    hub.add("owner/secret", source, private=True)
    (tmp_path / "token").write_text(TOKEN)
    sc.load("owner/secret")


def test_a_gated_model(hub: FakeHub, source: Path) -> None:
    hub.add("owner/gated", source, gated=True)
    expected = f"owner/gated is gated: ask for access at {hub.endpoint}/owner/gated, then set HF_TOKEN"
    assert refusal("owner/gated") == expected


def test_a_wrong_token(hub: FakeHub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/tiny", source)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = refusal("hf://owner/tiny")
    assert message.endswith("the hub refuses your token: correct HF_TOKEN, or log in with 'hf auth login'")
    assert "hf_wrong" not in message


def test_an_unknown_revision(hub: FakeHub, source: Path) -> None:
    hub.add("owner/tiny", source)
    for arguments in ({"name": "owner/tiny", "revision": "v9"}, {"name": "hf://owner/tiny@v9"}):
        expected = "owner/tiny has no revision 'v9' on the hub: give a branch, a tag or a commit"
        assert refusal(**arguments) == expected
    assert "has no revision" in refusal("owner/tiny", revision="0" * 40)


@pytest.mark.parametrize(
    "name", ["hf://", "hf://tiny", "hf://datasets/owner/tiny", "hf://owner/tiny/x.gguf", "hf://a b/c"]
)
def test_a_url_that_names_no_model(name: str) -> None:
    expected = f"{name} names no model of the hub: write hf://owner/name or hf://owner/name@revision"
    assert refusal(name, UsageError) == expected


def test_two_revisions() -> None:
    expected = "hf://owner/tiny@v1 asks for another revision than 'v2': give one of the two"
    assert refusal("hf://owner/tiny@v1", UsageError, revision="v2") == expected


def test_a_folder_has_no_revision(tiny_checkpoint: Path) -> None:
    assert "is on this machine and has no revision" in refusal(str(tiny_checkpoint), UsageError, revision="main")


def test_a_repository_without_a_model(hub: FakeHub, source: Path) -> None:
    (source / "config.json").unlink()
    hub.add("owner/data", source)
    assert refusal("owner/data") == "owner/data on the hub holds no model: there is no config.json in it"


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("pytorch_model.bin", "only pickled ones, which secateur never opens; convert them"),
        ("model.Q4_0.gguf", "only GGUF files; download one and give its path"),
        ("notes.txt", "no model.safetensors"),
    ],
)
def test_a_repository_without_safetensors(hub: FakeHub, source: Path, file: str, why: str) -> None:
    shutil.rmtree(source / "original")
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").unlink()
    (source / file).write_bytes(b"x")
    hub.add("owner/old", source)
    assert refusal("owner/old") == f"owner/old has no weights in safetensors form: {why}"
    assert file not in hub.fetched()


def test_errors_name_the_model_not_the_cache(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text("{")
    hub.add("owner/broken", source)
    message = refusal("owner/broken")
    assert message.startswith("owner/broken/config.json is not valid JSON") and str(tmp_path) not in message


def test_an_index_that_is_broken(hub: FakeHub, source: Path) -> None:
    (source / "model.safetensors.index.json").write_text("[]")
    hub.add("owner/broken", source)
    assert refusal("owner/broken") == "owner/broken/model.safetensors.index.json is not a valid index of weight files"


def test_a_full_disk(hub: FakeHub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    hub.add("owner/tiny", source)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    message = refusal("owner/tiny")
    assert message.startswith("owner/tiny can't be kept in the cache ") and message.endswith(
        ": No space left on device"
    )


def test_code_of_a_model_is_fetched_only_when_it_is_trusted(hub: FakeHub, source: Path) -> None:
    hub.add("owner/tiny", source)
    sc.load("owner/tiny")
    assert "modeling_own.py" not in hub.fetched()
    sc.load("owner/tiny", trust_remote_code=True)
    assert "modeling_own.py" in hub.fetched()


def test_names() -> None:
    assert split_name("hf://owner/name@refs/pr/3") == ("owner/name", "refs/pr/3")
    assert split_name("owner/name", "v1") == ("owner/name", "v1")
    assert commit_of(f"cache/models--a--b/snapshots/{'0' * 40}") == "0" * 40
    assert commit_of("out/snapshots/last") == commit_of("0" * 40) == ""


# -- as a command ------------------------------------------------------------------------------------------------------


def test_a_process_finds_the_hub_by_its_environment(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    sha = hub.add("owner/tiny", source, "main", "v1", private=True)
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "secateur", "inspect", "hf://owner/tiny", "--revision", "v1", "--json"]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["model"], document["revision"]) == ("hf://owner/tiny", sha)
    assert TOKEN not in done.stdout + done.stderr


def test_every_command_that_takes_a_model_takes_a_revision(hub: FakeHub, source: Path, cli, tmp_path: Path) -> None:
    sha = hub.add("owner/tiny", source, "v1")
    hub.repos["owner/tiny"].commit({"config.json": b"{}"}, "main")
    out, again = tmp_path / "out", tmp_path / "again"
    run = cli(
        "prune", "owner/tiny", "--revision", "v1", "--method", "magnitude", "--sparsity", 0.5, "--out", out,
        "--no-report", "--json",
    )  # fmt: skip
    assert run.code == 0, run.err
    report = json.loads(run.out)
    assert (report["model"], report["revision"]) == ("owner/tiny", sha)
    card = (out / "README.md").read_text()
    assert "base_model: owner/tiny\n" in card and f"| Revision | `{sha}` |" in card
    assert str(tmp_path) not in (out / "config.json").read_text()
    shown = cli("plan", "show", out)
    assert f"owner/tiny@{sha[:12]}" in shown.out
    assert cli("plan", "apply", out, "hf://owner/tiny", "--revision", "v1", "--out", again).code == 0
    assert cli("inspect", "owner/tiny", "--revision", "v1").code == 0
    run = cli("evaluate", "owner/tiny", out, "--revision", "v1", "--task", "size", "--json")
    assert run.code == 0, run.err
    assert json.loads(run.out)["revisions"] == {"tiny": sha}


def test_a_recipe_holds_the_revision(hub: FakeHub, source: Path, cli, tmp_path: Path) -> None:
    sha = hub.add("owner/tiny", source, "v1")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: hf://owner/tiny\nrevision: v1\nsteps: [{method: magnitude, sparsity: 0.5}]\n")
    run = cli("prune", "--recipe", recipe, "--dry-run", "--json")
    assert run.code == 0, run.err
    assert json.loads(run.out)["plans"][0]["provenance"][0]["model"]["revision"] == sha


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (["a/b", "hf://c/d"], "write it into each, as in hf://owner/name@v1"),
        (["smollm2-135m", "."], "--revision is for models of the hub, and none of smollm2-135m, . is one"),
    ],
)
def test_whose_revision(cli, models: list[str], said: str) -> None:
    run = cli("evaluate", *models, "--revision", "v1")
    assert run.code == 2 and said in run.err and run.err.count("\n") == 1


def test_plans_of_local_models_keep_their_bytes(tiny_llama) -> None:
    fingerprint = sc.plan(tiny_llama, method="magnitude", sparsity=0.5).model
    assert "revision" not in fingerprint.model_dump(mode="json")
