"""What watches a selection or takes part in it: a `Hook` each. The command line and the API put the list together."""

from rightrank.runs.hook import Hook

__all__ = ["Hook"]
