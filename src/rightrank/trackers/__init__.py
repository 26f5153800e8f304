"""Experiment trackers: each trial is a run, a selection is a group of runs, and the decision is a run of its own."""

from rightrank.trackers.registry import Trackers, require_trackers

__all__ = ["Trackers", "require_trackers"]
