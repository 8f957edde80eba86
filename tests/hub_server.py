"""A model hub on the loopback for huggingface_hub's client. Each fault of a real one can be switched on."""

import hashlib
import json
import socket
import threading
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

BIG = (
    ".safetensors",
    ".bin",
    ".parquet",
)  # stored by their sha256, and served from a host of their own, as far as the client can tell
LOGIN_PAGE = b"<!DOCTYPE html><html><title>Welcome to the guest network</title><form></form></html>"
# fault: (status, X-Error-Code, X-Error-Message)
REFUSALS = {
    "gated": (401, "GatedRepo", "Access to this repository is restricted."),
    "gated, not granted": (403, "GatedRepo", "Access to this repository is restricted."),
    "unknown or private": (401, "RepoNotFound", "Repository not found"),
    "repository gone": (404, "RepoNotFound", "Repository not found"),
    "revision gone": (404, "RevisionNotFound", "Invalid rev id"),
    "file gone": (404, "EntryNotFound", "Entry not found"),
    "bad token": (401, "", "Invalid credentials in Authorization header"),
    "forbidden": (403, "", "Forbidden"),
    "too many requests": (429, "", "Too many requests"),
    "broken": (500, "", "Internal error"),
    "not found": (404, "", ""),
}


class Hub:
    """Serves folders as repositories, and `pages`, until it is closed. `asked` lists requests: "GET /path".

    faults: {pattern of a request as in `asked`: the name of a fault}. It is one of REFUSALS, "login page",
    "silent" (no answer), "cut" (half of a body), or "flipped" (one bit of a body).
    """

    def __init__(self):
        self.repositories, self.pages, self.faults, self.asked = {}, {}, {}, []
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def add(self, repository, revision, folder, kind="model"):
        """Serve the files of a folder as a repository at one revision."""
        folder = Path(folder)
        files = {
            p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
        }
        self.repositories["datasets/" * (kind == "dataset") + repository] = revision, files

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def fault(self, request):
        return next((fault for pattern, fault in self.faults.items() if fnmatch(request, pattern)), None)


def oid(data):
    """What git calls a file."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(
            urlsplit(self.path).path
        )  # a client that takes this for its proxy sends a whole address
        request = f"{self.command} {path}"
        self.hub.asked.append(request)
        fault = self.hub.fault(request)
        if fault == "silent":
            self.hub.closing.wait(60)
            self.close_connection = True
        elif fault == "login page":
            self.answer(200, LOGIN_PAGE, {"Content-Type": "text/html"})
        elif fault in REFUSALS:
            status, code, message = REFUSALS[fault]
            named = {"X-Error-Code": code, "X-Error-Message": message}
            self.answer(
                status,
                b"",
                {k: v for k, v in named.items() if v} | ({"Retry-After": "1"} if status == 429 else {}),
            )
        else:
            self.serve(path, fault)

    def serve(self, path, fault):
        if path in self.hub.pages:
            return self.body(self.hub.pages[path], {}, fault)
        for name, (revision, files) in self.hub.repositories.items():
            api = f"/api/{name}" if name.startswith("datasets/") else f"/api/models/{name}"
            if path == f"{api}/tree/{revision}":
                return self.answer(200, json.dumps([entry(*item) for item in files.items()]).encode())
            if path.startswith(f"{api}/tree/"):
                return self.answer(
                    404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}
                )
            for file, data in files.items():
                if path == f"/{name}/resolve/{revision}/{file}":
                    return self.file(name, revision, file, data, fault)
                if path == f"/blobs/{hashlib.sha256(data).hexdigest()}":
                    return self.body(data, {}, fault)
        return self.answer(
            404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
        )

    def file(self, name, revision, file, data, fault):
        headers = {"X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        if file.endswith(BIG):
            digest = hashlib.sha256(data).hexdigest()
            return self.answer(
                302,
                b"",
                headers
                | {
                    "X-Linked-Etag": f'"{digest}"',
                    "X-Linked-Size": str(len(data)),
                    "Location": f"http://localhost:{self.server.server_port}/blobs/{digest}",
                },
            )
        return self.body(data, headers | {"ETag": f'"{oid(data)}"'}, fault)

    def body(self, data, headers, fault):
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        if fault == "flipped":
            data = data[:-1] + bytes([data[-1] ^ 1])
        status, part = (206, data[start:]) if start else (200, data)
        if start:
            headers = headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        self.answer(status, part, headers, len(part) // 2 if fault == "cut" else None)

    def answer(self, status, body, headers=None, cut=None):
        """`cut`: bytes after which the connection breaks off."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Request-Id": "1"}.items() | (
            headers or {}
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def log_message(self, *_):
        pass


def entry(file, data):
    big = (
        {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}
        if file.endswith(BIG)
        else {}
    )
    return {"type": "file", "oid": oid(data), "size": len(data), "path": file, **big}
