"""A model hub on this machine: the routes of the Hugging Face hub that a download and an upload use, and its faults."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_" + "a" * 34


@dataclass
class Repo:
    """Commits are whole listings; ``refs`` names some of them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], *refs: str) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = files
        for ref in refs or ("main",):
            self.refs[ref] = sha
        return sha

    def files(self, ref: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs.get(ref, ref)]


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    token: str | None


class FakeHub:
    """A server with repositories in memory. Faults are set per file name, and each happens once unless it says so.

    ``cuts``: file → bytes after which the connection breaks, one for every request until none are left.
    ``stalls``: file → (bytes, seconds): silence after that many bytes, once. ``trickle``: seconds before every 16 KiB.
    ``meanwhile``: part of a request → what happens when it comes, once.
    ``failing``: parts of a path that are answered with a status, until removed.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.cuts: dict[str, list[int]] = {}
        self.stalls: dict[str, tuple[int, float]] = {}
        self.failing: dict[str, int] = {}
        self.meanwhile: dict[str, Callable[[], object]] = {}
        self.trickle = 0.0
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo_id: str, folder: Path, *refs: str, **properties: bool) -> str:
        """A commit with the files of a folder; returns its sha."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        repo = self.repos.setdefault(repo_id, Repo(**properties))
        return repo.commit(files, *refs)

    def fetched(self, method: str = "GET") -> list[str]:
        """Names of the files that were asked for."""
        return [r.path.split("/", 5)[5] for r in self.requests if r.method == method and "/resolve/" in r.path]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range"), token))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for part in [part for part in self.hub.meanwhile if part in f"{self.command} {path}"]:
            self.hub.meanwhile.pop(part)()
        for part, status in self.hub.failing.items():
            if part in f"{self.command} {path}":
                return self._answer(status, {"error": "out of order"})
        if token is not None and token != TOKEN:
            return self._answer(401, {"error": "Invalid credentials in Authorization header"}, message=True)
        routes = (
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate),
            (r"/api/models/(?P<id>[^/]+/[^/]+)(/revision/(?P<ref>.+))?", self._info),
            (r"/api/models/(?P<id>[^/]+/[^/]+)/tree/(?P<ref>[^/]+)", self._tree),
            (r"/api/models/(?P<id>[^/]+/[^/]+)/preupload/(?P<ref>[^/]+)", self._preupload),
            (r"/api/models/(?P<id>[^/]+/[^/]+)/commit/(?P<ref>[^/]+)", self._commit),
            (r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/lfs/(?P<oid>\w+)", self._put),
            (r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<ref>[^/]+)/(?P<file>.+)", self._resolve),
        )
        for pattern, answer in routes:
            if found := re.fullmatch(pattern, path):
                return answer(**found.groupdict())
        return self._answer(404, {"error": f"no route {path}"})

    # -- reading -----------------------------------------------------------------------------------------------------

    def _repo(self, id: str, ref: str | None, write: bool = False) -> tuple[Repo, str] | None:
        """The repository and the sha, or None after an error was answered as the hub does."""
        token = self.headers.get("Authorization")
        repo = self.hub.repos.get(id)
        if repo is None or (repo.private and not token):
            return self._answer(404 if token else 401, {"error": "Repository not found"}, code="RepoNotFound")
        if repo.gated and not token:
            return self._answer(401, {"error": f"Access to model {id} is restricted."}, code="GatedRepo")
        if write and not token:
            return self._answer(401, {"error": "Invalid username or password."})
        sha = repo.refs.get(ref or "main", ref or "main")
        if sha not in repo.commits:
            return self._answer(404, {"error": f"Invalid rev id: {ref}"}, code="RevisionNotFound")
        return repo, sha

    def _info(self, id: str, ref: str | None) -> None:
        if found := self._repo(id, ref):
            repo, sha = found
            siblings = [{"rfilename": name} for name in repo.commits[sha]]
            info = {"id": id, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings}
            self._answer(200, {"_id": "0", "modelId": id, **info})

    def _tree(self, id: str, ref: str) -> None:
        if found := self._repo(id, ref):
            repo, sha = found
            files = repo.commits[sha].items()
            self._answer(
                200, [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in files]
            )

    def _resolve(self, id: str, ref: str, file: str) -> None:
        found = self._repo(id, ref)
        if not found:
            return
        repo, sha = found
        content = repo.commits[sha].get(file)
        if content is None:
            return self._answer(404, {"error": "Entry not found"}, code="EntryNotFound")
        start = int(re.findall(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", sha)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self._send_slowly(file, content[start:])

    def _send_slowly(self, file: str, content: bytes) -> None:
        cuts = self.hub.cuts.get(file, [])
        end = cuts.pop(0) if cuts else None
        stall = self.hub.stalls.pop(file, None)
        sent = 0
        while sent < len(content):
            step = content[sent : sent + 16384]
            if end is not None:
                step = step[: end - sent]
                if not step:
                    self.close_connection = True
                    return
            if stall and sent >= stall[0]:
                time.sleep(stall[1])
                stall = None
            if self.hub.trickle:
                time.sleep(self.hub.trickle)
            try:
                self.wfile.write(step)
            except OSError:
                self.close_connection = True
                return
            sent += len(step)

    # -- writing -----------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        wanted = json.loads(self.body)
        id = f"{wanted['organization']}/{wanted['name']}"
        if id in self.hub.repos:
            return self._answer(
                409, {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{id}"}
            )
        self.hub.repos[id] = Repo(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        self.hub.repos[id].commit({".gitattributes": b""})
        return self._answer(200, {"url": f"{self.hub.endpoint}/{id}", "name": id})

    def _validate(self) -> None:
        """The rules for a model card's head that ours can break: a mapping, known types, a base model that is an id."""
        content = json.loads(self.body)["content"]
        errors = []
        found = re.match(r"---\n(.*?)\n---\n", content, re.S)
        head = yaml.safe_load(found[1]) if found else None
        if not isinstance(head, dict):
            errors.append("no metadata")
        else:
            if "base_model" in head and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(head["base_model"])):
                errors.append('"base_model" with value must be a valid model id')
            if not all(isinstance(tag, str) for tag in head.get("tags", [])):
                errors.append('"tags" must be an array of strings')
            errors += [f'"{key}" must be a string' for key in ("library_name", "pipeline_tag") if not head.get(key)]
        body = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._answer(400 if errors else 200, body)

    def _preupload(self, id: str, ref: str) -> None:
        if self._repo(id, ref, write=True):
            files = json.loads(self.body)["files"]
            mode = {True: "lfs", False: "regular"}
            self._answer(
                200,
                {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": mode[f["path"].endswith(".safetensors")],
                            "shouldIgnore": False,
                        }
                        for f in files
                    ]
                },
            )

    def _batch(self, id: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}
            objects.append({**wanted, **({} if wanted["oid"] in self.hub.blobs else {"actions": upload})})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self._answer(200, {})

    def _commit(self, id: str, ref: str) -> None:
        found = self._repo(id, ref, write=True)
        if not found:
            return
        repo, sha = found
        files = dict(repo.commits[sha])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", sha) != sha:
                return self._answer(412, {"error": "A commit has happened since"})
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        new = repo.commit(files)
        self._answer(200, {"commitUrl": f"{self.hub.endpoint}/{id}/commit/{new}", "commitOid": new})

    def _answer(self, status: int, document: Any, code: str | None = None, message: bool = False) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if message:
            self.send_header("X-Error-Message", document["error"])
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
