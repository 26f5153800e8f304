"""The licence of a base model, as its model card or GGUF header states it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rightrank.io.hub import hub_errors
from rightrank.io.reading import UnreadableError, parse_yaml, read_text

CARD = "README.md"
HUB_SECONDS = 5.0
MAX_FRONT_MATTER = 100 * 2**10  # characters of a model card's YAML header
MAX_CARD_BYTES = 2**20
GGUF_FIELDS = {"general.license": "identifier", "general.license.name": "name", "general.license.link": "link"}


@dataclass(frozen=True, slots=True)
class Licence:
    """The fields `license`, and for a custom licence `license_name` and `license_link`, of a model card."""

    identifier: str
    name: str | None = None
    link: str | None = None


def licence_of(model: object) -> Licence | None:
    """The licence stated by a model folder's card, a GGUF file's header or the hub; None if none is found.

    The hub is asked only for a model that is not a local file. A hub that can't be reached is not an error.
    """
    if not isinstance(model, str):
        return None
    path = Path(model)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return _of_gguf(path)
    if not path.exists():
        return _of_hub(model)
    card = path / CARD
    try:
        return _of_card(read_text(card, MAX_CARD_BYTES))
    except UnreadableError:
        return None


def _of_hub(repository: str) -> Licence | None:
    from huggingface_hub import HfApi

    try:
        card = HfApi().model_info(repository, timeout=HUB_SECONDS).card_data
    except hub_errors():
        return None
    return None if card is None else _licence(card.get("license"), card.get("license_name"), card.get("license_link"))


def _of_card(text: str) -> Licence | None:
    parts = text.split("---", 2)
    if len(parts) < 3 or parts[0].strip() or len(parts[1]) > MAX_FRONT_MATTER:
        return None
    try:
        values = parse_yaml(parts[1])
    except UnreadableError:
        return None
    if not isinstance(values, dict):
        return None
    return _licence(values.get("license"), values.get("license_name"), values.get("license_link"))


def _of_gguf(path: Path) -> Licence | None:
    from gguf import GGUFReader

    fields: Any = GGUFReader(path).fields
    values = {name: str(fields[key].contents()) for key, name in GGUF_FIELDS.items() if key in fields}
    return _licence(values.get("identifier"), values.get("name"), values.get("link"))


def _licence(identifier: object, name: object, link: object) -> Licence | None:
    if isinstance(identifier, list):
        identifier = next(iter(identifier), None)
    if not isinstance(identifier, str) or not identifier.strip():
        return None
    return Licence(identifier, *(value if isinstance(value, str) else None for value in (name, link)))
