"""Test counts by formula against numbers that were computed by hand and files that safetensors wrote."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from rightrank.planning.estimate import compute_safetensors_bytes
from tests.examples import limit_examples

CODES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I8": np.int8}


@limit_examples(60)
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
    entries = [(name, code, shape, arrays[name].itemsize) for name, (code, shape) in tensors.items()]
    assert compute_safetensors_bytes(entries, metadata) == len(save(arrays, metadata or None))
