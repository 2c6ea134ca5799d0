"""`push_to_hub` against a local endpoint that speaks as much of the Hub's protocol as an upload takes."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from hf_value_steer import GuidanceModule, GuidanceModuleConfig, SteeringVectors, ValueHead, ValueHeadConfig
from hf_value_steer.calibration import Calibration
from hf_value_steer.cards.head import written_limits
from hf_value_steer.cards.parts import LIMITS_PLACEHOLDER
from hf_value_steer.hub import push_head
from tests import documents, hostile


class Hub(BaseHTTPRequestHandler):
    """Accepts `hf_good` as token, and keeps files in `server.files`; weights go through LFS, as on the Hub.

    `server.faults` lists `(part of a path, fault)`: the next request for it meets that fault, "drop" or a status.
    """

    def log_message(self, *_):
        pass

    def reply(self, body, status=200):
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def meets_fault(self):
        self.server.requests.append(f"{self.command} {self.path}")
        for planned in self.server.faults:
            part, fault = planned
            if part in self.path:
                self.server.faults.remove(planned)
                if fault != "drop":
                    self.reply({"error": "Something went wrong."}, fault)
                return True
        return False

    def do_GET(self):
        if self.meets_fault():
            return
        if "/resolve/" in self.path:
            return self.file(self.server.files.get(self.path.split("/")[-1]), with_content=True)
        if "/tree/" in self.path:
            files = sorted(self.server.files.items())
            return self.reply([{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files])
        names = [{"rfilename": name} for name in sorted(self.server.files)]
        self.reply({"id": "org/head", "sha": "1" * 40, "siblings": names})

    def do_HEAD(self):
        if not self.meets_fault():
            self.file(self.server.files.get(self.path.split("/")[-1]), with_content=False)

    def file(self, content, with_content):
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if with_content and content:
            self.wfile.write(content)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.meets_fault():
            self.server.blobs[self.path.split("/")[-1]] = body
            self.reply({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.meets_fault():
            return
        if self.headers.get("Authorization") != "Bearer hf_good":
            return self.reply({"error": "Invalid username or password."}, 401)
        url = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            return self.reply({"url": f"{url}/org/head", "name": "org/head", "id": "0"})
        if self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            return self.reply({"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            wanted = [
                {**each, "actions": {"upload": {"href": f"{url}/blob/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": wanted})
        if self.path.endswith("/commit/main"):
            return self.commit(list(map(json.loads, body.splitlines())), f"{url}/org/head/commit/{'1' * 40}")
        return self.reply({"errors": [], "warnings": []})

    def commit(self, lines, url):
        changes = {}
        for line in lines:
            if line["key"] == "file":
                changes[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                changes[line["value"]["path"]] = self.server.blobs[line["value"]["oid"]]
        self.server.files |= changes
        self.server.commits.append(sorted(changes))
        self.reply({"success": True, "commitOid": "1" * 40, "commitUrl": url})


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.blobs, server.commits, server.requests, server.faults = {}, {}, [], [], []
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


def python(hub, script, folder, *arguments):
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def push(hub, token, folder):
    return python(hub, PUSH, folder, token, str(folder / "local"))


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


@pytest.fixture
def run(tmp_path):
    """The folder of a run: a calibrated head with its card, and its evaluation."""
    torch.manual_seed(0)
    head = ValueHead(ValueHeadConfig(hidden_size=8, **documents.HEAD))
    head.calibration = Calibration.from_scores(torch.rand(100).numpy(), mode="pac", sampling={"do_sample": True})
    head.save_pretrained(tmp_path / "run" / "head")
    (tmp_path / "run" / "evaluation").mkdir()
    (tmp_path / "run" / "evaluation" / "evaluation.json").write_text(json.dumps(documents.evaluation()))
    (tmp_path / "run" / "evaluation" / "report.html").write_text("<!DOCTYPE html><title>report</title>")
    return tmp_path / "run"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


NAMES = ["README.md", "calibration.json", "config.json", "evaluation.json", "model.safetensors", "report.html"]

# Pushes once for each JSON object of options that it is given, and says what came of it.
PUSH_HEAD = """
import json, sys
from hf_value_steer.hub import UploadError, push_head
run = sys.argv[1]
for options in map(json.loads, sys.argv[2:]):
    try:
        print("URL", push_head(f"{run}/head", "org/head", evaluation=f"{run}/evaluation", **options).url)
    except UploadError as error:
        print("ERROR", " ".join(str(error).split()))
"""
GOOD = json.dumps({"limits": "It knows no slang.", "token": "hf_good"})

LOAD = """
import sys
from huggingface_hub import snapshot_download
from hf_value_steer import ValueHead
snapshot_download("org/head", local_dir=sys.argv[1])
head = ValueHead.from_pretrained("org/head")
print(head.config.attribute, head.calibration.n)
"""


def test_a_run_is_pushed_as_one_commit_and_comes_back(hub, run, tmp_path):
    before = contents(run)
    planned = push_head(
        run / "head", "org/head", evaluation=run / "evaluation", limits="It knows no slang.", dry_run=True
    )
    result = python(hub, PUSH_HEAD, tmp_path, str(run), GOOD)
    assert result.stdout == f"URL http://127.0.0.1:{hub.server_port}/org/head/commit/{'1' * 40}\n", result.stderr
    assert hub.commits == [NAMES]
    facts = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in hub.files.items()}
    assert facts == planned.files and hub.files["README.md"].decode() == planned.card
    result = python(hub, LOAD, tmp_path, str(tmp_path / "again"))
    assert result.stdout == "toxicity 100\n", result.stderr
    downloaded = {name: content for name, content in contents(tmp_path / "again").items() if name in NAMES}
    assert downloaded == hub.files
    assert contents(run) == before
    assert all(hub.files[name] == before[f"head/{name}"] for name in ("config.json", "model.safetensors"))


def test_an_upload_that_fails_is_an_error_and_can_be_repeated(hub, run, tmp_path):
    before = contents(run)
    hub.faults += [("/preupload/", 401), ("/commit/", "drop"), ("/commit/", 500), ("/blob/", "drop")]
    bad = json.dumps({"limits": "It knows no slang.", "token": "hf_bad"})
    result = python(hub, PUSH_HEAD, tmp_path, str(run), bad, GOOD, GOOD, GOOD, GOOD)
    *failed, pushed = result.stdout.splitlines()
    assert len(failed) == 4 and hub.faults == [], result.stderr
    for line, reason in zip(failed, ("401", "401", "disconnected", "500"), strict=True):
        assert line.startswith("ERROR The upload to org/head did not complete: ") and reason in line
        assert "/run/head is as it was." in line and "`hf auth login`" in line and "Then push again" in line
    assert pushed.startswith("URL ") and hub.commits == [NAMES]
    assert contents(run) == before


def test_a_generated_card_on_the_hub_is_renewed_and_another_is_kept(hub, run, tmp_path):
    again = json.dumps({"limits": "It knows no slang, nor irony.", "token": "hf_good"})
    result = python(hub, PUSH_HEAD, tmp_path, str(run), GOOD, again)
    assert result.stdout.count("URL") == 2, result.stderr
    assert written_limits(hub.files["README.md"].decode()) == "It knows no slang, nor irony."
    hub.files["README.md"] = b"written by its author"
    assert python(hub, PUSH_HEAD, tmp_path, str(run), GOOD).stdout.startswith("URL")
    assert hub.files["README.md"] == b"written by its author"
    assert hub.commits[-1] == NAMES[1:]


def test_a_dry_run_shows_everything_and_needs_no_hub(run):
    before = contents(run)
    planned = push_head(
        run / "head", "org/head", evaluation=run / "evaluation", limits="It knows no slang.", dry_run=True
    )
    assert planned.url is None and sorted(planned.files) == NAMES
    weights = before["head/model.safetensors"]
    assert planned.files["model.safetensors"] == (len(weights), hashlib.sha256(weights).hexdigest())
    shown = str(planned)
    assert shown.startswith("org/head: dry run, nothing was uploaded\n") and planned.card in shown
    assert all(
        name in shown and f"{size:,} bytes" in shown and digest in shown
        for name, (size, digest) in planned.files.items()
    )
    assert contents(run) == before
    alone = push_head(run / "head", "org/head", accept_limits=True, dry_run=True)
    assert sorted(alone.files) == ["README.md", "calibration.json", "config.json", "model.safetensors"]


def test_somebody_has_to_write_or_accept_the_limits(run):
    head = run / "head"
    for blank in (None, ""):
        with pytest.raises(ValueError, match="Nobody has written the limits of this head: pass `limits`"):
            push_head(head, "org/head", limits=blank, dry_run=True)
    accepted = push_head(head, "org/head", accept_limits=True, dry_run=True).card
    assert LIMITS_PLACEHOLDER not in accepted and "Its author has added nothing" in accepted
    (head / "README.md").write_text(accepted)
    with pytest.raises(ValueError, match="Nobody has written"):
        push_head(head, "org/head", dry_run=True)
    edited = accepted.replace("Its author has added nothing to what follows.", "It knows no slang.")
    edited = edited.replace("library_name:", "license: mit\ndatasets: org/texts\nlibrary_name:")
    (head / "README.md").write_text(edited)
    card = push_head(head, "org/head", evaluation=run / "evaluation", dry_run=True).card
    assert written_limits(card) == "It knows no slang." and "license: mit" in card and "- org/texts" in card
    assert "model-index" in card and "model-index" not in edited
    assert written_limits(push_head(head, "org/head", limits="Other.", dry_run=True).card) == "Other."


@pytest.mark.parametrize("text", hostile.TEXTS.values(), ids=hostile.TEXTS)
def test_no_text_of_a_config_stands_for_limits(text, tmp_path):
    config = ValueHeadConfig(hidden_size=8, attribute=text, chat_template=text, training={text: text})
    ValueHead(config).save_pretrained(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match="Nobody has written the limits of this head"):
            push_head(tmp_path, "org/head", dry_run=True)
        (tmp_path / "README.md").unlink(missing_ok=True)


def test_a_card_of_its_author_is_pushed_as_it_is(run):
    head = run / "head"
    (head / "README.md").write_text("# Mine\n\n## Limits\n\nSlang.\n")
    assert push_head(head, "org/head", dry_run=True).card == "# Mine\n\n## Limits\n\nSlang.\n"
    with pytest.raises(ValueError, match="that was not generated: write them there"):
        push_head(head, "org/head", limits="Irony.", dry_run=True)
    for unfinished in ("# Mine\n", "## Limits\n\nWhere it fails, is for its author\nto add here.\n"):
        (head / "README.md").write_text(unfinished)
        with pytest.raises(ValueError, match="Nobody has written the limits"):
            push_head(head, "org/head", dry_run=True)


# What `collect` may record as the backbone where it is not told its Hub id.
PATHS = ["/models/llama", "./llama", "../llama", "~/llama", "models/a/llama", "here", "org/here", "python:mine:load"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Two folders that could be mistaken for Hub ids."""
    (tmp_path / "org" / "here").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("backbone", PATHS)
def test_a_backbone_that_is_not_on_the_hub_is_refused(run, backbone):
    head, said = run / "head", {"limits": "It knows no slang.", "dry_run": True}
    message = f"`base_model` of the card is {backbone!r}, which is not on the Hub.*collect --backbone org/name"
    written = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps({**written, "backbone": backbone}))
    with pytest.raises(ValueError, match=message):
        push_head(head, "org/head", **said)
    (head / "README.md").write_text(f"---\nbase_model: [org/base, {backbone}]\n---\n# Mine\n\n## Limits\n\nSlang.\n")
    with pytest.raises(ValueError, match=message):
        push_head(head, "org/head", dry_run=True)
    for name in ("org/base-model", "gpt2", None):
        (head / "README.md").unlink(missing_ok=True)
        (head / "config.json").write_text(json.dumps({**written, "backbone": name}))
        assert push_head(head, "org/head", **said).url is None


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("backbone", PATHS)
def test_whatever_is_trained_is_not_uploaded_with_a_backbone_that_is_not_on_the_hub(hub, backbone):
    module = GuidanceModuleConfig(hidden_size=8, layer=0, value_width=8, backbone=backbone)
    trained = [
        ValueHead(ValueHeadConfig(hidden_size=8, backbone=backbone)),
        GuidanceModule(module),
        SteeringVectors.from_tensors({0: torch.ones(8)}, backbone=backbone),
    ]
    for artefact in trained:
        with pytest.raises(ValueError, match="which is not on the Hub"):
            artefact.push_to_hub("org/head", token="hf_good")
    assert hub.requests == []


def test_a_card_whose_metadata_cannot_be_read_is_refused(run):
    (run / "head" / "README.md").write_text("---\na: [\n---\n# Mine\n\n## Limits\n\nSlang.\n")
    with pytest.raises(ValueError, match=r"README\.md has to begin with metadata in YAML"):
        push_head(run / "head", "org/head", dry_run=True)


def test_what_cannot_be_right_is_refused(run):
    head, options = run / "head", {"limits": "It knows no slang.", "dry_run": True}
    document = {**documents.evaluation(), "head": {**documents.HEAD, "backbone_fingerprint": "f" * 16}}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="`evaluation` is of a head with backbone_fingerprint 'ffffffffffffffff'"):
        push_head(head, "org/head", evaluation=run / "evaluation", **options)
    (head / "README.md").rename(run / "card.md")
    (head / "README.md").write_text("# Mine\n\n## Limits\n\nSlang.\n")
    with pytest.raises(ValueError, match="`evaluation` is of a head with backbone_fingerprint"):
        push_head(head, "org/head", evaluation=run / "evaluation", dry_run=True)
    (run / "card.md").rename(head / "README.md")
    (run / "evaluation" / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"`evaluation` has to be a folder with an evaluation\.json"):
        push_head(head, "org/head", evaluation=run / "evaluation", **options)
    with pytest.raises(ValueError, match=r"`evaluation` has to be a folder with an evaluation\.json"):
        push_head(head, "org/head", evaluation=run, **options)
    (head / "calibration.json").write_text("{}")
    with pytest.raises(ValueError, match=r"calibration\.json is no calibration"):
        push_head(head, "org/head", **options)
    shutil.rmtree(run / "evaluation")
    (head / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"but .*model\.safetensors is not there"):
        push_head(head, "org/head", **options)


def test_the_command_line_hands_on_what_was_said_and_nothing_else(monkeypatch):
    from hf_value_steer.cli import main

    said = []
    monkeypatch.setattr("hf_value_steer.cli.pipeline.push_head", lambda **options: said.append(options))
    assert main(["push", "head", "org/head", "--private"]) == 0
    (options,) = said
    assert [options.pop(name) for name in ("folder", "repo_id", "private")] == ["head", "org/head", True]
    assert not any(options.values())
    with pytest.raises(SystemExit):
        main(["push", "head", "org/head", "--privat3"])
