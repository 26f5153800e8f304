"""The main job: prepare a selection, train, decide, finish and report to hooks, and the comparisons that evaluate adapters. How an arm trains belongs to `training`."""
