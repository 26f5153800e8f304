"""Whether a folder holds an adapter; without torch, so that a wrong path is refused at once."""

from __future__ import annotations

from pathlib import Path

from rightrank.errors import ModelError

CONFIG_FILE = "adapter_config.json"
BASE = "base"  # the side of a comparison that is the base model alone


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
    raise ModelError(f"{path}: not an adapter, there is no {CONFIG_FILE}; {_adapter_in(path) or hint}")


def require_side(side: str) -> None:
    """Refuse what `compare` can't read: neither an adapter folder, nor a model folder, nor `base`.

    Raises:
        ModelError: the message names the adapter of a run folder.
    """
    if side == BASE:
        return
    folder = Path(side)
    if not (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file():
        hint = _adapter_in(folder) or "give one, or 'base'"
        raise ModelError(f"{side}: neither an adapter folder ({CONFIG_FILE}) nor a model folder (config.json); {hint}")


def _adapter_in(folder: Path) -> str:
    """What to give in place of a run folder; empty for another folder."""
    inner = folder / "adapter"
    return f"give {inner}, the adapter in it" if (inner / CONFIG_FILE).is_file() else ""
