"""The client of the Hugging Face hub."""

from __future__ import annotations

HUB_SECONDS = 10.0  # for the hub to answer


def hub_errors() -> tuple[type[BaseException], ...]:
    """What the client raises if the hub can't be reached, refuses, or is switched off by offline mode.

    The errors of the client derive from those of an HTTP library that differs between versions.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return (OSError, HFValidationError, *HfHubHTTPError.__bases__)
