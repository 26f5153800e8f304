"""The hooks that watch a selection or take part in it. The command line and the API assemble the list."""

from rightrank.runs.hook import Hook

__all__ = ["Hook"]
