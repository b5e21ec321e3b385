"""A Hub for tests: the endpoints that `huggingface_hub` calls when it pushes and pulls models, with switches to fail.

Standard library only; it listens on 127.0.0.1 and holds everything in memory. Clients find it through their own
``HF_ENDPOINT``; with ``HF_HUB_DISABLE_XET=1`` they speak plain HTTP and LFS to it, as they do to a Hub without Xet.

    with Hub() as hub:
        hub.fail("PUT /lfs/", drop=True)        # the first upload of a large file breaks off half way
        ...                                     # HF_ENDPOINT=hub.url, HF_TOKEN=hub.token

A file of weights, or one above a megabyte, is a large one (LFS). Its content is served from ``localhost``, which is
another host to a client than 127.0.0.1, as the storage behind the real Hub is: a token must not be sent there.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 1_000_000


@dataclasses.dataclass
class Fault:
    """What happens to the next ``times`` requests whose "METHOD path" matches a pattern.

    Attributes:
        pattern: regular expression, searched for.
        times: requests that it hits.
        skip: requests that it lets through before.
        status: answered instead.
        headers: of that answer.
        message: of that answer; servers quote all sorts of things.
        drop: the connection is closed after half of what the client sends was read.
        after: the request is done, then the connection is closed without an answer.
        truncate: the answer is closed after half of its body.
        corrupt: a bit of what was sent is flipped before it is stored.
    """

    pattern: str
    times: int = 1
    skip: int = 0
    status: int | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    message: str = "switched to fail"
    drop: bool = False
    after: bool = False
    truncate: bool = False
    corrupt: bool = False


@dataclasses.dataclass
class Repo:
    """One repository: commits are whole lists of files, branches name commits.

    Attributes:
        private: whether it is answered for without a token.
        branches: commit by branch; pull requests are branches ``refs/pr/N``.
        commits: content by path, by commit; a content is (bytes, whether it is large).
    """

    private: bool = False
    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    commits: dict[str, dict[str, tuple[bytes, bool]]] = dataclasses.field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, tuple[bytes, bool]]) -> str:
        """Add a commit to a branch; returns its name."""
        parent = self.branches.get(branch, "")
        listed = json.dumps({name: hashlib.sha256(data).hexdigest() for name, (data, _) in sorted(files.items())})
        name = hashlib.sha1(f"{parent} {len(self.commits)} {listed}".encode(), usedforsecurity=False).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    def resolve(self, revision: str) -> str | None:
        """Return the commit that a branch or a commit's own name means."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """The server; a context manager that runs it in a thread.

    Attributes:
        tokens: by token, what its owner may do: "read" or "write".
        repos: by name.
        requests: (method, path, Range, whether a token came with it, bytes received) in the order of arrival.
        part_size: large files are uploaded in parts of so many bytes; None for one piece.
    """

    token = "hf_" + "T0ken" * 7

    def __init__(self) -> None:
        self.tokens = {self.token: "write"}
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str | None, bool, int]] = []
        self.part_size: int | None = None
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, pattern: str, **how: Any) -> None:
        """Switch a fault on."""
        self.faults.append(Fault(pattern, **how))

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Return what a revision holds, without the file that every new repository has."""
        found = self.repos[repo]
        commit = found.commits[found.branches[revision]]
        return {name: data for name, (data, _) in commit.items() if name != ".gitattributes"}

    def asked(self, pattern: str) -> list[str]:
        """Return the requests so far that match, as "METHOD path"."""
        lines = [f"{method} {path}" for method, path, *_ in self.requests]
        return [line for line in lines if re.search(pattern, line)]

    def fault_for(self, line: str) -> Fault | None:
        """Return the fault that hits a request, and count it."""
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, line):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


class _Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, code: str = "", message: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message or code, headers or {}


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _item(path: str, data: bytes, large: bool) -> dict[str, Any]:
    item: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
    if large:
        item["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return item


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    # One request -----------------------------------------------------------------------------------------------------

    def _handle(self) -> None:
        split = urlsplit(self.path)
        path, query = unquote(split.path), parse_qs(split.query)
        length = int(self.headers.get("Content-Length") or 0)
        line = f"{self.command} {path}"
        fault = self.hub.fault_for(line) or Fault("")
        body = self.rfile.read(length // 2 if fault.drop else length)
        authorized = "Authorization" in self.headers
        with self.hub.lock:
            self.hub.requests.append((self.command, path, self.headers.get("Range"), authorized, len(body)))
        if fault.drop:
            return self._hang_up()
        try:
            if fault.status is not None:
                raise _Refused(fault.status, "", fault.message, fault.headers)
            if fault.corrupt and body:
                body = body[:-1] + bytes([body[-1] ^ 1])
            status, headers, answer = self._answer(path, query, body)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message, **refused.headers}
            headers = {name: value for name, value in headers.items() if value}
            status, answer = refused.status, json.dumps({"error": refused.message}).encode()
        if fault.after:
            return self._hang_up()
        self._send(status, headers, answer, fault.truncate)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _send(self, status: int, headers: dict[str, str], answer: bytes, truncate: bool) -> None:
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(answer)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer[: len(answer) // 2] if truncate else answer)
            if truncate:
                self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, dict[str, str], bytes]:
        if path.startswith("/lfs/"):
            return self._storage(path, query, body)
        right = self._right()
        with self.hub.lock:
            for pattern, answer in (
                (r"/api/whoami-v2", self._whoami),
                (r"/api/repos/create", self._create),
                (r"/api/validate-yaml", self._validate),
                (r"/api/models/([^/]+/[^/]+)/(preupload|commit)/(.+)", self._write),
                (r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
                (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
                (r"/api/models/([^/]+/[^/]+)/tree/(refs/pr/\d+|[^/]+)(?:/(.*))?", self._tree),
                (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
                (r"/([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", self._resolve),
            ):
                match = re.fullmatch(pattern, path)
                if match:
                    found = answer(*match.groups(), body=body, query=query, right=right)
                    return found if isinstance(found, tuple) else (200, _JSON, json.dumps(found).encode())
        raise _Refused(404, "EntryNotFound", "no such address")

    def _right(self) -> str | None:
        given = self.headers.get("Authorization", "")
        if not given:
            return None
        right = self.hub.tokens.get(given.removeprefix("Bearer "))
        if right is None:
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        return right

    def _repo(self, name: str, right: str | None, writing: bool = False) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and right is None):
            raise _Refused(404 if right else 401, "RepoNotFound", "Repository not found")
        if writing and right != "write":
            raise _Refused(403, "", "you have no write access to this repository")
        return repo

    # Endpoints -------------------------------------------------------------------------------------------------------

    def _whoami(self, right: str | None, **_: Any) -> Any:
        if right is None:
            raise _Refused(401, "", "no token")
        return {"type": "user", "name": "user", "auth": {"accessToken": {"role": right}}}

    def _create(self, body: bytes, right: str | None, **_: Any) -> Any:
        asked = json.loads(body)
        if right != "write":
            raise _Refused(403 if right else 401, "", "a token with write access is needed")
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        exists = name in self.hub.repos
        if not exists:
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            repo = self.hub.repos[name] = Repo(private)
            repo.commit("main", {".gitattributes": (b"*.safetensors filter=lfs\n", False)})
        answer = json.dumps({"url": f"{self.hub.url}/{name}", "name": name, "id": name}).encode()
        return (409 if exists else 200), _JSON, answer

    def _validate(self, body: bytes, **_: Any) -> Any:
        content = json.loads(body)["content"]
        if not re.match(r"---\n(?:[^\t\n]*\n)*?---\n", content):
            return 400, _JSON, json.dumps({"errors": [{"message": "no front matter"}], "warnings": []}).encode()
        return {"errors": [], "warnings": []}

    def _branch(self, name: str, branch: str, right: str | None, **_: Any) -> Any:
        repo = self._repo(name, right, writing=True)
        if branch in repo.branches:
            raise _Refused(409, "", "this branch exists")
        repo.branches[branch] = repo.branches["main"]
        return {}

    def _write(self, name: str, what: str, revision: str, body: bytes, query: Any, right: str | None) -> Any:
        repo = self._repo(name, right, writing="create_pr" not in query)
        head = repo.resolve(revision)
        if head is None:
            raise _Refused(404, "RevisionNotFound", "no such revision")
        if what == "commit":
            return self._commit(name, repo, revision, body, "create_pr" in query)
        files = []
        for asked in json.loads(body)["files"]:
            large = asked["size"] > LARGE or asked["path"].endswith(".safetensors")
            known = repo.commits[head].get(asked["path"])
            oid = None if known is None else hashlib.sha256(known[0]).hexdigest() if known[1] else _git_oid(known[0])
            mode = "lfs" if large else "regular"
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def _commit(self, name: str, repo: Repo, revision: str, body: bytes, create_pr: bool) -> Any:
        files = dict(repo.commits[repo.branches[revision]])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                parent = value.get("parentCommit")
                if parent is not None and parent != repo.branches[revision]:
                    raise _Refused(412, "", "A commit has happened since. Please refresh and try again.")
            elif entry["key"] == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    raise _Refused(400, "", f"{value['path']}: its content was not uploaded")
                files[value["path"]] = (self.hub.stored[value["oid"]], True)
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        target, answer = revision, {}
        if create_pr:
            number = 1 + sum(branch.startswith("refs/pr/") for branch in repo.branches)
            target = f"refs/pr/{number}"
            answer = {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{number}"}
        commit = repo.commit(target, files)
        return {"commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}", **answer}

    def _batch(self, name: str, body: bytes, right: str | None, **_: Any) -> Any:
        if name not in self.hub.repos or right is None:
            raise _Refused(401, "RepoNotFound", "Repository not found")
        objects = []
        for asked in json.loads(body)["objects"]:
            row = {"oid": asked["oid"], "size": asked["size"]}
            if hashlib.sha256(self.hub.stored.get(asked["oid"], b"")).hexdigest() != asked["oid"]:
                href = f"http://localhost:{self.hub.port}/lfs/{asked['oid']}?signature=secret"
                upload: dict[str, Any] = {"href": href}
                if self.hub.part_size is not None:
                    count = -(-asked["size"] // self.hub.part_size)
                    parts = {f"{n:05d}": f"{href}&part={n}" for n in range(1, count + 1)}
                    upload["header"] = {"chunk_size": str(self.hub.part_size), **parts}
                row["actions"] = {"upload": upload}
            objects.append(row)
        return {"transfer": "basic", "objects": objects}

    def _storage(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, dict[str, str], bytes]:
        oid = path.rpartition("/")[2]
        if self.command in ("GET", "HEAD"):
            return self._ranged(self.hub.stored[oid], {})
        with self.hub.lock:
            if self.command == "POST":  # all parts are there
                self.hub.stored[oid] = b"".join(data for _, data in sorted(self.hub.parts.pop(oid).items()))
            elif "part" in query:
                self.hub.parts.setdefault(oid, {})[int(query["part"][0])] = body
            else:
                self.hub.stored[oid] = body
        return 200, {"ETag": hashlib.md5(body, usedforsecurity=False).hexdigest()}, b""

    def _files(self, name: str, revision: str, right: str | None) -> tuple[Repo, str, dict[str, tuple[bytes, bool]]]:
        repo = self._repo(name, right)
        commit = repo.resolve(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", "no such revision")
        return repo, commit, repo.commits[commit]

    def _tree(self, name: str, revision: str, below: str | None, right: str | None, query: Any, **_: Any) -> Any:
        _, _, files = self._files(name, revision, right)
        prefix = f"{below}/" if below else ""
        found = [_item(path, *content) for path, content in sorted(files.items()) if path.startswith(prefix)]
        if prefix and not found:
            raise _Refused(404, "EntryNotFound", "no such folder")
        if query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            found = [item for item in found if "/" not in item["path"].removeprefix(prefix)]
        return found

    def _info(self, name: str, revision: str | None, right: str | None, **_: Any) -> Any:
        repo, commit, files = self._files(name, revision or "main", right)
        siblings = []
        for path, (data, large) in sorted(files.items()):
            row: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": _git_oid(data)}
            if large:
                row["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(row)
        text = files.get("README.md", (b"", False))[0].decode()
        licence = re.search(r"^license: (\S+)$", text, flags=re.MULTILINE)
        card = {"license": licence[1]} if licence else {}
        return {"id": name, "sha": commit, "private": repo.private, "siblings": siblings, "tags": [], "cardData": card}

    def _resolve(self, name: str, revision: str, path: str, right: str | None, **_: Any) -> Any:
        _, commit, files = self._files(name, revision, right)
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found", headers)
        data, large = files[path]
        if not large:
            return self._ranged(data, {**headers, "ETag": f'"{_git_oid(data)}"'})
        oid = hashlib.sha256(data).hexdigest()
        self.hub.stored.setdefault(oid, data)
        headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        return 302, {**headers, "Location": f"http://localhost:{self.hub.port}/lfs/{oid}?signature=secret"}, b""

    def _ranged(self, data: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{_git_oid(data)}"', **headers}
        if match is None:
            return 200, headers, data
        first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
        return 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]


_JSON = {"Content-Type": "application/json"}
