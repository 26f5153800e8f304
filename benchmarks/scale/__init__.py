"""Selections on more machines than there are here: the scheduler in simulated time, and real workers that are lost."""
