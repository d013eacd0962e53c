"""A stand-in for the model hub on 127.0.0.1, and a process that loads models from it with the real code.

`HubStandin` speaks the part of the hub's HTTP interface that downloading needs (model info, tree, resolve,
search) and can misbehave on demand. `Loader` keeps one child process (the hub's client reads its environment
when it is imported) and asks it to load models; run as a script, this file is that child.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_standinsecret0123456789"


@dataclass
class Repo:
    """One repository: its files are those of `folder`, its commit a hash of them."""

    folder: Path
    gated: bool = False
    private: bool = False

    @property
    def files(self) -> dict[str, Path]:
        return {str(p.relative_to(self.folder)): p for p in sorted(self.folder.rglob("*")) if p.is_file()}

    @property
    def commit(self) -> str:
        total = hashlib.sha1(usedforsecurity=False)
        for name, path in self.files.items():
            total.update(name.encode() + path.read_bytes())
        return total.hexdigest()


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None


@dataclass
class HubStandin:
    """The server. `status_for` maps a part of a path to an HTTP status; `cut_after` a file name to the number of
    bytes after which its connection is cut, `cuts_left` how often."""

    repos: dict[str, Repo] = field(default_factory=dict)
    status_for: dict[str, int] = field(default_factory=dict)
    cut_after: dict[str, int] = field(default_factory=dict)
    cuts_left: int = 0
    claimed_sizes: dict[str, int] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    port: int = 0
    connections: set[socket.socket] = field(default_factory=set)
    _server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        hub = self

        class BoundHandler(Handler):
            standin = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), BoundHandler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Close the port and every open connection: new ones are refused from now on."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def unreachable(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self.start()

    def reset(self) -> None:
        self.status_for.clear()
        self.cut_after.clear()
        self.claimed_sizes.clear()
        self.requests.clear()
        self.cuts_left = 0

    def downloads_of(self, name: str) -> list[Request]:
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(f"/{name}") and "/resolve/" in r.path]


class Handler(BaseHTTPRequestHandler):
    standin: HubStandin
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.standin.connections.add(self.connection)

    def finish(self) -> None:
        self.standin.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: Any) -> None:
        return

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.standin.requests.append(Request(self.command, path, self.headers.get("Range")))
        for part, status in self.standin.status_for.items():
            if part in path:
                return self.fail(status, "", "told to fail")
        if path == "/api/models":
            return self.search(parse_qs(url.query).get("search", [""])[0])
        found = self.find(path.removeprefix("/api/models").lstrip("/"))
        if found is None:
            return self.fail(401, "RepoNotFound", "Repository not found")  # the hub does not tell a stranger which repos exist
        name, rest = found
        repo = self.standin.repos[name]
        signed_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo.private and not signed_in:
            return self.fail(401, "RepoNotFound", "Repository not found")
        if path.startswith("/api/models/"):
            return self.describe(name, repo, rest)
        if repo.gated and not signed_in:
            return self.fail(
                401 if "Authorization" not in self.headers else 403, "GatedRepo", "Access to this model is restricted"
            )
        _, revision, file = rest.split("/", 2)
        return self.resolve(repo, revision, file)

    def find(self, path: str) -> tuple[str, str] | None:
        for name in self.standin.repos:
            if path == name or path.startswith(f"{name}/"):
                return name, path[len(name) :].lstrip("/")
        return None

    def search(self, text: str) -> None:
        self.send_json(
            [{"id": name, "modelId": name} for name in self.standin.repos if text.split("-")[0].lower() in name.lower()]
        )

    def describe(self, name: str, repo: Repo, rest: str) -> None:
        kind, _, tail = rest.partition("/")
        revision = tail.split("/")[0] or "main"
        if revision not in ("main", repo.commit):
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        if kind == "tree":
            return self.send_json([tree_entry(file, path) for file, path in repo.files.items()])
        siblings = [
            {"rfilename": file, "size": self.standin.claimed_sizes.get(file, p.stat().st_size)} for file, p in repo.files.items()
        ]
        self.send_json({"id": name, "modelId": name, "sha": repo.commit, "siblings": siblings, "private": False, "tags": []})

    def resolve(self, repo: Repo, revision: str, file: str) -> None:
        if revision not in ("main", repo.commit):
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        if file not in repo.files:
            return self.fail(404, "EntryNotFound", "Entry not found")
        body = repo.files[file].read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        for key, value in file_headers(repo, file, body, start).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.send_body(file, body, start)

    def send_body(self, file: str, body: bytes, start: int) -> None:
        cut = self.standin.cut_after.get(file)
        if cut is None or self.standin.cuts_left <= 0:
            self.wfile.write(body[start:])
            return
        self.standin.cuts_left -= 1
        self.wfile.write(body[start : max(start, cut)])
        self.wfile.flush()
        self.close_connection = True

    def send_json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def fail(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


def tree_entry(name: str, path: Path) -> dict[str, Any]:
    body = path.read_bytes()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(body), "oid": git_hash(body)}
    if is_large(name):
        entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return entry


def file_headers(repo: Repo, name: str, body: bytes, start: int) -> dict[str, str]:
    etag = hashlib.sha256(body).hexdigest() if is_large(name) else git_hash(body)
    headers = {
        "X-Repo-Commit": repo.commit,
        "ETag": f'"{etag}"',
        "Accept-Ranges": "bytes",
        "Content-Length": str(len(body) - start),
    }
    if start:
        headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
    if is_large(name):
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(body))}
    return headers


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def git_hash(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()


class Loader:
    """A child process that loads models by the product's code, against one hub and one cache."""

    def __init__(self, endpoint: str, home: Path) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE"))}
        environment |= {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )

    def load(
        self, base: str, *, revision: str | None = None, consent: str | None = None, token: str | None = None
    ) -> dict[str, Any]:
        """What `load_base` gave: facts and notes, or the error as `{code, message, remedy}`."""
        assert self.process.stdin and self.process.stdout
        print(
            json.dumps({"base": base, "revision": revision, "consent": consent, "token": token}),
            file=self.process.stdin,
            flush=True,
        )
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    from finetuneflow.errors import FineTuneFlowError
    from finetuneflow.models.load import load_base
    from finetuneflow.models.source import ModelSource

    os.environ.pop("HF_TOKEN", None)
    if job["token"]:
        os.environ["HF_TOKEN"] = job["token"]
    try:
        loaded = load_base(ModelSource(job["base"], job["revision"], job["consent"]), dtype="fp32", device="cpu")
    except FineTuneFlowError as error:
        return {
            "code": error.code,
            "message": error.message,
            "remedy": error.remedy,
            "text": str(error),
            "context": error.context,
        }
    weights = sum(p.double().sum().item() for p in loaded.model.parameters())
    return {
        "facts": loaded.facts.to_dict(),
        "notes": loaded.notes,
        "weights": weights,
        "marker": getattr(loaded.model, "marker", None),
    }


def _serve() -> None:
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = 16 * 1024  # the client keeps whole chunks only; tiny files need small ones
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the answers
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line)), default=str), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
