"""Serve a Hub on loopback over real HTTP: the endpoints that huggingface_hub and transformers call, kept in memory.

    with HubServer(token="hf_...") as hub:
        hub.fail("commit", 409, Fault(429, headers={"Retry-After": "7"}))  # the next two commits
        ...  # a client with HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET=1
        assert hub.repos["jinv2/minivlm"].files["config.json"]

Standard library only. As on the real Hub, a commit is all or nothing, and large files go to and come from another host
name (here localhost instead of 127.0.0.1), which must not receive the token.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPO, REST = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<rest>.+)"
ROUTES = [
    ("harnesses", "GET", r"/api/agent-harnesses"),
    ("create", "POST", r"/api/repos/create"),
    ("yaml", "POST", r"/api/validate-yaml"),
    ("preupload", "POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)"),
    ("commit", "POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)"),
    ("tag", "POST", rf"/api/models/{REPO}/tag/(?P<revision>[^/]+)"),
    ("tree", "GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/{REST})?"),
    ("info", "GET", rf"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?"),
    ("lfs", "POST", rf"/{REPO}\.git/info/lfs/objects/batch"),
    ("put", "PUT", r"/storage/(?P<oid>[0-9a-f]{64})"),
    ("get", "GET", r"/storage/(?P<oid>[0-9a-f]{64})"),
    ("resolve", "HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/{REST}"),
    ("resolve", "GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/{REST}"),
]


@dataclass
class Fault:
    """Describe what one request gets instead of its answer. `{authorization}` in the body is what the client sent."""

    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: str = '{"error": "made to fail"}'
    cut_after: int | None = None  # bytes of the request's body, after which the connection is reset
    hang: float = 0.0  # seconds without an answer, then the connection is closed
    lost: bool = False  # the request is obeyed, but the connection is closed before the answer


@dataclass
class Request:
    """Record one request; of its token it keeps only whether it was the right one."""

    endpoint: str
    method: str
    path: str
    host: str
    authorized: bool | None  # None: no Authorization header at all
    bytes: int = 0
    status: int | None = None


@dataclass
class Repo:
    """Hold the files, commits and tags of a repository."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)  # id, message, files then
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, message: str) -> str:
        """Record the files as they are now; return the commit's id."""
        state = repr([(name, hashlib.sha1(data).hexdigest()) for name, data in sorted(self.files.items())])
        oid = hashlib.sha1(f"{len(self.commits)} {message} {state}".encode()).hexdigest()
        self.commits.append((oid, message, dict(self.files)))
        return oid

    def resolve(self, revision: str | None) -> str | None:
        """Return the commit that a branch, tag or commit id names; None if there is none."""
        if revision in (None, "main"):
            return self.commits[-1][0]
        oid = self.tags.get(revision, revision)
        return oid if any(oid == commit[0] for commit in self.commits) else None

    def at(self, oid: str) -> dict[str, bytes]:
        """Return the files of a commit."""
        return next(files for commit, _, files in self.commits if commit == oid)


class Refusal(Exception):
    """Answer a request with an error, in the form that huggingface_hub reads."""

    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class HubServer(ThreadingHTTPServer):
    """Serve repositories for one token. Tests read `repos`, `blobs` and `requests`; `fail` orders faults."""

    daemon_threads = True

    def __init__(self, token: str, owners: tuple[str, ...] = ("jinv2",)):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.owners = token, owners
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # large files by SHA-256
        self.requests: list[Request] = []
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}/storage"

    def fail(self, endpoint: str, *faults: int | Fault) -> None:
        """Let the next requests to `endpoint` (a name of ROUTES) fail in this order."""
        assert endpoint in {name for name, _, _ in ROUTES}, endpoint
        self.faults[endpoint].extend(Fault(f) if isinstance(f, int) else f for f in faults)

    def asked(self, endpoint: str) -> list[Request]:
        """Return the requests to an endpoint so far."""
        return [request for request in self.requests if request.endpoint == endpoint]

    def forget(self) -> None:
        """Forget requests and faults, keep repositories."""
        self.requests.clear()
        self.faults.clear()

    def handle_error(self, request, client_address):
        """Print nothing: some clients are made to hang up, and a test reads its own output only."""

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answer one request: record it, apply a fault if one is ordered, and call the method of its endpoint."""

    protocol_version = "HTTP/1.1"  # connections are kept, as the real ones are: a fault must not leave half a request
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the client's acknowledgement of its head
    server: HubServer

    def log_message(self, *args):
        """Print nothing."""

    def do_GET(self):
        """Answer a request of any method."""
        match = self.record()
        with self.server.lock:
            faults = self.server.faults[self.entry.endpoint]
            fault = faults.popleft() if faults else None
        if fault and fault.cut_after is not None:
            self.rfile.read(fault.cut_after)
            return self.reset()
        body = self.read_body()
        self.entry.bytes = len(body)
        if fault and fault.hang:
            time.sleep(fault.hang)
            return self.reset()
        if fault and not fault.lost:
            text = fault.body.replace("{authorization}", self.headers.get("Authorization") or "")
            kind = "application/json" if text.startswith("{") else "text/html"
            return self.answer(fault.status, text.encode(), fault.headers | {"Content-Type": kind})
        status, content, headers = self.obey(match, body)
        if fault and fault.lost:
            return self.reset()
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), headers | {"Content-Type": "application/json"}
        self.answer(status, content, headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def record(self) -> re.Match | None:
        """Enter the request in the server's list; return the match of its path, None for an unknown endpoint."""
        path = unquote(urlsplit(self.path).path)
        for endpoint, method, pattern in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                break
        else:
            endpoint, match = "unknown", None
        sent = self.headers.get("Authorization")
        right = None if sent is None else sent == f"Bearer {self.server.token}"
        self.entry = Request(endpoint, self.command, path, self.headers.get("Host", ""), right)
        self.server.requests.append(self.entry)
        return match

    def obey(self, match: re.Match | None, body: bytes) -> tuple[int, object, dict[str, str]]:
        """Call the method of the endpoint; return status, content and headers."""
        try:
            if match is None:
                raise Refusal(404, f"no such endpoint here: {self.command} {self.entry.path}")
            with self.server.lock:
                return getattr(self, self.entry.endpoint)(body=body, **match.groupdict())
        except Refusal as refusal:
            return refusal.status, {"error": refusal.message}, refusal.headers

    def read_body(self) -> bytes:
        """Read the body of the request, by its length or in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        """Send an answer; to HEAD without its content."""
        self.entry.status = status
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reset(self) -> None:
        """Cut the connection by a reset, as a failing network does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def writable(self, repo: str) -> Repo:
        """Return the repository if the client may write to it."""
        self.signed_in()
        if repo.split("/")[0] not in self.server.owners:
            raise Refusal(403, f"You don't have the rights to write to {repo}")
        return self.existing(repo)

    def readable(self, repo: str, revision: str | None) -> tuple[Repo, str]:
        """Return the repository and a commit of it if the client may read it."""
        found = self.existing(repo)
        if found.private:
            self.signed_in()
        if (oid := found.resolve(revision)) is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found, oid

    def existing(self, repo: str) -> Repo:
        """Return the repository; refuse a request to one that does not exist."""
        if repo not in self.server.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.server.repos[repo]

    def signed_in(self) -> None:
        """Refuse a request without the right token."""
        if not self.entry.authorized:
            raise Refusal(401, "Invalid username or password.")

    # The endpoints, by their names in ROUTES; each returns status, content and headers.

    def harnesses(self, body):  # once a day, for huggingface_hub's statistics
        return 200, {"standardEnvVars": [], "harnesses": {}}, {}

    def create(self, body):
        self.signed_in()
        wanted = json.loads(body)
        owner = wanted.get("organization") or self.server.owners[0]
        repo = f"{owner}/{wanted['name']}"
        if owner not in self.server.owners:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        answer = {"url": f"{self.server.url}/{repo}", "name": repo}
        if repo in self.server.repos:
            return 409, answer | {"error": "You already created this model repo"}, {}
        self.server.repos[repo] = Repo(private=wanted.get("visibility") == "private")
        self.server.repos[repo].files[".gitattributes"] = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.server.repos[repo].commit("initial commit")
        return 200, answer, {}

    def yaml(self, body):
        header = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        if header is None:  # the header is not parsed here: a test looks at it
            return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}, {}
        if "\t" in header[1]:
            return 400, {"errors": [{"message": "YAML: tabs are not allowed"}], "warnings": []}, {}
        return 200, {"errors": [], "warnings": []}, {}

    def preupload(self, repo, revision, body):
        found, answers = self.writable(repo), []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(".safetensors") or file["size"] > 10 * 2**20
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if (old := found.files.get(file["path"])) is not None:
                answer["oid"] = sha256(old) if large else git_oid(old)
            answers.append(answer)
        return 200, {"files": answers}, {}

    def lfs(self, repo, body):
        self.writable(repo)
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self.server.blobs:  # no action for a file that is there already
                item["actions"] = {"upload": {"href": f"{self.server.storage}/{item['oid']}?signature=presigned"}}
        return 200, {"transfer": "basic", "objects": objects}, {}

    def put(self, oid, body):
        if sha256(body) != oid:
            raise Refusal(400, "the content does not have this SHA-256")
        self.server.blobs[oid] = body
        return 200, b"", {}

    def get(self, oid, body):
        return 200, self.server.blobs[oid], {}

    def commit(self, repo, revision, body):
        found, message, files, large = self.writable(repo), "", {}, set()
        files, large = dict(found.files), set(found.large)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.server.blobs:
                        raise Refusal(400, f"{value['path']} was not uploaded")
                    files[value["path"]] = self.server.blobs[value["oid"]]
                    large.add(value["path"])
                case "deletedFile":
                    del files[value["path"]]
        found.files, found.large = files, large
        oid = found.commit(message)
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"}, {}

    def tag(self, repo, revision, body):
        found, name = self.writable(repo), json.loads(body)["tag"]
        if name in found.tags:
            raise Refusal(409, f"Tag reference exists already: {name}")
        found.tags[name] = found.resolve(revision)
        return 200, {}, {}

    def info(self, repo, revision, body):
        found, oid = self.readable(repo, revision)
        names = [{"rfilename": name} for name in found.at(oid)]
        return (
            200,
            {"id": repo, "modelId": repo, "sha": oid, "private": found.private, "tags": [], "siblings": names},
            {},
        )

    def tree(self, repo, revision, rest, body):
        found, oid = self.readable(repo, revision)
        names = [name for name in found.at(oid) if not rest or name.startswith(f"{rest}/")]
        if rest and not names:
            raise Refusal(404, f"{rest} does not exist", "EntryNotFound")
        return 200, [self.listed(found.at(oid)[name], name, name in found.large) for name in names], {}

    def listed(self, data: bytes, name: str, large: bool) -> dict:
        """Return the entry of a file in the listing of a tree."""
        entry = {"type": "file", "oid": git_oid(data), "size": len(data), "path": name}
        return entry | ({"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 130}} if large else {})

    def resolve(self, repo, revision, rest, body):
        found, oid = self.readable(repo, revision)
        if rest not in found.at(oid):
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data, headers = found.at(oid)[rest], {"X-Repo-Commit": oid}
        if rest in found.large:
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256(data)}"'}
            return 302, b"", headers | {"Location": f"{self.server.storage}/{sha256(data)}?signature=presigned"}
        return 200, data, headers | {"ETag": f'"{git_oid(data)}"'}


def sha256(data: bytes) -> str:
    """Return the id of a large file."""
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    """Return the id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
