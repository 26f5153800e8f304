"""Whether a folder holds an adapter; without torch, so that a wrong path is refused at once."""

from __future__ import annotations

from pathlib import Path

from rightrank.errors import ModelError

CONFIG_FILE = "adapter_config.json"


def require_adapter_folder(path: Path) -> None:
    """Refuse a path that is no folder with an adapter's configuration.

    Raises:
        ModelError: the message names the adapter of a run folder, and the way to compare whole models.
    """
    if not path.exists():
        raise ModelError(f"{path}: no such folder; give an adapter folder, one that PEFT's save_pretrained wrote")
    if not path.is_dir():
        raise ModelError(f"{path}: a file; give the adapter's folder, the one that holds {CONFIG_FILE}")
    if (path / CONFIG_FILE).exists():
        return
    hint = "give a folder that PEFT's save_pretrained wrote"
    if (path / "config.json").exists():
        hint = "it is a whole model: compare two with --base A --finetuned B"
    inner = path / "adapter"  # of a run folder
    if (inner / CONFIG_FILE).exists():
        hint = f"give {inner}, the adapter in it"
    raise ModelError(f"{path}: not an adapter, there is no {CONFIG_FILE}; {hint}")
