"""A training function for images, for `select_rank_with`: a text-to-image LoRA with diffusers.

`from rightrank.plugins.images.training import TextToImageTrain`: it is imported from there, since that brings torch.
"""

from __future__ import annotations

from rightrank.runs.plugins import Plugin

PLUGIN = Plugin(name="images")
