"""Test uploads of adapters to a local hub that receives what huggingface_hub sends."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub.constants
import huggingface_hub.errors
import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import HfApi

import rightrank
from rightrank.cli import cli
from rightrank.exports.exports import TARGETS
from rightrank.schema.errors import RunError, SettingsError
from tests.tiny import build_small_settings, save_tiny_llama, write_completions

pytestmark = pytest.mark.trains


class Hub(BaseHTTPRequestHandler):
    """A server that creates repositories and accepts commits without large files."""

    requests: ClassVar[list[tuple[str, str | None]]] = []
    repositories: ClassVar[list[dict[str, Any]]] = []
    files: ClassVar[dict[str, bytes]] = {}
    refuses: ClassVar[bool] = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append((self.path, self.headers["Authorization"]))
        if self.refuses:
            return self.send_json(403, {"error": "You have no right to write here"})
        if self.path == "/api/repos/create":
            self.repositories.append(json.loads(body))
            return self.send_json(200, {"url": f"{HfApi().endpoint}/me/{json.loads(body)['name']}"})
        if self.path == "/api/validate-yaml":
            return self.send_json(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self.send_json(200, {"files": [{**file, "shouldIgnore": False} for file in files]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.send_json(
            200, {"commitUrl": f"{HfApi().endpoint}/me/x/commit/1", "commitOid": "1", "pullRequestUrl": None}
        )

    def do_GET(self) -> None:
        self.send_json(200, {"siblings": [], "sha": "0", "id": "me/x"})

    def send_json(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    for collection in (Hub.requests, Hub.repositories, Hub.files):
        collection.clear()
    monkeypatch.setattr(Hub, "refuses", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield Hub
        server.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    settings = build_small_settings(ranks=(1, 4), max_steps=4, goal="adapter")
    data = write_completions(folder / "data.jsonl")
    selected = rightrank.select_rank(str(save_tiny_llama(folder / "model")), data, folder / "run", settings=settings)
    assert list(selected.to_pandas().trial_id) == list(rightrank.to_pandas(selected.run).trial_id)
    return selected.run


def test_an_adapter_is_uploaded_with_its_card(hub: type[Hub], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token")
    assert rightrank.export(run, "peft", push_to_hub="me/small").address == f"{HfApi().endpoint}/me/small"
    (repository,) = hub.repositories
    assert (repository["name"], repository["organization"]) == ("small", "me")
    assert repository.get("visibility") == "private" or repository.get("private") is True  # by the client's version
    adapter = run / "exports" / "peft"
    assert hub.files == {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert {token for _, token in hub.requests} == {"Bearer a-token"}
    front_matter = yaml.safe_load(hub.files["README.md"].decode().split("---")[1])
    assert front_matter == {"library_name": "peft", "tags": ["lora", "rightrank"]}  # the hub refuses a folder as a base


def test_the_command_uploads_and_says_where(hub: type[Hub], run: Path) -> None:
    command = ["export", str(run), "--to", "peft", "--push-to-hub", "me/small", "--json"]
    result = CliRunner().invoke(cli, command, env={"HF_TOKEN": "a-token"})
    assert json.loads(result.stdout)["address"] == f"{HfApi().endpoint}/me/small"
    assert "adapter_model.safetensors" in hub.files


@pytest.mark.parametrize("target", ["merged", *(target for target in TARGETS if target != "peft")])
def test_settings_of_a_trainer_are_not_uploaded(run: Path, target: str) -> None:
    result = CliRunner().invoke(cli, ["export", str(run), "--to", target, "--push-to-hub", "me/small"])
    assert (result.exit_code, "works with peft" in str(result.exception)) == (1, True)  # main() turns it into status 2
    assert isinstance(result.exception, SettingsError)
    assert not (run / "exports" / target).exists()


def test_a_refusal_is_one_line(hub: type[Hub], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token")
    with pytest.raises(SettingsError, match="give OWNER/NAME"):
        rightrank.export(run, "peft", push_to_hub="a/b/c")
    assert not hub.requests
    monkeypatch.setattr(Hub, "refuses", True)
    with pytest.raises(RunError, match="not uploaded") as refused:
        rightrank.export(run, "peft", push_to_hub="me/small")
    assert str(run / "exports" / "peft") in str(refused.value)
    assert not hub.files
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(RunError, match="not uploaded"):
        rightrank.export(run, "peft", push_to_hub="me/small")
