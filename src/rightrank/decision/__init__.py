"""Decide which rank is enough: pure functions from scores to an answer with its evidence. No files, no torch.

Both halves rest on `table` (scores by rank, learning rate and seed) and `comparison` (bounds of a paired difference):

- the default goal, the smallest adapter: `adapter` (is a truncation within the margin of the top adapter?) and `run_answers` (the
  adapters of a run, and how its other learning rates did);
- the training rank (`--goal training-rank`, `rightrank decide`): `evidence` (means of ranks, their noise over seeds and joint
  probability) and `rule` (each rank against the best at one margin, the verdict, its words, and the next run).

Records of the answers are in `schema`; screens and pages are in `report`.
"""
