"""A hub on loopback: as much of its HTTP as huggingface_hub speaks to upload and to download a repository."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_secretsecretsecretsecretsecretsec"
_REGULAR = 4096  # bytes up to which a file is not sent as LFS


@dataclass
class Repository:
    """What was committed. `commits`: the paths of each."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


@dataclass
class Hub:
    """The state of the server. `fail_with`: a status that every request gets; `received`: bytes of LFS objects."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    fail_with: int | None = None
    received: int = 0
    address: str = ""

    def environment(self, home: str) -> dict[str, str]:
        """What a child needs to talk to this hub and no other."""
        return {"HF_ENDPOINT": self.address, "HF_TOKEN": TOKEN, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def hub_server() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _refused(self) -> bool:
            if hub.fail_with is not None:
                self._answer(hub.fail_with, {"error": "the hub is tired"})
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}" and not self.path.startswith("/lfs/"):
                self._answer(401, {"error": "Invalid username or password."})
            else:
                return False
            return True

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self._refused():
                return
            assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
            hub.objects[self.path.rpartition("/")[2]] = content
            hub.received += len(content)
            self._answer(200)

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self._refused():
                return
            if self.path == "/api/repos/create":
                asked = json.loads(content)
                name = f"{asked['organization']}/{asked['name']}"
                exists = name in hub.repositories
                hub.repositories.setdefault(
                    name,
                    Repository("private" in (asked.get("visibility"), asked.get("private") and "private")),
                )
                self._answer(409 if exists else 200, {"url": f"{hub.address}/{name}"})
            elif self.path == "/api/validate-yaml":
                self._answer(200, {"errors": [], "warnings": []})
            elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
                known = hub.repositories[match[1]].files
                files = [self._mode(file, known) for file in json.loads(content)["files"]]
                self._answer(200, {"files": files})
            elif match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", self.path):
                objects = [self._upload(each) for each in json.loads(content)["objects"]]
                self._answer(200, {"transfer": "basic", "objects": objects})
            elif match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
                self._commit(hub.repositories[match[1]], content)
                self._answer(200, {"commitUrl": f"{hub.address}/{match[1]}/commit/x", "commitOid": "x" * 40})
            else:
                self._answer(404, {"error": f"no such call: {self.path}"})

        def _mode(self, file: dict[str, Any], known: dict[str, bytes]) -> dict[str, Any]:
            large = file["size"] > _REGULAR or not file["path"].endswith((".md", ".json", ".yaml", ".jinja"))
            there = known.get(file["path"])
            oid = None if there is None else hashlib.sha256(there).hexdigest() if large else git_oid(there)
            mode = "lfs" if large else "regular"
            return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        def _upload(self, asked: dict[str, Any]) -> dict[str, Any]:
            upload = {"upload": {"href": f"{hub.address}/lfs/{asked['oid']}"}}
            return {**asked, **({} if asked["oid"] in hub.objects else {"actions": upload})}

        def _commit(self, repository: Repository, content: bytes) -> None:
            paths = []
            for line in filter(None, content.decode().splitlines()):
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    assert value["encoding"] == "base64"
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    repository.files[value["path"]] = hub.objects[value["oid"]]
                elif entry["key"] == "deletedFile":
                    del repository.files[value["path"]]
                if entry["key"] != "header":
                    paths.append(value["path"])
            repository.commits.append(paths)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if self._refused():
                return
            path = self.path.partition("?")[0]
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/.*)?", path):
                self._facts(match[1], match[2] or "")
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                repository = hub.repositories.get(match[1])
                if repository is None or match[2] not in repository.files:
                    code = "RepoNotFound" if repository is None else "EntryNotFound"
                    self._answer(404, {"error": code}, {"X-Error-Code": code})
                    return
                content = repository.files[match[2]]
                tag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": repository.sha}
                self._answer(200, content, tag)
            else:
                self._answer(404, {"error": f"no such call: {self.path}"})

        def _facts(self, name: str, what: str) -> None:
            repository = hub.repositories.get(name)
            if repository is None:
                self._answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
            elif what.startswith("/tree/"):
                folder = what.split("/", 3)[3] if what.count("/") > 2 else ""
                files = [
                    (path, content) for path, content in repository.files.items() if path.startswith(folder)
                ]
                entries = [{"type": "file", "path": p, "size": len(c), "oid": git_oid(c)} for p, c in files]
                self._answer(200, entries)
            else:
                siblings = [{"rfilename": path} for path in repository.files]
                facts = {
                    "id": name,
                    "sha": repository.sha,
                    "private": repository.private,
                    "siblings": siblings,
                }
                self._answer(200, {**facts, "modelId": name, "tags": []})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
