"""A training function for images, for `select_rank_with`: a text-to-image LoRA with diffusers.

`from rightrank.plugins.images.training import TextToImageTrain`.
"""

from __future__ import annotations

from rightrank.runs.plugins import Plugin


class Images(Plugin):
    """The function is imported from `training`, which brings torch."""

    name = "images"


PLUGIN = Images()
