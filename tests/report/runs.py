"""Make runs for the views: records as a selection would write them, generated from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rightrank.decision.run_answers import build_criterion
from rightrank.runs.folder import Journal
from rightrank.schema.events import (
    AdapterRecorded,
    DataSummary,
    JournalRecord,
    Records,
    RunStarted,
    TestEvaluated,
)
from rightrank.schema.results import ExportedAdapter, SplitSummary
from rightrank.schema.settings import Goal, SelectSettings
from rightrank.schema.trials import Arm, EvalPoint, TrialDiverged, TrialFinished, TrialStarted, compute_trial_id
from rightrank.search.protocol import choose_adapter

STEPS, ITEMS, TOKENS = 40, 30, 20


def make_run(
    ranks: Sequence[int] = (1, 4, 16, 64),
    rates: Sequence[float] = (1e-3, 3e-3),
    seeds: Sequence[int] = (0,),
    *,
    model: str = "models/small",
    diverged: Sequence[tuple[int, float]] = (),
    with_base: bool = True,
) -> Records:
    """Make a run whose loss is 3 + 0.2 / rank at the middle learning rate, and rises with the distance from it."""
    started = _make_start(model, ranks, rates, seeds)
    records = Records.from_journal(started, [])
    generator = random.Random(7)
    ease = [generator.gauss(0, 0.4) for _ in range(ITEMS)]
    if with_base:
        records.outcomes.append(_make_trial(0, 0.0, 0, 3.6, ease, generator))
    middle = sorted(rates)[len(rates) // 2]
    for seed in seeds:
        for rate in rates:
            for rank in ranks:
                if (rank, rate) in diverged:
                    arm = Arm(rank=rank, learning_rate=rate, lora_alpha=32, seed=seed, steps=STEPS)
                    outcome = TrialDiverged(
                        trial_id=compute_trial_id("x", arm), **arm.model_dump(), step=7, reason="training loss is nan"
                    )
                    records.outcomes.append(outcome)
                    continue
                loss = 3 + 0.2 / rank + (0.0 if rate == middle else 0.02)
                records.outcomes.append(_make_trial(rank, rate, seed, loss, ease, generator))
    if ranks:
        trial = records.outcomes[-1]
        test = TestEvaluated(
            trial_id=trial.trial_id, rank=trial.rank, value=3.1, example_losses=[3.1], example_tokens=[1]
        )
        records.tests.append(test)
    return records


def _make_start(model: str, ranks: Sequence[int], rates: Sequence[float], seeds: Sequence[int]) -> RunStarted:
    settings = SelectSettings(ranks=ranks or (1,), learning_rates=rates, seeds=seeds, margin=0.02, goal="training-rank")
    split = SplitSummary(examples=ITEMS, tokens=ITEMS * TOKENS, label_tokens=ITEMS * TOKENS, truncated=0, dropped=0)
    return RunStarted(
        rightrank_version="0.1.0",
        fingerprint="x",
        settings={"model": model, "data": "data.jsonl", **settings.model_dump(mode="json")},
        environment={"device": "cpu", "torch": "2"},
        data=DataSummary(
            form="prompt_completion", splits={"train": split}, splits_given=False, duplicates_across_splits=0
        ),
        evaluation_examples=[str(item) for item in range(ITEMS)],
        metric="loss",
        higher_is_better=False,
        started_at="2026-01-01T00:00:00+00:00",
    )


def _make_trial(
    rank: int, rate: float, seed: int, loss: float, ease: list[float], generator: random.Random
) -> TrialFinished:
    arm = Arm(rank=rank, learning_rate=rate, lora_alpha=32, seed=seed, steps=STEPS if rank else 0)
    items = [TOKENS * (loss + easy + generator.gauss(0, 0.01)) for easy in ease]
    value = sum(items) / (TOKENS * len(items))
    points = [EvalPoint(step=step, value=value + (STEPS - step) / 100, train_value=value) for step in (10, 20, 40)]
    return TrialFinished(
        trial_id=compute_trial_id("x", arm),
        **arm.model_dump(),
        value=value,
        metrics={"loss": value},
        example_losses=items,
        example_tokens=[TOKENS] * len(items),
        train_value=value - 0.01 if rank else None,
        points=points if rank else [],
        train_losses=[value + (STEPS - step) / 100 for step in range(1, STEPS + 1)] if rank else [],
        trainable_parameters=1000 * rank,
        train_seconds=10.0 + rank / 10,
        train_tokens=5000,
        eval_seconds=1.0,
        peak_bytes=2**30 + rank * 2**20,
    )


def make_answered_run(*, direct: Sequence[int] = ()) -> Records:
    """Make a run with an adapter answer: rank 64 was trained and truncated.

    Args:
        direct: lower ranks that were trained afterwards.
    """
    records = make_run((*direct, 64), (3e-3,))
    records.tests = []
    settings = records.started.settings | {"ranks": [1, 4, 16, 64]}
    records.started = records.started.model_copy(update={"settings": settings})
    generator = random.Random(11)
    top = next(trial for trial in records.list_finished() if trial.rank == 64)
    losses = {32: 0.001, 16: 0.003, 8: 0.008, 4: 0.04}
    for rank, loss in losses.items():
        records.outcomes.append(_make_truncation(top, rank, loss, generator))
    answer = choose_adapter(records.outcomes, build_criterion(records))
    assert answer is not None
    handed_over = ExportedAdapter(
        rank=answer.rank,
        max_module_rank=answer.rank,
        method=answer.method,
        trained_rank=64,
        reference_adapter=f"trials/{answer.reference_id}",
        difference=answer.difference,
        difference_high=answer.difference_high,
        test_difference=0.0012,
        test_difference_high=0.0031,
    )
    records.adapters.append(AdapterRecorded(answer=answer, handed_over=handed_over, trainings=1.2))
    return records


def make_adapter_without_gain() -> tuple[Records, Goal]:
    """Make a run whose adapter is as good as the base."""
    records = make_answered_run()
    (recorded,) = records.adapters
    copied = records.by_id[recorded.answer.reference_id].model_dump(include={"value", "metrics", "example_losses"})
    records.outcomes[0] = records.outcomes[0].model_copy(update=copied)
    answer = choose_adapter(records.outcomes, build_criterion(records))
    assert answer is not None
    records.adapters[:] = [recorded.model_copy(update={"answer": answer})]
    return records, "adapter"


def _make_truncation(top: TrialFinished, rank: int, loss: float, generator: random.Random) -> TrialFinished:
    """`top` truncated: worse by `loss` nats a token, with noise by example."""
    items = [example_loss + TOKENS * (loss + generator.gauss(0, 0.002)) for example_loss in top.example_losses]
    changes = {"rank": rank, "steps": 0, "truncate_from": top.trial_id}
    value = sum(items) / (TOKENS * len(items))
    arm = top.arm.model_copy(update=changes)
    return top.model_copy(
        update=changes
        | {"trial_id": compute_trial_id("x", arm), "example_losses": items, "value": value, "metrics": {"loss": value}}
        | {"points": [], "train_seconds": 0.0, "truncation": "kfac"}
    )


STARTED = TrialStarted(
    trial_id="x", **Arm(rank=4, learning_rate=1e-3, lora_alpha=32, seed=0, steps=40).model_dump(exclude_none=True)
)


def write_journal(folder: Path, upto: int | None = None) -> Path:
    """Write a run folder that contains only the journal of a made-up run."""
    records = make_run()
    return write_records(folder, [records.started, *records.outcomes[:upto], STARTED])


def write_answered_run(folder: Path, goal: str = "training-rank", **options: Any) -> Path:
    """Write a run folder that contains only the journal of `make_answered_run`."""
    records = make_answered_run(**options)
    started = records.started.model_copy(update={"settings": records.started.settings | {"goal": goal}})
    return write_records(folder, [started, *records.outcomes, *records.adapters])


def write_records(folder: Path, records: Sequence[JournalRecord]) -> Path:
    folder.mkdir(exist_ok=True)
    journal = Journal(folder / "journal.jsonl")
    for record in records:
        journal.append(record)
    return folder
