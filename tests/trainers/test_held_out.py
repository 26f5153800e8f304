"""Test how held-out rows are recognized as rows of the training set."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from rightrank.trainers.trainer_batches import hash_inputs

IDS, LABELS = [5, 9, 7, 9], [-100, 9, 7, 9]


@given(left=st.integers(0, 3), right=st.integers(0, 3), pad=st.sampled_from([0, 9]))
def test_padding_does_not_hide_a_row_of_the_training_set(left: int, right: int, pad: int) -> None:
    row = {"input_ids": IDS, "labels": LABELS, "attention_mask": [1] * len(IDS)}
    padding = {"input_ids": pad, "labels": -100, "attention_mask": 0}
    padded = {
        name: torch.tensor([padding[name]] * left + values + [padding[name]] * right) for name, values in row.items()
    }
    assert hash_inputs(padded, frozenset()) == hash_inputs(row, frozenset())
    for changed in ([5, 9, 7, 8], [5, 5, 9, 7, 9], [9, 7, 9]):
        assert hash_inputs({"input_ids": changed}, frozenset()) != hash_inputs(row, frozenset())
