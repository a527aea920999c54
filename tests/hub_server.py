# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Hub stand-in on loopback: create, commit and read model and data set repositories, held in memory.

Use `with HubServer() as hub:` and run client code in a fresh process with `env=hub.environment(home)`, because the
client libraries read these variables when they are imported. That environment also makes the server the proxy of the
client, so a request to any other host ends here and is listed in `hub.unknown_requests`, like every unknown route.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

USER = "me"
CLIENT_VARIABLES = re.compile(r"(HF|HUGGINGFACE|HUGGING_FACE|TRANSFORMERS)_.*|(\w+)_PROXY", re.IGNORECASE)

_REPO = r"/api/(?P<kind>model|dataset)s/(?P<repo_id>[\w.-]+/[\w.-]+)"
# Method, pattern of the still quoted path, name of the handler; the named groups become its unquoted arguments.
# A path that starts with http:// is a request to another host, which comes here because we are the proxy.
ROUTES = [
    ("GET", r"http://datasets-server\.127\.0\.0\.1:\d+/(info|parquet)", "data_set_viewer"),
    ("GET", r"/api/whoami-v2", "who_am_i"),
    ("POST", r"/api/validate-yaml", "validate_card"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("GET", _REPO + r"(/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", _REPO + r"/refs", "refs"),
    ("GET", _REPO + r"/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
    ("POST", _REPO + r"/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", _REPO + r"/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", _REPO + r"/commit/(?P<revision>[^/]+)", "commit"),
    (
        "GET",
        r"/((?P<kind>dataset)s/)?(?P<repo_id>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        "resolve",
    ),
]


class HubError(Exception):
    """An answer that is not 200; `code` is the Hub's name for it (the X-Error-Code header clients look at)."""

    def __init__(self, status: int, code: str, message: str, **fields: str):
        super().__init__(message)
        self.status, self.code, self.fields = status, code, fields


class Repository:
    """The commits of one repository, oldest first: commit id -> path -> content. The last one is `main`."""

    is_private = False

    def __init__(self):
        self.commits: dict[str, dict[str, bytes]] = {}
        self.add({})

    @property
    def head(self) -> str:
        """The id of the newest commit."""
        return next(reversed(self.commits))

    def add(self, files: dict[str, bytes]) -> str:
        """Append a commit with exactly these files; its id depends on the number of commits before it too."""
        listing = [str(len(self.commits)), *(f"{path} {blob_id(files[path])}" for path in sorted(files))]
        commit_id = hashlib.sha1("\n".join(listing).encode()).hexdigest()
        self.commits[commit_id] = files
        return commit_id

    def find(self, revision: str) -> str:
        """Return the commit id of `main` or of a full commit id; the Hub's error for anything else."""
        if revision != "main" and revision not in self.commits:
            raise HubError(404, "RevisionNotFound", f"unknown revision {revision!r}")
        return self.head if revision == "main" else revision


def blob_id(content: bytes) -> str:
    """Return the git object id of a file's content, which the Hub uses as `oid` and as ETag."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def folders(files: dict[str, bytes]) -> set[str]:
    """Return every folder that holds a file, at any depth, without the root."""
    return {"/".join(parts[:depth]) for parts in (path.split("/") for path in files) for depth in range(1, len(parts))}


def entry(files: dict[str, bytes], path: str) -> dict:
    """Return the listing entry of a file, or of a folder if `path` is not a file."""
    if path in files:
        return {"type": "file", "path": path, "size": len(files[path]), "oid": blob_id(files[path])}
    return {"type": "directory", "path": path, "size": 0, "oid": blob_id(path.encode())}


def card_fields(files: dict[str, bytes]) -> dict[str, str]:
    """Return the two fields of the model card header that `pipeline(model=...)` asks the Hub for."""
    header = re.match(r"---\n(.*?)\n---", files.get("README.md", b"").decode(), re.DOTALL)
    return dict(re.findall(r"^(library_name|pipeline_tag): *(\S+)$", header[1], re.MULTILINE)) if header else {}


def apply_operations(files: dict[str, bytes], body: bytes) -> dict[str, bytes]:
    """Return the files after the operations of a commit request (one JSON object a line)."""
    files = dict(files)
    for operation in map(json.loads, body.splitlines()):
        key, value = operation["key"], operation["value"]
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "deletedFile":
            files.pop(value["path"], None)
        elif key == "deletedFolder":
            inside = value["path"].rstrip("/") + "/"
            files = {path: content for path, content in files.items() if not path.startswith(inside)}
        elif key != "header":
            raise HubError(400, "BadRequest", f"commit operation {key!r} is not supported")
    return files


class HubHandler(BaseHTTPRequestHandler):
    """Finds the route of a request, calls its method and sends what that returns as JSON."""

    protocol_version = "HTTP/1.1"  # clients keep the connection
    disable_nagle_algorithm = True  # headers and body are two writes: do not wait for an acknowledgement between them
    timeout = 30
    server: "HubServer"

    def answer(self) -> None:
        """Serve one request of any method; what no route knows is recorded and answered with 404."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, name in ROUTES:
            if route_method == method and (match := re.fullmatch(pattern, path)):
                self.call(name, {key: unquote(value) for key, value in match.groupdict().items() if value})
                return
        self.server.unknown_requests.append(f"{self.command} {self.path}")
        self.send_json({"error": "unknown route"}, status=404)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_CONNECT = answer

    def call(self, name: str, arguments: dict[str, str]) -> None:
        """Look up the repository and the commit that the address names, and send what the route returns."""
        try:
            if "repo_id" in arguments:
                key = (arguments.pop("kind", "model"), arguments.pop("repo_id"))
                if key not in self.server.repositories:
                    raise HubError(404, "RepoNotFound", f"no {key[0]} repository {key[1]!r}")
                repository = self.server.repositories[key]
                commit_id = repository.find(arguments.pop("revision", "main"))
                result = getattr(self, name)(key, repository, commit_id, **arguments)
            else:
                result = getattr(self, name)()
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            self.send_json({"error": str(error), **error.fields}, error.status, headers)
        else:
            if result is not None:
                self.send_json(result)

    def send_json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send a value as JSON."""
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        """Send a whole answer; HEAD gets its headers only."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep the test output quiet."""

    def repo_url(self, key: tuple[str, str]) -> str:
        """Return the address of a repository's page."""
        return f"{self.server.endpoint}/{'datasets/' if key[0] == 'dataset' else ''}{key[1]}"

    # The routes without a repository.

    def who_am_i(self) -> dict:
        """Every token belongs to the one user."""
        return {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}}

    def data_set_viewer(self) -> None:
        """`load_dataset` asks the viewer's host for a converted copy first; there is none."""
        raise HubError(404, "ResponseNotFound", "there is no data set viewer")

    def validate_card(self) -> dict:
        """Every model card is accepted."""
        return {"errors": [], "warnings": []}

    def create_repo(self) -> dict:
        """Make an empty model or data set repository."""
        request = json.loads(self.body)
        kind = request.get("type") or "model"
        if kind not in ("model", "dataset"):
            raise HubError(400, "BadRequest", f"repository type {kind!r} is not supported")
        key = (kind, f"{request.get('organization') or USER}/{request['name']}")
        with self.server.lock:
            if key in self.server.repositories:
                raise HubError(409, "RepoExists", f"{key[1]} already exists", url=self.repo_url(key))
            self.server.repositories[key] = Repository()
            self.server.repositories[key].is_private = request.get("visibility") == "private"
        return {"url": self.repo_url(key), "name": key[1], "id": key[1]}

    # The routes of one repository at one commit.

    def info(self, key: tuple[str, str], repository: Repository, commit_id: str) -> dict:
        """Return the commit id, the paths of the files and the card fields."""
        files = repository.commits[commit_id]
        return {
            "id": key[1],
            "author": key[1].split("/")[0],
            "sha": commit_id,
            "siblings": [{"rfilename": path} for path in sorted(files)],
            "private": False,
            "gated": False,
            "disabled": False,
            "tags": [],
            **card_fields(files),
        }

    def refs(self, key: tuple[str, str], repository: Repository, commit_id: str) -> dict:
        """There is one branch and no tag."""
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": commit_id}
        return {"branches": [main], "tags": [], "converts": [], "pullRequests": []}

    def tree(self, key: tuple[str, str], repository: Repository, commit_id: str, path: str = "") -> list[dict]:
        """List a folder, or with `recursive` all below it."""
        files = repository.commits[commit_id]
        if path and path not in folders(files):
            raise HubError(404, "EntryNotFound", f"no folder {path!r}")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        inside = path + "/" if path else ""
        listed = (name for name in sorted(folders(files) | set(files)) if name.startswith(inside))
        return [entry(files, name) for name in listed if recursive or "/" not in name[len(inside) :]]

    def paths_info(self, key: tuple[str, str], repository: Repository, commit_id: str) -> list[dict]:
        """Return the entries of those of the given paths that exist."""
        files = repository.commits[commit_id]
        asked = parse_qs(self.body.decode()).get("paths", [])
        return [entry(files, path) for path in asked if path in files or path in folders(files)]

    def preupload(self, key: tuple[str, str], repository: Repository, commit_id: str) -> dict:
        """Ask for every file inside the commit request, so that no large file storage is needed."""
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}

    def commit(self, key: tuple[str, str], repository: Repository, commit_id: str) -> dict:
        """Add a commit to `main`."""
        with self.server.lock:
            new_id = repository.add(apply_operations(repository.commits[repository.head], self.body))
        return {"success": True, "commitOid": new_id, "commitUrl": f"{self.repo_url(key)}/commit/{new_id}"}

    def resolve(self, key: tuple[str, str], repository: Repository, commit_id: str, path: str) -> None:
        """Send a file, or the part of it that a Range header asks for."""
        files = repository.commits[commit_id]
        if path not in files:
            raise HubError(404, "EntryNotFound", f"no file {path!r}")
        content, size, status = files[path], len(files[path]), 200
        headers = {"X-Repo-Commit": commit_id, "ETag": f'"{blob_id(content)}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(asked[1]), min(int(asked[2] or size - 1) + 1, size)
            if start >= size:
                self.send(b"", 416, {**headers, "Content-Range": f"bytes */{size}"})
                return
            content, status = content[start:stop], 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self.send(content, status, headers)


class HubServer(ThreadingHTTPServer):
    """The server; as a context manager it serves from its own thread, on a free port of 127.0.0.1."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[tuple[str, str], Repository] = {}  # ("model" or "dataset", "owner/name") -> commits
        self.unknown_requests: list[str] = []
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> "HubServer":
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join(timeout=5)

    def files(self, repo_id: str, kind: str = "model") -> dict[str, bytes]:
        """Return path -> content on `main` of a repository (`kind` is "model" or "dataset")."""
        repository = self.repositories[kind, repo_id]
        return repository.commits[repository.head]

    def environment(self, home: Path) -> dict[str, str]:
        """Return the whole environment of a client process: our own, with this server as the only host it reaches.

        Args:
            home: folder for the client's caches; give a new one for a client that has downloaded nothing yet.
        """
        kept = {name: value for name, value in os.environ.items() if not CLIENT_VARIABLES.fullmatch(name)}
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": "hf_any_token_is_accepted",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # data sets would count the download on another host
            "HTTP_PROXY": self.endpoint,
            "HTTPS_PROXY": self.endpoint,
            "NO_PROXY": "127.0.0.1",
        }
