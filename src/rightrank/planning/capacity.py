"""A starting range of ranks from the task, the model and the budget. Where to begin, not the answer.

Three limits on the largest rank worth a training: what the data can fill (an adapter holds some 2 bits a parameter, so
one that could hold every bit of the data is large enough), what the matrices can have, and what fits the memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rightrank.maths.counts import capacity_rank
from rightrank.records.plan import RangeLimit

HIGHEST_RANK = 512  # above it no server loads adapters, and full fine-tuning is cheaper
RATIO = 4  # between neighbours; what lies between is trained once the range is known


def starting_range(
    shapes: Sequence[tuple[int, int]], tokens: int, first_loss: float, memory_rank: int | None
) -> tuple[list[RangeLimit], list[int]]:
    """The limits with their reasons, and the ranks to begin with.

    Args:
        shapes: rows and columns of the adapted matrices.
        tokens: label tokens of the training data.
        first_loss: the base's loss on them, nats a label token.
        memory_rank: the largest rank that fits, 0 where none does; None where no memory is known.
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
        "no memory known" if memory_rank is None else "the largest that fits" if memory_rank else "none fits"
    )
    memory = RangeLimit(name="memory", rank=memory_rank, reason=memory_reason)
    hard = min(matrices, HIGHEST_RANK, memory_rank or HIGHEST_RANK)
    ranks = [1]
    while ranks[-1] < min(filled, hard) or (len(ranks) < 2 and hard > 1):
        ranks.append(min(ranks[-1] * RATIO, hard))
    return [capacity, width, memory], ranks
