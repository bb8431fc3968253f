"""A server on this machine that speaks as much of the Hugging Face hub as its client needs to fetch a repository."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.paths.append(f"{self.command} {path}")
        for (name, revision), folder in self.server.repositories.items():
            commit = hashlib.sha1(f"{name}{revision}".encode()).hexdigest()
            for wanted in (revision, commit):
                files = sorted(file.name for file in folder.iterdir())
                if path == f"/api/models/{name}/revision/{wanted}":
                    self._json({"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]})
                    return
                if path == f"/api/models/{name}/tree/{wanted}":
                    self._json([self._entry(folder / file) for file in files])
                    return
                if path.startswith(f"/{name}/resolve/{wanted}/") and path.rsplit("/", 1)[1] in files:
                    content = (folder / path.rsplit("/", 1)[1]).read_bytes()
                    self._send(
                        200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
                    )
                    return
        known = any(path.startswith((f"/api/models/{name}/", f"/{name}/")) for name, _ in self.server.repositories)
        self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})

    @staticmethod
    def _entry(file: Path) -> dict[str, object]:
        content = file.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"type": "file", "path": file.name, "size": len(content), "oid": blob}

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextmanager
def serve(repositories: dict[tuple[str, str], Path]) -> Iterator[ThreadingHTTPServer]:
    """Serves folders as (repository, revision); the server has its `url` and notes the `paths` it was asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.repositories, server.paths = repositories, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
