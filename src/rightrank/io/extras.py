"""Optional packages: whether they are installed, without importing them."""

from __future__ import annotations

from importlib.util import find_spec

from rightrank.errors import MissingExtraError
from rightrank.settings import SelectSettings


def require_optimizer_extra(settings: SelectSettings) -> None:
    """Refuse an optimizer whose package is not installed.

    Raises:
        MissingExtraError: 8-bit states without bitsandbytes; the message names the extra.
    """
    if settings.optim == "adamw_8bit" and find_spec("bitsandbytes") is None:
        raise MissingExtraError("optim adamw_8bit needs the `bitsandbytes` package: pip install 'rightrank[bnb]'")
