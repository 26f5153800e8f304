"""Pushing to the hub, with the hub's client replaced: the requests, and the errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rightrank.api.runs import export
from rightrank.interop.exports import push_to_hub
from rightrank.schema.errors import RunError, RunFolderError, SettingsError


def test_the_folder_is_sent_to_a_private_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Client:
        def create_repo(self, name: str, **options: Any) -> str:
            calls.append(("create", {"name": name, **options}))
            return f"https://hub/{name}"

        def upload_folder(self, **options: Any) -> None:
            calls.append(("folder", options))

    monkeypatch.setattr("huggingface_hub.HfApi", Client)
    assert push_to_hub(tmp_path / "adapter", "me/adapter") == "https://hub/me/adapter"
    assert [name for name, _ in calls] == ["create", "folder"]
    assert calls[0][1]["private"] is True
    assert calls[1][1]["folder_path"] == tmp_path / "adapter"


def test_offline_the_error_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"offline mode is on .*nothing was pushed; the files are in") as caught:
        push_to_hub(tmp_path, "me/adapter")
    assert "\n" not in str(caught.value)


def test_a_wrong_name_or_target_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="give a repository as owner/name"):
        export(tmp_path, "peft", push_to_hub="adapter")
    with pytest.raises(SettingsError, match="goes with --to peft"):
        export(tmp_path, "trl", push_to_hub="me/adapter")
    with pytest.raises(RunFolderError):
        export(tmp_path, "peft", push_to_hub="me/adapter")
