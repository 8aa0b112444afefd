"""A hub of one's own: what huggingface_hub needs of the Hugging Face hub's HTTP to download."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class Hub:
    """Repositories `{"owner/name": {"commit": {"path": bytes}}}`, the last commit being main.

    Attributes:
        asked: (method, path) of every request.
        served: the (repository, file) pairs whose bytes were asked for.
        gated: repositories that nobody may download from; private: those nobody may see.
        broken: files that are not sent.
        cut: how many bytes of a file are sent before the connection breaks.
        ranges: the Range headers of requests.
        status: answered to everything, instead.
    """

    def __init__(self):
        self.repos, self.tags = {}, {}
        self.asked, self.served, self.ranges = [], [], []
        self.gated, self.private, self.broken = set(), set(), set()
        self.cut = self.status = None

    def add(self, name, folder, commit="a" * 40):
        files = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}
        content = {path: file.read_bytes() for path, file in files.items()}
        self.repos.setdefault(name, {})[commit] = content

    def commit(self, name, revision):
        """Return the commit that a revision of a repository is, or an error's status and code."""
        if name not in self.repos or name in self.private:
            return None, (401, "RepoNotFound")
        commits = self.repos[name]
        revision = self.tags.get((name, revision), revision)
        if revision == "main":
            return list(commits)[-1], None
        return (revision, None) if revision in commits else (None, (404, "RevisionNotFound"))


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_HEAD(self):
            self._answer()

        def do_GET(self):
            self._answer()

        def _answer(self):
            path = unquote(self.path.partition("?")[0])
            path = path.replace("/datasets/", "/models/", 1) if "/api/" in path else path
            path = path.removeprefix("/datasets")
            hub.asked.append((self.command, path))
            if hub.status is not None:
                return self._send(hub.status, {})
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            name, revision = (api[1], api[3]) if api else (file[1], file[2])
            commit, error = hub.commit(name, revision)
            if error is not None:
                return self._send(error[0], {"X-Error-Code": error[1]})
            if api is not None:
                return self._describe(api[2], name, commit)
            if name in hub.gated:
                return self._send(403, {"X-Error-Code": "GatedRepo"})
            return self._file(name, commit, file[3])

        def _describe(self, what, name, commit):
            files = hub.repos[name][commit]
            if what == "revision":
                siblings = [{"rfilename": path} for path in files]
                found = {"id": name, "sha": commit, "siblings": siblings}
            else:
                found = [
                    {"type": "file", "path": path, "size": len(content), "oid": _etag(content)}
                    for path, content in files.items()
                ]
            self._send(200, {"Content-Type": "application/json"}, json.dumps(found).encode())

        def _file(self, name, commit, path):
            content = hub.repos[name][commit].get(path)
            headers = {"X-Repo-Commit": commit}
            if content is None:
                return self._send(404, headers | {"X-Error-Code": "EntryNotFound"})
            headers |= {"ETag": f'"{_etag(content)}"', "X-Linked-Size": str(len(content))}
            if self.command == "GET" and path in hub.broken:
                return self._send(500, headers)
            if self.command == "GET":
                hub.served.append((name, path))
            status, span = 200, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            if span is not None:
                hub.ranges.append(self.headers["Range"])
                size, content = len(content), content[int(span[1]) :]
                headers["Content-Range"] = f"bytes {span[1]}-{size - 1}/{size}"
                status = 206
            return self._send(status, headers, content, hub.cut)

        def _send(self, status, headers, content=b"", cut=None):
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if cut is not None and len(content) > cut:
                content, self.close_connection = content[:cut], True
            self.wfile.write(content)

    return Handler


def _etag(content):
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serving(hub):
    """Serve a hub at the address that is yielded."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
