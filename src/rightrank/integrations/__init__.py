"""Helpers for custom trainers: per-example losses, a callback for `Trainer`, and ready `train` functions for TRL.

`rightrank.integrations.trl` has the functions for TRL's `GRPOTrainer` and `DPOTrainer` (extra `trl`). The modules import
torch and transformers.
"""

from rightrank.integrations.trainers import (
    IGNORED,
    ItemScores,
    RankSelectionCallback,
    causal_item_losses,
    padded_batches,
)

__all__ = ["IGNORED", "ItemScores", "RankSelectionCallback", "causal_item_losses", "padded_batches"]
