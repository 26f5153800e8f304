"""Counts by formula, beside numbers worked out by hand and files that safetensors wrote."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from rightrank.models.ranks import capacity_rank, safetensors_bytes

CODES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I8": np.int8}


@pytest.mark.parametrize(("bits", "rank"), [(0, 1), (1, 1), (48, 1), (49, 2), (96, 2), (97, 3), (4800, 100)])
def test_the_capacity_rank_holds_all_of_the_bits(bits: float, rank: int) -> None:
    """24 parameters a rank, two bits each."""
    assert capacity_rank(bits, [(10, 6), (3, 5)]) == rank


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(sorted(CODES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    ),
    st.sampled_from([None, {}, {"format": "pt"}, {"b": "é", "a": '"'}]),
)
def test_the_size_is_that_of_the_file(
    tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None
) -> None:
    arrays = {name: np.zeros(shape, CODES[code]) for name, (code, shape) in tensors.items()}
    told = [(name, code, shape, arrays[name].itemsize) for name, (code, shape) in tensors.items()]
    assert safetensors_bytes(told, metadata) == len(save(arrays, metadata or None))
