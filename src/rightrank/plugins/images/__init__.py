"""Training functions for images, for `select_rank_with`: a text-to-image LoRA with diffusers, and an image classifier.

`from rightrank.plugins.images.training import TextToImageTrain, ImageClassifierTrain`.
"""

from __future__ import annotations

from rightrank.runs.plugins import Plugin


class Images(Plugin):
    """The functions are imported from `training`, which brings torch."""

    name = "images"


PLUGIN = Images()
