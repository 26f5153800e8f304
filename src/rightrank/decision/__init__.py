"""Decide which rank is enough: pure functions from scores to an answer with its evidence. No files, no torch.

Both halves rest on `table`, `comparison` (bounds of a paired difference) and `records` (the records of a run):

- the default goal, the smallest adapter: `adapter_comparison` (is a truncation within the margin of the top adapter?), `adapter`
  (the same for the adapters of a run) and `learning_rate` (how the other learning rates did);
- the training rank (`--goal training-rank`, `rightrank decide`): `evidence` and `seeds` (means of ranks, their noise and joint
  probability), `ranks` (each rank against the best at one margin), `verdicts`, `sentences`, `next_run`, and `rule`, which calls them.
"""
