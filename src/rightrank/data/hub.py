"""Data sets of the hub by name, read by `datasets`: `owner/name`, `owner/name:split` and `owner/name@revision:split`.

The revision is the commit on the hub. A run records it, so that a resumed run reads the same rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rightrank.schema.errors import DataError, MissingExtraError, get_first_line

NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w.-]+))?(:(?P<split>[\w.\[\]:%+-]+))?")


@dataclass(frozen=True, slots=True)
class HubData:
    """A data set on the hub, as a person names it."""

    name: str  # owner/name
    revision: str | None = None  # a commit, a branch or a tag; None: the newest commit
    split: str | None = None  # as `datasets` takes it, such as `train_sft` or `train[:1000]`; None: all splits

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.name}{revision}" + (f":{self.split}" if self.split else "")


def parse_hub_name(text: str) -> HubData | None:
    """Return the data set that a text names; None if it names none, or a file in a folder that exists."""
    match = NAME.fullmatch(text)
    if match is None or Path(match["name"]).parent.is_dir():
        return None
    return HubData(match["name"], match["revision"], match["split"])


def read_hub_rows(data: HubData, config: str) -> Any:
    """Read a data set: a mapping from the names of its splits to `datasets` objects, or one object if a split is named or is the only one.

    Args:
        config: the configuration; an empty text for the only or the default one.

    Raises:
        DataError: there is no such data set, configuration or split, or the hub cannot be reached and the cache lacks it.
        MissingExtraError: `datasets` is not installed.
    """
    builder = _build(data, config)
    try:
        builder.download_and_prepare()
        rows = builder.as_dataset(split=data.split)
    except (OSError, ValueError) as error:  # the network, the disk, or an unknown split
        raise DataError(f"{data}: `datasets` cannot read it ({get_first_line(error)})") from None
    if data.split is not None:
        return rows
    return dict(rows) if len(rows) > 1 else next(iter(rows.values()))


def pin_revision(text: str, config: str, recorded: str | None = None) -> str:
    """Return the name with the revision that is read: that of the recorded name of the same data, else the newest one.

    Names of files are returned unchanged.

    Raises:
        DataError: as for `read_hub_rows`.
    """
    data = parse_hub_name(text) if not Path(text).exists() else None
    if data is None or data.revision is not None:
        return text
    earlier = None if recorded is None else parse_hub_name(recorded)
    if earlier is not None and replace(earlier, revision=None) == data:
        return str(earlier)
    return str(replace(data, revision=_build(data, config).hash))


def _build(data: HubData, config: str) -> Any:
    """Return the builder of a data set, whose `hash` is the commit."""
    try:
        from datasets import load_dataset_builder
    except ImportError:
        raise MissingExtraError(
            f"{data}: data sets of the hub need the package `datasets`: pip install 'rightrank[train]'"
        ) from None
    try:
        builder = load_dataset_builder(data.name, config or None, revision=data.revision)
    except (OSError, ValueError) as error:  # no such data set, no network, or an unknown configuration
        raise DataError(
            f"{data}: no file or folder of this name, and `datasets` cannot load it from the hub ({get_first_line(error)}); "
            f"{_list_cached(config)}"
        ) from None
    if data.revision is not None and re.fullmatch("[0-9a-f]{40}", data.revision) and builder.hash != data.revision:
        raise DataError(
            f"{data}: the hub cannot be reached, and the cache has revision {builder.hash}; go online, or name this one"
        )
    return builder


def _list_cached(config: str) -> str:
    from datasets import config as settings

    folders = sorted(Path(settings.HF_DATASETS_CACHE).glob("*___*"))
    names = ", ".join(folder.name.replace("___", "/", 1) for folder in folders)
    hint = "; --data-config names the configuration" if not config else ""
    return f"data sets in the cache: {names or 'none'}{hint}"
