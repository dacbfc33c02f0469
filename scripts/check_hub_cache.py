#!/usr/bin/env python3
"""The Hugging Face cache that we write is the one that huggingface_hub reads, and the other way round.

A server on the loopback interface hands out MODEL_DIR as the hub would. First `reranker` fetches it
into one cache, which huggingface_hub then reads offline; then huggingface_hub fetches it into another,
which `reranker` reads offline. Exit code 1 where either does not find what the other left.

usage: check_hub_cache.py RERANKER MODEL_DIR
"""

import argparse
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODEL = "org/name"
COMMIT = "5f3c8a1e0b7d42964c1fa83e6d92b05747ce18aa"
PAIR = '{"query": "a question", "content": "an answer"}\n'


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download needs."""

    def __init__(self, directory: Path, *args):
        self.directory = directory
        super().__init__(*args)

    def log_message(self, *args) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        """What a file is."""
        self.do_GET()

    def do_GET(self) -> None:
        """The list of files, or one of them."""
        path = self.path.partition("?")[0]
        name = path.removeprefix(f"/{MODEL}/resolve/").partition("/")[2]
        files = sorted(self.directory.iterdir())
        if path.startswith(f"/api/models/{MODEL}/tree/"):
            sizes = [(file.name, file.stat().st_size) for file in files]
            entry = {"type": "file", "oid": COMMIT}
            body = json.dumps([entry | {"path": n, "size": size} for n, size in sizes]).encode()
        elif path.startswith(f"/api/models/{MODEL}"):
            names = [{"rfilename": file.name} for file in files]
            body = json.dumps({"id": MODEL, "sha": COMMIT, "siblings": names}).encode()
        elif name and (self.directory / name).is_file():
            body = (self.directory / name).read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def score(reranker: Path, home: Path, **environment: str) -> str:
    """What `reranker score` says of a pair with the model by its hub id."""
    command = [reranker, "score", "--model", MODEL, "--device", "cpu"]
    environment = os.environ | {"HF_HOME": str(home)} | environment
    return subprocess.run(
        command, input=PAIR, env=environment, text=True, stdout=subprocess.PIPE, check=True
    ).stdout


def main() -> int:
    """Both directions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("reranker", type=Path)
    parser.add_argument("model_dir", type=Path)
    arguments = parser.parse_args()
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Hub, arguments.model_dir.resolve())
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    os.environ |= {"NO_PROXY": "127.0.0.1", "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    # Only now: it reads its environment when it is imported.
    from huggingface_hub import scan_cache_dir, snapshot_download

    with tempfile.TemporaryDirectory() as directory:
        ours, theirs = Path(directory, "ours"), Path(directory, "theirs")
        expected = score(arguments.reranker, ours)
        report = scan_cache_dir(ours / "hub")
        (repository,) = report.repos
        (revision,) = repository.revisions
        found = snapshot_download(MODEL, cache_dir=ours / "hub", local_files_only=True)
        if report.warnings or revision.commit_hash != COMMIT or revision.refs != {"main"}:
            print(f"huggingface_hub does not understand our cache: {report}")
            return 1
        names = sorted(file.file_name for file in revision.files)
        print(f"huggingface_hub reads our cache: {Path(found).name}, {', '.join(names)}")

        snapshot_download(MODEL, cache_dir=theirs / "hub")
        if score(arguments.reranker, theirs, HF_HUB_OFFLINE="1") != expected:
            print("the scores from huggingface_hub's cache are others")
            return 1
        print("reranker reads huggingface_hub's cache, and scores the same")
    return 0


if __name__ == "__main__":
    sys.exit(main())
