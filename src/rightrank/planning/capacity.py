"""A starting range of ranks from the data, the model and the memory. It is where to begin, not the answer.

Three limits apply to the largest rank: the capacity that the data can fill (an adapter stores about 2 bits a parameter,
so one that could store every bit of the data is large enough), the size of the matrices, and the memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rightrank.maths.counts import capacity_rank
from rightrank.records.plan import RangeLimit

MAX_RANK = 512  # above it no server loads adapters, and full fine-tuning is cheaper
RATIO = 4  # between neighbours; the ranks between are trained once the range is known


def starting_range(
    shapes: Sequence[tuple[int, int]], tokens: int, first_loss: float, memory_rank: int | None
) -> tuple[list[RangeLimit], list[int]]:
    """The limits with their reasons, and the ranks to start with.

    Args:
        shapes: rows and columns of the adapted matrices.
        tokens: label tokens of the training data.
        first_loss: the base's loss on them, nats a label token.
        memory_rank: the largest rank that fits, 0 where none fits; None where the memory is unknown.
    """
    bits = tokens * first_loss / math.log(2)
    filled = capacity_rank(bits, shapes)
    per_rank = sum(rows + columns for rows, columns in shapes)
    matrices = min(min(shape) for shape in shapes)
    capacity = RangeLimit(
        name="capacity",
        rank=filled,
        reason=f"{tokens:,} label tokens at {first_loss:.2f} nats are {bits:,.0f} bits; a rank adds {per_rank:,} "
        "parameters of 2 bits",
    )
    width = RangeLimit(name="matrices", rank=matrices, reason="the smallest side of an adapted matrix")
    memory_reason = (
        "the memory is unknown" if memory_rank is None else "the largest that fits" if memory_rank else "none fits"
    )
    memory = RangeLimit(name="memory", rank=memory_rank, reason=memory_reason)
    hard = min(matrices, MAX_RANK, memory_rank or MAX_RANK)
    ranks = [1]
    while ranks[-1] < min(filled, hard) or (len(ranks) < 2 and hard > 1):
        ranks.append(min(ranks[-1] * RATIO, hard))
    return [capacity, width, memory], ranks
