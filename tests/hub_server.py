"""A hub of models on this machine: what huggingface_hub's client asks for, over HTTP, from a directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serve(models: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve directories.

    Args:
        models: By the name of the repository; ``gated/...`` needs permission.

    Yields:
        The address, and the list of files that were fetched so far.
    """
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def _answer(self, status: int, body: bytes, head: bool, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if not head:
                self.wfile.write(body)

        def _refuse(self, status: int, code: str, head: bool) -> None:
            self._answer(status, b"{}", head, X_Error_Code=code, X_Error_Message=code)

        def _serve(self, head: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            parts = path.removeprefix("api/models/").split("/")
            name = "/".join(parts[:2])
            if name.startswith("gated/"):
                return self._refuse(403, "GatedRepo", head)
            if name not in models:
                return self._refuse(404, "RepoNotFound", head)
            kind, revision, rest = *(*parts[2:4], "", "")[:2], "/".join(parts[4:])
            if revision not in ("", "main", COMMIT):
                return self._refuse(404, "RevisionNotFound", head)
            files = {
                file.relative_to(models[name]).as_posix(): file for file in models[name].rglob("*") if file.is_file()
            }
            if path.startswith("api/") and kind == "tree":
                tree = [
                    {"type": "file", "path": each, "size": file.stat().st_size, "oid": _oid(file)}
                    for each, file in files.items()
                ]
                return self._answer(200, json.dumps(tree).encode(), head, Content_Type="application/json")
            if path.startswith("api/"):
                info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": each} for each in files]}
                return self._answer(200, json.dumps(info).encode(), head, Content_Type="application/json")
            if rest not in files:
                return self._refuse(404, "EntryNotFound", head)
            if not head:
                fetched.append(rest)
            content = files[rest].read_bytes()
            return self._answer(200, content, head, ETag=f'"{_oid(files[rest])}"', X_Repo_Commit=COMMIT)

        def do_GET(self) -> None:
            self._serve(head=False)

        def do_HEAD(self) -> None:
            self._serve(head=True)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
