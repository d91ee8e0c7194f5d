"""The hub's real client against a server on this machine that speaks the hub's protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import json, sys
from mobile_export.checkpoint import resolve
from mobile_export.errors import ExportError
try:
    checkpoint = resolve(sys.argv[1], revision=sys.argv[2] if len(sys.argv) > 2 else None)
    words = [checkpoint.name, checkpoint.spec, checkpoint.license, checkpoint.digest]
    print(json.dumps([*words, checkpoint.provenance]))
except ExportError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture
def hub(sandbox):
    """A hub with one repository, `org/Tiny`, which has the branch `main` and an unwanted pickle."""
    files = {p.name: p.read_bytes() for p in sandbox().folder.iterdir() if not p.name.startswith(".")}
    files["README.md"] = b"---\nlicense: apache-2.0\n---\n"
    files["pytorch_model.bin"] = b"pickle"
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            path = self.path.partition("?")[0]
            asked.append(path)
            name = path.rpartition("/")[2]
            if path.startswith("/api/models/org/Tiny/revision/") and name in ("main", COMMIT):
                siblings = [{"rfilename": file} for file in files]
                table = {"id": "org/Tiny", "sha": COMMIT, "siblings": siblings, "private": False}
                self.reply(200, json.dumps(table).encode(), body)
            elif path == f"/api/models/org/Tiny/tree/{COMMIT}":
                tree = [
                    {"type": "file", "path": file, "size": len(data), "oid": file}
                    for file, data in files.items()
                ]
                self.reply(200, json.dumps(tree).encode(), body)
            elif path.startswith(f"/org/Tiny/resolve/{COMMIT}/") and name in files:
                self.reply(200, files[name], body)
            elif path.startswith("/api/models/org/Tiny/"):
                self.reply(404, b"{}", body, code="RevisionNotFound")
            else:
                self.reply(404, b"{}", body, code="RepoNotFound")

        def reply(self, status, data, body, code=None):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Type", "application/json")
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.asked = asked
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def ask(hub, tmp_path):
    """Resolve in a process of its own: the client reads its settings once."""

    def run(*arguments, **env):
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        command = [sys.executable, "-c", PROGRAM, *arguments]
        done = subprocess.run(command, env=os.environ | settings | env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_download_then_offline(ask, hub, sandbox):
    name, spec, licence, digest, provenance = ask("org/Tiny")
    assert (name, spec, licence) == ("tiny", "org/Tiny", "Apache-2.0")
    assert provenance == {
        "kind": "hub",
        "repository": "org/Tiny",
        "requested": "main",
        "revision": COMMIT,
    }
    assert digest == sandbox().digest
    assert not any("pytorch_model.bin" in path for path in hub.asked)
    assert ask("org/Tiny", HF_HUB_OFFLINE="1")[4] == provenance


def test_revision_and_its_short_form(ask):
    assert ask("org/Tiny", COMMIT)[4]["requested"] == COMMIT
    assert ask(f"org/Tiny@{COMMIT}")[4]["requested"] == COMMIT
    assert "two revisions: 'main' and 'dev'" in ask("org/Tiny@main", "dev")


def test_no_such_model_or_revision(ask):
    assert "the hub has no model 'org/none'" in ask("org/none")
    assert "'org/Tiny' has no revision 'dev'" in ask("org/Tiny@dev")


def test_offline(ask):
    says = ask("org/Tiny", HF_HUB_OFFLINE="1")
    assert says.startswith("cannot reach the hub, and 'org/Tiny' is not in its cache")
    says = ask("qwen3-0.6b", HF_ENDPOINT="http://127.0.0.1:9")
    assert says.startswith("cannot reach the hub, and 'Qwen/Qwen3-0.6B' is not in its cache")
