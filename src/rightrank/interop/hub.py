"""Uploads the adapter, its card and its plot to the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from rightrank.data.files import hub_errors
from rightrank.schema.errors import RunError, SettingsError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def require_repository(name: str) -> None:
    """Refuse a name that is not `owner/name`.

    Raises:
        SettingsError: another form.
    """
    if not REPOSITORY.fullmatch(name):
        raise SettingsError(f"--push-to-hub {name!r}: give a repository as owner/name")


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload `folder` (adapter, card, rank curve) to a private repository in one commit; return its address.

    Raises:
        RunError: offline, not logged in, or refused by the hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="LoRA adapter chosen by rightrank")
    except OfflineModeIsEnabled:
        raise RunError(
            f"{repository}: offline mode is on (HF_HUB_OFFLINE), so nothing was pushed; the files are in {folder}"
        ) from None
    except hub_errors() as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"{repository}: could not push ({reason}); the files are in {folder}") from None
    return str(address)
