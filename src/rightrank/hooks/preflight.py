"""The preflight: what a selection will do and what it costs, before any training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

from rightrank.decision.comparison import CONFIDENCE, NORMAL
from rightrank.decision.seeds import NOISE
from rightrank.report.format import duration, quantity
from rightrank.report.terminal import left_out, preflight_lines, time_line
from rightrank.runs.hook import Hook, Started
from rightrank.runs.local import Prepared
from rightrank.schema.events import Event, Notice, SelectionPlanned, TimeExpected
from rightrank.schema.metrics import MetricKind
from rightrank.schema.results import Preflight, PreflightCost, PreflightRank, Resolution
from rightrank.schema.settings import MAX_EVAL_ITEMS
from rightrank.schema.trials import Arm, TrialFinished, split_name
from rightrank.train.pace import RUN_EVALUATIONS, Pace, measure_pace

WITH_MARGIN = ("token_loss", "pair_loss", "accuracy")  # kinds of metrics whose default margin is a number


def outlook_of(prepared: Prepared) -> Preflight:
    """What a prepared selection will do and cost, by a few real steps of its highest rank."""
    return _outlook(prepared, _pace_of(prepared))


def _pace_of(prepared: Prepared) -> Pace | None:
    """The pace of the highest rank, by a few real steps; None where trainings run in workers, or memory runs out."""
    settings = prepared.settings
    if settings.executor != "local":
        return None
    arm = Arm(
        rank=max(settings.ranks),
        learning_rate=min(settings.learning_rates),
        lora_alpha=settings.lora_alpha,
        seed=settings.seeds[0],
        steps=prepared.steps,
    )
    return measure_pace(prepared.runtime, arm)


def _outlook(prepared: Prepared, pace: Pace | None) -> Preflight:
    """What the selection will do and cost. The time expected is at the mean pace of the ranks, at most at that of the highest."""
    settings, data, planned, strategy = prepared.settings, prepared.started.data, prepared.planned, prepared.strategy
    scored, space, trainings = data.splits["selection"].items, strategy.space, strategy.cost()
    expected = at_most = for_an_example = None
    notes: list[str] = []
    if pace is not None:
        arms, points = strategy.expected_arms(), settings.eval_points
        expected = pace.seconds(fmean(settings.ranks), trainings.expected, arms, points)
        at_most = pace.seconds(max(settings.ranks), trainings.maximum, trainings.max_arms, points)
        for_an_example = (arms + RUN_EVALUATIONS) * pace.evaluation_seconds / scored
        steps, examples = quantity(len(pace.batches), "step"), quantity(len(pace.evaluated), "validation example")
        basis = f"{steps} of rank {pace.rank} and {examples}"
        notes.append(time_line(expected, at_most, basis, settings.budget_hours))
    is_known = space.margin is not None or space.kind in WITH_MARGIN  # else it is a share of a value
    peaks, needed = (planned.peak_bytes, planned.needed_bytes) if planned else ({}, {})
    outlook = Preflight(
        metric=settings.metric_name,
        margin=space.margin_at(0.0) if is_known else None,
        goal=settings.goal,
        form=data.form,
        splits={split_name(name): split for name, split in data.splits.items()},
        splits_given=data.splits_given,
        left_out=left_out(data),
        longest=prepared.runtime.data.longest,
        seq_len=settings.seq_len,
        ranks=[
            PreflightRank(
                rank=rank,
                peak_bytes=peaks.get(rank),
                needed_bytes=needed.get(rank),
                fits=None if planned is None or planned.memory_bytes is None else rank in planned.ranks,
            )
            for rank in sorted(peaks) or settings.ranks
        ],
        memory_bytes=planned.memory_bytes if planned else None,
        cost=PreflightCost(
            strategy=strategy.name,
            steps=prepared.steps,
            trainings=trainings.expected,
            trainings_at_most=trainings.maximum,
            trainings_to_adapter=trainings.to_adapter,
            seconds=expected,
            seconds_at_most=at_most,
        ),
        seeds=len(settings.seeds),
        not_evaluated=data.not_evaluated,
        resolutions=resolutions(space.kind, scored, for_an_example),
    )
    notes += [*_resolution_lines(outlook), *_adapter_lines(prepared)]
    return outlook.model_copy(update={"notes": notes})


# Between examples, of the difference of two ranks: medians of the twelve long grids (benchmarks/selection/noise_model.py).
SPREADS: dict[MetricKind, float] = {"token_loss": 0.08, "pair_loss": 0.5, "loss": 0.5, "accuracy": 0.4}
RESOLVED = (200, 500, MAX_EVAL_ITEMS)  # examples


def resolutions(kind: MetricKind, scored: int, seconds_per_example: float | None) -> list[Resolution]:
    """What a selection is expected to resolve on 200, 500, 2,000 and the `scored` validation examples.

    Args:
        seconds_per_example: of all evaluations of the selection; None if not measured.
    """
    spread = SPREADS.get(kind)
    if spread is None:
        return []
    reach = NORMAL.inv_cdf(CONFIDENCE) * spread
    return [
        Resolution(
            examples=examples,
            expected_half_width=reach * math.sqrt(NOISE.ratio(1, examples)),
            expected_half_width_of_two_seeds=reach * math.sqrt(NOISE.ratio(2, examples)),
            seconds=None if seconds_per_example is None else max(0.0, (examples - scored) * seconds_per_example),
        )
        for examples in sorted({*RESOLVED, scored})
    ]


def _resolution_lines(outlook: Preflight) -> Iterator[str]:
    """The margin that the validation examples resolve, and what resolves more: examples or another seed."""
    scored = outlook.splits["validation"].items
    by_count = {row.examples: row for row in outlook.resolutions}
    if scored not in by_count:
        return
    others = ", ".join(
        f"{count:,}: ±{row.expected_half_width:.2g}" for count, row in by_count.items() if count != scored
    )
    here, most = by_count[scored], by_count[max(by_count)]
    more, cost = "", outlook.cost
    if most.examples > scored:
        minutes = "" if most.seconds is None else f" (about {duration(most.seconds)} more)"
        seed = "" if cost.seconds is None else f" (about {duration(cost.seconds / outlook.seeds)} more)"
        more = f"; {most.examples:,} examples{minutes} make it ±{most.expected_half_width:.2g}, another seed{seed} ±{here.expected_half_width_of_two_seeds:.2g}"
        if most.examples > scored + outlook.not_evaluated:
            more += "; the data have fewer: give more rows or a larger validation_fraction"
    yield (
        f"{scored:,} validation examples are expected to tell ranks apart to ±{here.expected_half_width:.2g} with one seed ({others}){more}"
    )


def _adapter_lines(prepared: Prepared) -> Iterator[str]:
    """What the kind of the adapters changes, and the top rank."""
    targets = prepared.runtime.targets
    if targets.why_alone is not None:
        yield targets.why_alone
    if left_out := ",".join(targets.left_out):
        yield (
            f"all-linear adapts modules alone; PEFT's also adapts the parameters {left_out}: for adapters on them, which "
            f"train alone, --set target_parameters={left_out}"
        )
    if targets.why_not_truncated is not None:
        yield f"no adapter is truncated ({targets.why_not_truncated}): the rank to train at is sought from trainings alone"
        return
    top = max(prepared.settings.ranks)
    yield f"top rank {top} ({prepared.top_origin}): trained once, then truncated to lower ranks for the adapter"


MIN_STEPS = 30  # of a training; the measured steps of a shorter one would be a noticeable part of it


class Outlook(Hook):
    """Tells what the selection will cost; where trainings are long, by a few steps that are measured."""

    ends_run = False
    _started: Started

    def on_start(self, started: Started) -> None:
        self._started = started

    def on_event(self, event: Event) -> None:
        if not isinstance(event, SelectionPlanned):
            return
        prepared, tell = self._started.plan, self._started.tell
        assert isinstance(prepared, Prepared)
        # A trial that has ended gives its time.
        ended = any(isinstance(outcome, TrialFinished) and outcome.rank > 0 for outcome in event.outcomes)
        pace = _pace_of(prepared) if prepared.steps >= MIN_STEPS and not ended else None
        outlook = _outlook(prepared, pace)
        if outlook.cost.seconds is not None:
            tell(TimeExpected(expected_seconds=outlook.cost.seconds))
        lines = [*preflight_lines(outlook), *outlook.notes]
        if names := [spec.name for spec in prepared.settings.metric_specs if not spec.is_measured_along]:
            lines.append(
                f"{', '.join(names)}: measured on the base, at the end of each training, and on the test split: "
                f"{prepared.started.data.splits['selection'].items} examples, at most {prepared.settings.max_new_tokens} new tokens "
                "each where the model writes; the time is reported after the base"
            )
        for line in lines:
            tell(Notice(text=line))
