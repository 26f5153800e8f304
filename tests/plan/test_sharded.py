"""Short form of `benchmarks/plan/sharded.py`: what FSDP's rule says, against two processes on this CPU."""

from __future__ import annotations

import pytest
from benchmarks.plan.sharded import compare

from rightrank.planning.accuracy import SHARDED


@pytest.mark.filterwarnings("ignore")
def test_shards_and_gathered_blocks_are_as_planned() -> None:
    found = compare("fsdp")
    assert found["components"]["gathered_blocks"] > 0
    assert abs(found["error"]) < SHARDED.share
