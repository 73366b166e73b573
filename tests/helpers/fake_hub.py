"""A Hugging Face hub on this machine: the few endpoints that `huggingface_hub` uses, and the ways in which they fail."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Models and data sets by name, each a folder. `requests` are the ones that were made, as "METHOD path"."""

    models: dict[str, Path]
    token: str | None = None
    """without this bearer token every model is gated"""
    breaks: dict[str, int] = field(default_factory=dict)
    """file -> how many of its transfers break off in the middle"""
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    """the Range headers of the files' transfers"""
    url: str = ""
    uploads: Path | None = None
    """the folder of new models; None: uploads are refused"""
    visibility: dict[str, str | None] = field(default_factory=dict)
    """of new models, as it was asked for"""
    objects: dict[str, bytes] = field(default_factory=dict)
    """uploaded large files, by SHA-256"""

    def fetched(self) -> set[str]:
        """The files whose content was asked for."""
        return {line.split("/")[-1] for line in self.requests if line.startswith("GET") and "/resolve/" in line}


def facts(file: Path, name: str) -> dict[str, object]:
    """What the hub's listing says about a file: large ones have a SHA-256, all of them git's name of what is in the repository."""
    content = file.read_bytes()
    named = {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
    if file.suffix in (".safetensors", ".bin"):
        named |= {"blobId": "0" * 40, "lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}}
    return named


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """The hub at `hub.url`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_PUT(self) -> None:
            hub.objects[self.path.split("/")[-1]] = self.rfile.read(int(self.headers["Content-Length"]))
            self.send(200, {}, b"")

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"POST {path}")
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            if hub.uploads is None or self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.send(401 if "Authorization" not in self.headers else 403, {}, b'{"error": "no permission"}')
                return
            lines = [json.loads(line) for line in sent.splitlines()] if sent.startswith(b'{"key"') else [json.loads(sent)]
            self.send(200, {"Content-Type": "application/json"}, json.dumps(self.upload(path, lines)).encode())

        def upload(self, path: str, lines: list[Any]) -> object:
            """The answer to a request of `huggingface_hub.HfApi.create_repo` and `upload_folder`; safetensors go through LFS."""
            if path == "/api/repos/create":
                name = f"{lines[0]['organization']}/{lines[0]['name']}"
                hub.models.setdefault(name, hub.uploads / name).mkdir(parents=True, exist_ok=True)  # type: ignore[operator]
                hub.visibility[name] = lines[0].get("visibility")
                return {"url": f"{hub.url}/{name}"}
            if path == "/api/validate-yaml":
                return {"errors": [], "warnings": []}
            if path.endswith("/preupload/main"):
                modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in lines[0]["files"]}
                return {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]}
            if path.endswith(".git/info/lfs/objects/batch"):
                return {
                    "transfer": "basic",
                    "objects": [{**one, "actions": {"upload": {"href": f"{hub.url}/objects/{one['oid']}"}}} for one in lines[0]["objects"]],
                }
            name = "/".join(path.split("/")[3:5])
            folder = hub.models[name]
            for line in lines:
                value = line["value"]
                if line["key"] != "header":
                    file = folder / value["path"]
                    file.parent.mkdir(exist_ok=True)
                    file.write_bytes(base64.b64decode(value["content"]) if line["key"] == "file" else hub.objects[value["oid"]])
            return {"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}

        def send(self, status: int, headers: dict[str, str], content: bytes, body: bool = True) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            match = re.fullmatch(
                r"(?:/api/models|/api/datasets|/datasets)?/([^/]+/[^/]+)(?:/(resolve|revision|tree)/([^/]+)(?:/(.+))?)?", path
            )
            folder = hub.models.get(match[1]) if match else None
            if match is None or folder is None:
                self.send(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}", body)
                return
            if match[2] == "resolve":
                self.file(folder, match[4], body)
                return
            paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            files = [facts(path, str(path.relative_to(folder))) for path in paths]
            content: object = [{"type": "file", "path": f["rfilename"], "size": f["size"], "oid": f["blobId"]} for f in files]
            if match[2] != "tree":
                content = {
                    "id": match[1],
                    "sha": COMMIT,
                    "siblings": files,
                    "gated": "manual" if hub.token else False,
                    "private": False,
                }
            self.send(200, {"Content-Type": "application/json"}, json.dumps(content).encode(), body)

        def file(self, folder: Path, name: str, body: bool) -> None:
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                status = 403 if "Authorization" in self.headers else 401
                self.send(status, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, b"{}", body)
                return
            if not (folder / name).is_file():
                self.send(404, {"X-Error-Code": "EntryNotFound"}, b"", body)
                return
            content = (folder / name).read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            start, total, status = 0, len(content), 200
            if body and (wanted := self.headers.get("Range")):
                hub.ranges.append(wanted)
                start = int(wanted.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"], status = f"bytes {start}-{total - 1}/{total}", 206
            content = content[start:]
            if body and hub.breaks.get(name, 0):
                hub.breaks[name] -= 1
                self.send(status, {**headers, "Content-Length": str(len(content))}, content, body=False)
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return
            self.send(status, headers, content, body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
