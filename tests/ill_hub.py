"""A hub on loopback that is ill on request: its own small repositories, or another hub behind it, and faults by repository.

    with IllHub() as hub:                                     # or IllHub(upstream="http://127.0.0.1:4000") in front of another one
        hub.add("datasets", "org/name", {"train.jsonl": b"..."})
        hub.ill("org/name", status(503), times=2)             # the next two answers about this repository
        hub.ill("org/name", cut(100), times=1, method="GET", path="train")
        ... processes with the environment hub.environment(home) ...

A fault is a function of the healthy answer that returns another one; `times` is how often it comes, None for ever. Like a real hub it names every version of a repository by a commit that follows from its files,
knows older commits until they are made to vanish, and gives every file the git hash of its content as its etag.
"""

import hashlib
import json
import re
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Answer:
    """What goes back to a client; the fields after the body are what a fault can do to the connection."""
    status: int
    headers: dict
    body: bytes = b""
    length: int | None = None  # claimed instead of the real one
    stop_after: int | None = None  # bytes of the body before the connection is reset
    pause: float = 0.0  # seconds before the answer
    trickle: float = 0.0  # seconds between two bytes


# ---- faults ----------------------------------------------------------------------------------------------------------------

def status(code, **headers):
    """Another status, as a hub's front servers give it: a page of HTML."""
    return lambda answer: Answer(code, {"Content-Type": "text/html"} | {name.replace("_", "-"): str(value) for name, value in headers.items()}, b"<html><body><h1>%d</h1></body></html>" % code)


def refused(code, name, message):
    """What the hub itself says when it does not give something."""
    return lambda answer: Answer(code, {"Content-Type": "application/json", "X-Error-Code": name, "X-Error-Message": message}, json.dumps({"error": message}).encode())


def html(answer):
    """A page of HTML with status 200, as a captive portal sends it."""
    return Answer(200, {"Content-Type": "text/html"}, b"<html><body>Please sign in</body></html>")


def html_body(answer):
    """The headers of the hub, and a page of HTML as the content."""
    return replace(answer, body=(b"<html><body>Please sign in</body></html>" * (1 + len(answer.body) // 40))[:len(answer.body)])


def reset(answer):
    """The connection is reset before an answer."""
    return replace(answer, stop_after=-1)


def cut(count):
    """The connection ends after some bytes of the body."""
    return lambda answer: replace(answer, stop_after=count)


def too_short(missing):
    """The answer claims all bytes and ends before them, cleanly."""
    return lambda answer: replace(answer, length=len(answer.body), body=answer.body[:-missing])


def wrong_bytes(answer):
    """As many bytes, but others."""
    return replace(answer, body=bytes(b ^ 1 if i % 7 == 3 else b for i, b in enumerate(answer.body)))


def hang(seconds):
    return lambda answer: replace(answer, pause=seconds)


def trickle(seconds):
    return lambda answer: replace(answer, trickle=seconds)


def redirected(place):
    return lambda answer: Answer(302, {"Location": place})


def changed_json(change):
    """The hub's JSON after a function has changed it."""
    return lambda answer: replace(answer, body=json.dumps(change(json.loads(answer.body))).encode()) if answer.status == 200 else answer


def truncated(share):
    """Only a share of the content, with a length that agrees: as from a server in between that gave up."""
    return lambda answer: replace(answer, body=answer.body[:int(share * len(answer.body))], headers={k: v for k, v in answer.headers.items() if k != "Content-Length"})


def missing_of(commit):
    """A file that is not there, with the commit of which it is not there."""
    return lambda answer: Answer(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such file", "X-Repo-Commit": commit})


def other_headers(**headers):
    return lambda answer: replace(answer, headers={k: v for k, v in (answer.headers | {name.replace("_", "-"): value for name, value in headers.items()}).items() if v is not None})


# ---- the hub ---------------------------------------------------------------------------------------------------------------

@dataclass
class Fault:
    repo: str  # pattern of the repository's id
    change: object
    times: int | None
    method: str
    path: str
    seen: int = 0


@dataclass
class Repository:
    commits: dict = field(default_factory=dict)  # commit -> {path: content}
    main: str = ""


def blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def refuse(code, name, message):
    return refused(code, name, message)(None)


class IllHub:
    """The server; used as a context."""

    def __init__(self, upstream=None):
        self.upstream, self.repositories, self.faults, self.log, self.lock = upstream, {}, [], [], threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub._respond(self, body)

            do_HEAD = do_POST = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home):
        """Environment of a process that sees this hub and a cache of its own."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "1",
                "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_TOKEN": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "XTRANSFER_HUB_WAIT": "0.01", "XTRANSFER_HUB_PATIENCE": "1"}

    def add(self, kind, repo, files):
        """Commit files to a repository; returns the commit, which is main from then on."""
        files = {name: content.encode() if isinstance(content, str) else content for name, content in files.items()}
        commit = hashlib.sha1(json.dumps({name: blob_id(content) for name, content in sorted(files.items())} | {"": repo}).encode()).hexdigest()
        there = self.repositories.setdefault((kind, repo), Repository())
        there.commits[commit], there.main = files, commit
        return commit

    def ill(self, repo, change, times=None, method="GET|HEAD|POST", path=""):
        """Answers about a repository (a pattern) whose path contains `path` are changed, so many times; the fault counts how often it came."""
        fault = Fault(repo, change, times, method, path)
        with self.lock:
            self.faults.append(fault)
        return fault

    def well(self):
        """All faults end."""
        with self.lock:
            self.faults.clear()

    def asked(self, repo, method="GET|HEAD|POST"):
        """Paths that were asked for of a repository."""
        with self.lock:
            return [path for verb, path in self.log if repo in path and re.fullmatch(method, verb)]

    # -- answers --------------------------------------------------------------------------------------------------------------
    def _respond(self, handler, body):
        path = unquote(urlsplit(handler.path).path)
        with self.lock:
            self.log.append((handler.command, path))
        answer = self._forwarded(handler, body) if self.upstream else self._own(handler, path, body)
        with self.lock:
            fault = next((f for f in self.faults if re.search(f"/{f.repo}(/|$)", path) and re.fullmatch(f.method, handler.command) and f.path in path and (f.times is None or f.seen < f.times)), None)
            if fault:
                fault.seen += 1
        self._send(handler, fault.change(answer) if fault else answer)

    def _send(self, handler, answer):
        time.sleep(answer.pause)
        try:
            if answer.stop_after == -1:
                return self._reset(handler)
            handler.send_response(answer.status)
            for name, value in answer.headers.items():
                handler.send_header(name, value)
            if "Content-Length" not in answer.headers:
                handler.send_header("Content-Length", str(answer.length if answer.length is not None else len(answer.body)))
            handler.end_headers()
            if handler.command != "HEAD":
                body = answer.body if answer.stop_after is None else answer.body[:answer.stop_after]
                if answer.trickle:
                    for i in range(len(body)):
                        handler.wfile.write(body[i:i + 1])
                        time.sleep(answer.trickle)
                handler.wfile.write(b"" if answer.trickle else body)
                handler.wfile.flush()
                if answer.stop_after is not None:
                    return self._reset(handler)
            if answer.length is not None:
                handler.close_connection = True
        except OSError:
            handler.close_connection = True

    @staticmethod
    def _reset(handler):
        """End a connection so that the other side hears of a reset."""
        handler.close_connection = True
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    def _forwarded(self, handler, body):
        """The answer of the hub behind this one."""
        kept = {name: value for name, value in handler.headers.items() if name.lower() in ("range", "content-type", "accept", "authorization")}
        request = urllib.request.Request(self.upstream + handler.path, data=body if handler.command == "POST" else None, headers=kept, method=handler.command)
        try:
            with urllib.request.urlopen(request, timeout=60) as found:
                code, headers, content = found.status, found.headers, found.read()
        except urllib.error.HTTPError as error:
            code, headers, content = error.code, error.headers, error.read()
        headers = {name: value for name, value in headers.items() if name.lower() not in ("connection", "transfer-encoding", "date", "server") and (handler.command == "HEAD" or name.lower() != "content-length")}
        return Answer(code, headers, content)

    def _own(self, handler, path, body):
        """The healthy answer of this hub."""
        parts = [part for part in path.split("/") if part]
        if parts[:1] == ["api"] and len(parts) >= 4:
            return self._api(parts[1], f"{parts[2]}/{parts[3]}", parts[4:], parse_qs(urlsplit(handler.path).query), body)
        if "resolve" in parts:
            at = parts.index("resolve")
            kind, names = ("datasets", parts[1:at]) if parts[0] == "datasets" else ("models", parts[:at])
            return self._file(handler, kind, "/".join(names), parts[at + 1], "/".join(parts[at + 2:]))
        return refuse(404, "EntryNotFound", f"nothing at {path}")

    def _version(self, kind, repo, revision):
        """The commit and the files of a revision, or None and the refusal."""
        there = self.repositories.get((kind, repo))
        if there is None:
            return None, refuse(404, "RepoNotFound", f"no repository {repo}")
        commit = there.main if revision in ("main", "refs/heads/main") else revision
        return (commit, there.commits[commit]) if commit in there.commits else (None, refuse(404, "RevisionNotFound", f"{repo} has no revision {revision}"))

    def _api(self, kind, repo, rest, query, body):
        verb = rest[0] if rest else "revision"
        commit, files = self._version(kind, repo, rest[1] if len(rest) > 1 else "main")
        if commit is None:
            return files
        def listed(name):
            return {"type": "file", "oid": blob_id(files[name]), "size": len(files[name]), "path": name}
        if verb == "revision":
            told = {"_id": commit[:24], "id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit, "private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
                    "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z", "siblings": [{"rfilename": name} for name in files]}
        elif verb == "tree":
            prefix = "".join(f"{part}/" for part in rest[2:])
            below = [name for name in files if name.startswith(prefix)]
            if prefix and not below:
                return refuse(404, "EntryNotFound", f"{prefix} does not exist")
            deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            folders = {prefix + "/".join(name[len(prefix):].split("/")[:k]) for name in below for k in range(1, len(name[len(prefix):].split("/")))}
            told = [listed(name) for name in below if deep or "/" not in name[len(prefix):]]
            told += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": name} for name in sorted(folders) if deep or "/" not in name[len(prefix):]]
        elif verb == "paths-info":
            asked = json.loads(body).get("paths", []) if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
            told = [listed(name) for name in ([asked] if isinstance(asked, str) else asked) if name in files]
        else:
            return refuse(404, "EntryNotFound", f"nothing at {verb}")
        return Answer(200, {"Content-Type": "application/json"}, json.dumps(told).encode())

    def _file(self, handler, kind, repo, revision, name):
        commit, files = self._version(kind, repo, revision)
        if commit is None:
            return files
        if name not in files:
            return replace(refuse(404, "EntryNotFound", f"{repo} has no file {name}"), headers={"X-Error-Code": "EntryNotFound", "X-Error-Message": f"no {name}", "X-Repo-Commit": commit})
        content = files[name]
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", "ETag": f'"{blob_id(content)}"', "X-Repo-Commit": commit}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        if asked:
            start, end = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
            if start > end:
                return Answer(416, {"Content-Range": f"bytes */{len(content)}"})
            return Answer(206, headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"}, content[start:end + 1])
        return Answer(200, headers | ({"Content-Length": str(len(content))} if handler.command == "HEAD" else {}), content)
