"""Experiment trackers: a trial is a run, all trials of a selection are a group, the decision is a run of its own."""

from rightrank.trackers.registry import Trackers, require_trackers

__all__ = ["Trackers", "require_trackers"]
