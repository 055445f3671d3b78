"""A Hugging Face hub on loopback: repositories are folders, listed, served and pushed to as far as its own client asks."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    folder: Path  # of all repositories: OWNER/NAME of models, datasets/OWNER/NAME
    log: list[str]  # paths of the requests
    url: str


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.log.append(path)
        if path == "/api/repos/create":
            name = f"{json.loads(body)['organization']}/{json.loads(body)['name']}"
            (self.server.folder / name).mkdir(parents=True, exist_ok=True)
            return self.tell({"url": f"{self.server.url}/{name}"})
        if path == "/api/validate-yaml":
            return self.tell({"errors": [], "warnings": []})
        api, kind, name, question = re.findall(r"^(/api)?(/models|/datasets)?/([\w-]+/[\w-]+)(.*)$", path)[0]
        folder = self.server.folder / ("datasets" if kind == "/datasets" else "") / name
        file = folder / re.sub(r"^/resolve/\w+/", "", question)
        if api and folder.is_dir():
            self.tell(self.listed(folder, question, body))
        elif api or not file.is_file():
            self.answer(404, X_Error_Code="EntryNotFound" if folder.is_dir() else "RepoNotFound")
        else:
            self.send(file.read_bytes(), ETag=sha1(file.read_bytes()).hexdigest())

    do_HEAD = do_POST = do_GET

    def listed(self, folder: Path, question: str, body: bytes) -> list | dict:
        if match := re.fullmatch(r"/tree/\w+/?(.*)", question):
            return [entry(folder, each) for each in sorted((folder / match[1]).rglob("*"))]
        if question.startswith("/preupload/"):
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if question.startswith("/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    (folder / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
            name = folder.relative_to(self.server.folder)
            return {"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
        siblings = [{"rfilename": entry(folder, each)["path"]} for each in folder.rglob("*") if each.is_file()]
        return {"id": f"{folder.parent.name}/{folder.name}", "sha": COMMIT, "siblings": siblings}

    def tell(self, answer: list | dict) -> None:
        self.answer(200, json.dumps(answer).encode())

    def send(self, data: bytes, **headers: str) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not match:
            return self.answer(200, data, **headers)
        first = int(match[1])
        part = data[first : int(match[2]) + 1 if match[2] else None]
        self.answer(206, part, Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(data)}", **headers)

    def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response_only(status)
        for key, value in {"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def entry(folder: Path, path: Path) -> dict:
    """As the API describes a file or folder."""
    about = {"path": path.relative_to(folder).as_posix(), "oid": sha1(path.name.encode()).hexdigest()}
    return about | (
        {"type": "directory", "size": 0} if path.is_dir() else {"type": "file", "size": path.stat().st_size}
    )


@contextmanager
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """`folder` as the hub that this process's client talks to."""
    import huggingface_hub
    from huggingface_hub import constants

    server = Hub(("127.0.0.1", 0), Handler)
    server.folder, server.url, server.log = folder, f"http://127.0.0.1:{server.server_port}", []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": folder / ".cache",
    }.items():
        monkeypatch.setattr(constants, name, value)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    try:
        yield server
    finally:
        huggingface_hub.HfFileSystem.clear_instance_cache()
        server.shutdown()
        server.server_close()
