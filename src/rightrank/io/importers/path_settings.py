"""The rank, learning rate and seed of a training, from adapter_config.json and the names of its folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rightrank.errors import ResultsError
from rightrank.io.reading import UnreadableError, read_json_object

# Parts of a folder's name such as r16, r=16, rank_16, lora-r-16; lr1e-4, lr=0.0003; seed3.
_NAMED = {
    "rank": re.compile(r"(?:^|[^a-z])(?:lora[-_=]?)?(?:rank|r)[-_=]?(\d+)(?![\d.])", re.IGNORECASE),
    "lr": re.compile(r"(?:^|[^a-z])(?:lr|learning[-_]?rate)[-_=]?(\d+(?:\.\d+)?(?:e-?\d+)?)", re.IGNORECASE),
    "seed": re.compile(r"(?:^|[^a-z])seed[-_=]?(\d+)", re.IGNORECASE),
}


def settings_from_path(folder: Path, root: Path) -> dict[str, Any]:
    """`rank`, `lr` and `seed` where known: from the nearest adapter_config.json up to `root`, then from names.

    Raises:
        ResultsError: an adapter_config.json that isn't JSON.
    """
    settings: dict[str, Any] = {}
    for place in _upward(folder, root):
        for name, pattern in _NAMED.items():
            found = pattern.search(place.name)
            if found and name not in settings:
                settings[name] = found.group(1)
    rank = _adapter_rank(folder, root)
    return settings if rank is None else settings | {"rank": rank}


def _adapter_rank(folder: Path, root: Path) -> int | None:
    """`r` of the adapter in the folder or in a folder inside it (a checkpoint), else of those above up to `root`.

    None if adapters in one place have different ranks.
    """
    for place in _upward(folder, root):
        paths = [place / "adapter_config.json", *sorted(place.glob("*/adapter_config.json"))]
        ranks = [read_object(path).get("r") for path in paths if path.is_file()]
        if ranks:
            return ranks[0] if isinstance(ranks[0], int) and ranks.count(ranks[0]) == len(ranks) else None
    return None


def _upward(folder: Path, root: Path) -> list[Path]:
    """The folder and its parents up to and including `root`."""
    places = [folder]
    while places[-1] != root and root in places[-1].parents:
        places.append(places[-1].parent)
    return places


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ResultsError: not a JSON object.
    """
    try:
        return read_json_object(path)
    except UnreadableError as error:
        raise ResultsError(f"{path}: not JSON ({error}); restore the file, or leave its folder out") from None
