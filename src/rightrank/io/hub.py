"""The hub's client."""

from __future__ import annotations


def hub_errors() -> tuple[type[BaseException], ...]:
    """What the client raises where the hub can't be reached or refuses: its own errors, those of the HTTP library that
    they are built on (another one from version to version), and the system's; offline mode is among them."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)
