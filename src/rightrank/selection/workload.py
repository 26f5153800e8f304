"""The work of a prepared selection, and the time that it will take."""

from __future__ import annotations

from collections.abc import Sequence

from rightrank.engine.encoder import label_count
from rightrank.engine.token_store import longest_sequence
from rightrank.planning.duration import Speed, Workload
from rightrank.preparation import Prepared
from rightrank.records.plan import SelectionCost
from rightrank.strategies import Strategy


def estimate(prepared: Prepared, strategy: Strategy, speed: Speed | None = None) -> SelectionCost | None:
    """The time that the selection will take at `speed`; None without one if this device has no stored measurement."""
    planned = prepared.planned
    if planned is None or (speed is None and not planned.is_timed):
        return None
    return planned.cost(strategy, workload(prepared), speed)


def workload(
    prepared: Prepared, batches: Sequence[Sequence[int]] | None = None, evaluated: Sequence[int] | None = None
) -> Workload:
    """The work of one training, counted over all its batches.

    Args:
        prepared: the selection.
        batches: training examples of each step; None for those of a whole training.
        evaluated: validation examples; None for all.
    """
    data, settings = prepared.runtime.data, prepared.settings
    train = data.splits["train"]
    batches = prepared.runtime.batch_plan(settings.seeds[0]) if batches is None else batches
    size = settings.batch_size
    micro = [batch[start : start + size] for batch in batches for start in range(0, len(batch), size)]
    used = [train[index] for rows in micro for index in rows]
    if prepared.runtime.fast_paths.sequence_packing:
        computed = sum(example.length for example in used)
    else:
        padded = sum(len(rows) * longest_sequence([train[index] for index in rows]) for rows in micro)
        computed = padded * data.sequences_per_example
    labels = sum(label_count(example) for example in used)
    trained = len({index for rows in micro for index in rows})
    held_out = len(data.splits["selection"]) if evaluated is None else len(evaluated)
    return Workload(
        steps=len(batches),
        examples=trained * data.sequences_per_example,
        eval_examples=held_out * data.sequences_per_example,
        eval_points=settings.eval_points,
        passes=settings.gradient_accumulation_steps,
        filled=computed / (len(used) * data.sequences_per_example * data.longest),
        labelled=1.0 if data.is_classification else labels / computed,
        reference=trained / held_out + 2 if data.is_preference else 0.0,
    )
