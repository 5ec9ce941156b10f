"""A hub on this machine: as much of the Hugging Face hub's protocol as `huggingface_hub` needs to load and upload."""

import base64
import hashlib
import json
import re
import shutil
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http

_ROUTES = (
    ("info", re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>.+))?")),
    ("tree", re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)")),
    ("file", re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")),
)
_UPLOAD_ROUTES = {
    "create": re.compile(r"/api/repos/create"),
    "validate": re.compile(r"/api/validate-yaml"),
    "preupload": re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/main"),
    "batch": re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    "commit": re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/main"),
}


def point_at(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """What HF_ENDPOINT and HF_HUB_CACHE set when huggingface_hub is imported, for the length of a test."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # below 1.0
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    set_offline(monkeypatch, False)


def set_offline(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    """What HF_HUB_OFFLINE sets when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    if hasattr(_http, "reset_sessions"):  # below 1.0 a session stays what it was when it was made
        _http.reset_sessions()


class HubServer:
    """
    Serves the repositories below `root` on a free local port, inside a `with` block.

    `root/owner/name/` is the main branch of a repository, `root/owner/name@branch/` another one. A commit is the hash
    of what the folder holds at the time of the request.

    Attributes:
        requests: (method, path) of every request since the last `forget`.
        tokens: access token that a repository asks for, by its name; other ones are public.
        gated: repositories that nobody is let into.
        cut_after: bytes after which the connection drops while a file is sent, by the file's name; each answer uses up
            one entry of the list.
        broken: answer everything with 503.
        write_token: access token that lets its bearer, "owner", create repositories and upload; None: nobody may.
    """

    def __init__(self, root: Path):
        self.root = root
        self.requests: list[tuple[str, str]] = []
        self.tokens: dict[str, str] = {}
        self.gated: set[str] = set()
        self.cut_after: dict[str, list[int]] = {}
        self.broken = False
        self.write_token: str | None = None
        self.large_files: dict[str, bytes] = {}  # uploaded and not yet committed, by SHA-256
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.hub = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def folder(self, repo: str, revision: str = "main") -> Path:
        """Folder of a branch, created if need be: what is put there is served."""
        path = self.root / (repo if revision == "main" else f"{repo}@{revision}")
        path.mkdir(parents=True, exist_ok=True)
        return path

    def forget(self) -> None:
        self.requests.clear()


@dataclass
class _Commit:
    folder: Path
    files: dict[str, str] = field(default_factory=dict)  # path -> ETag
    sha: str = ""

    def __post_init__(self):
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                etag = hashlib.file_digest(file, "sha256").hexdigest()
            self.files[path.relative_to(self.folder).as_posix()] = etag
        self.sha = hashlib.sha1(json.dumps(self.files).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        if self.headers.get("Authorization") != f"Bearer {self.hub.write_token}":
            return self._send_json({"error": "Invalid username or password."}, status=401)
        for name, route in _UPLOAD_ROUTES.items():
            if match := route.fullmatch(path):
                return getattr(self, f"_{name}")(body, **match.groupdict())
        return self._send_error(404)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.requests.append((self.command, self.path))
        digest = hashlib.sha256(body).hexdigest()
        if self.path != f"/large-files/{digest}":
            return self._send_error(400)
        self.hub.large_files[digest] = body
        return self._send_json({})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'owner'}/{asked['name']}"
        exists = (self.hub.root / repo).is_dir()
        self.hub.folder(repo)
        self._send_json({"id": repo, "name": repo, "url": f"{self.hub.url}/{repo}"}, status=409 if exists else 200)

    def _validate(self, body: bytes) -> None:
        self._send_json({"errors": [], "warnings": []})

    def _preupload(self, body: bytes, repo: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._send_json({"files": files})

    def _batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.url}/large-files/{item['oid']}"}}}
            for item in json.loads(body)["objects"]
        ]
        self._send_json({"transfer": "basic", "objects": objects})

    def _commit(self, body: bytes, repo: str) -> None:
        folder = self.hub.folder(repo)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                (folder / value["path"]).write_bytes(self.hub.large_files[value["oid"]])
        sha = _Commit(folder).sha
        self._send_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def log_message(self, *args):
        pass

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        if self.hub.broken:
            return self._send_error(503)
        for name, route in _ROUTES:
            if match := route.fullmatch(path):
                parts = {key: unquote(value or "") for key, value in match.groupdict().items()}
                return self._answer_repository(name, **parts)
        return self._send_error(404)

    def _answer_repository(self, route: str, repo: str, revision: str, path: str = "") -> None:
        if not (self.hub.root / repo).is_dir():
            return self._send_error(404, "RepoNotFound")
        if repo in self.hub.gated:
            return self._send_error(403, "GatedRepo")
        token = self.hub.tokens.get(repo)
        if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
            return self._send_error(401, "RepoNotFound")  # the hub does not tell strangers what exists
        commit = self._find_commit(repo, revision or "main")
        if commit is None:
            return self._send_error(404, "RevisionNotFound")
        if route == "info":
            siblings = [{"rfilename": name} for name in commit.files]
            return self._send_json({"id": repo, "modelId": repo, "sha": commit.sha, "siblings": siblings})
        if route == "tree":
            return self._send_json(
                [
                    {"type": "file", "path": name, "oid": etag, "size": (commit.folder / name).stat().st_size}
                    for name, etag in commit.files.items()
                ]
            )
        if path not in commit.files:
            return self._send_error(404, "EntryNotFound", {"X-Repo-Commit": commit.sha})
        return self._send_file(commit, path)

    def _find_commit(self, repo: str, revision: str) -> _Commit | None:
        owner = self.hub.root / repo
        for folder in (owner, *owner.parent.glob(f"{owner.name}@*")):
            branch = folder.name.partition("@")[2] or "main"
            commit = _Commit(folder)
            if revision in (branch, commit.sha):
                return commit
        return None

    def _send_file(self, commit: _Commit, path: str) -> None:
        file_path = commit.folder / path
        size = file_path.stat().st_size
        start, end = 0, size
        status, headers = 200, {}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else size, size)
            status, headers = 206, {"Content-Range": f"bytes {start}-{end - 1}/{size}"}
        headers |= {"ETag": f'"{commit.files[path]}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        self._send_head(status, end - start, "application/octet-stream", headers)
        if self.command == "HEAD":
            return
        cuts = self.hub.cut_after.get(Path(path).name, [])
        cut = cuts.pop(0) if cuts else None
        with file_path.open("rb") as file:
            file.seek(start)
            if cut is not None:
                self.wfile.write(file.read(cut))
                self.close_connection = True
            elif end == size:
                shutil.copyfileobj(file, self.wfile, 1 << 20)
            else:
                self.wfile.write(file.read(end - start))

    def _send_json(self, content, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self._send_head(status, len(body), "application/json")
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_error(self, status: int, code: str = "", headers: dict[str, str] | None = None) -> None:
        self._send_head(status, 0, "text/plain", {**({"X-Error-Code": code} if code else {}), **(headers or {})})

    def _send_head(self, status: int, length: int, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(length), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
