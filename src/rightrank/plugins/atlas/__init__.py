"""What others found before any training: an atlas of public sweeps of ranks, and which rank was enough in each."""

from __future__ import annotations

from rightrank.runs.plugins import Plugin


class AtlasPlugin(Plugin):
    name = "atlas"


PLUGIN = AtlasPlugin()
