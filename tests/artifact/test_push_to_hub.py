"""`push_to_hub` against a local endpoint that speaks as much of the Hub's protocol as an upload takes."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Hub(BaseHTTPRequestHandler):
    """Accepts `hf_good` as token and keeps the files of one commit in `server.files`."""

    def log_message(self, *_):
        pass

    def reply(self, body, status=200):
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def do_GET(self):
        self.reply({"id": "org/head", "sha": "0" * 40, "siblings": []})

    def do_HEAD(self):
        self.send_response(200 if self.path.split("/")[-1] in self.server.files else 404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("ETag", '"x"')
        self.end_headers()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_good":
            return self.reply({"error": "Invalid username or password."}, 401)
        url = f"http://127.0.0.1:{self.server.server_port}/org/head"
        if self.path == "/api/repos/create":
            return self.reply({"url": url, "name": "org/head", "id": "0"})
        if self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.reply({"files": files})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.reply({"success": True, "commitOid": "1" * 40, "commitUrl": f"{url}/commit/{'1' * 40}"})
        return self.reply({"errors": [], "warnings": []})


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


PUSH = """
import sys, torch
from hf_value_steer import ValueHead, ValueHeadConfig
torch.manual_seed(0)
head = ValueHead(ValueHeadConfig(hidden_size=8, attribute="toxicity", threshold=0.3))
head.push_to_hub("org/head", token=sys.argv[1])
head.save_pretrained(sys.argv[2])
"""


def push(hub, token, folder):
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-c", PUSH, token, str(folder / "local")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_pushed_head_is_the_saved_head(hub, tmp_path):
    result = push(hub, "hf_good", tmp_path)
    assert result.returncode == 0, result.stderr
    local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    assert set(local) == {"README.md", "config.json", "model.safetensors"}
    assert hub.files == local
    hub.files["README.md"] = b"written by its author"
    assert push(hub, "hf_good", tmp_path).returncode == 0
    assert hub.files["README.md"] == b"written by its author"


def test_a_wrong_token_is_an_error(hub, tmp_path):
    result = push(hub, "hf_bad", tmp_path)
    assert result.returncode != 0 and "401" in result.stderr
    assert hub.files == {}
