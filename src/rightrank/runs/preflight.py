"""The preflight: what a selection will do and cost, before any training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from rightrank.decision.adapter import Criterion
from rightrank.decision.comparison import CONFIDENCE, NORMAL
from rightrank.report.format import format_quantity
from rightrank.report.progress import describe_data_issues, format_memory, format_preflight_cost, format_time_estimate
from rightrank.runs.prepare import LoadedSelection
from rightrank.runs.run import Hook, Run
from rightrank.schema.events import Event, SelectionPlanned
from rightrank.schema.metrics import MetricKind, get_margin_share, infer_metric_kind
from rightrank.schema.results import Preflight, PreflightCost, PreflightRank
from rightrank.schema.trials import TrialFinished
from rightrank.search.protocol import orient_value
from rightrank.training.pace import Pace, measure_pace

MEASURING = "measuring a few steps at the highest rank"

MAX_NEEDED_EXAMPLES = 10**9  # more than any file has


def run_preflight(prepared: LoadedSelection, announce: Callable[[str], None]) -> Preflight:
    """Report what a prepared selection will do and cost, measured by a few real steps at its highest rank."""
    announce(MEASURING)
    pace = _measure_top_pace(prepared)
    preflight, time_text = _build_preflight(prepared, pace)
    notes = [*_format_resolution(prepared), *_format_exceptions(prepared)]
    if pace is not None:
        basis = f"{format_quantity(len(pace.batches), 'step')} of rank {pace.rank}"
        notes.insert(0, f"time: {time_text} (measured before the start: {basis}; the measured training is discarded)")
    return preflight.model_copy(update={"notes": notes})


def _measure_top_pace(prepared: LoadedSelection) -> Pace | None:
    """Measure the pace of the highest rank in a few real steps; None if trainings run in workers, or memory runs out."""
    space = prepared.strategy.space
    arm = space.make_arm(space.top, space.first_rates[0])
    return None if prepared.settings.has_workers else measure_pace(prepared.runtime, arm)


def _build_preflight(prepared: LoadedSelection, pace: Pace | None) -> tuple[Preflight, str]:
    settings, data, planned, strategy = prepared.settings, prepared.started.data, prepared.planned, prepared.strategy
    trainings = strategy.estimate_cost()
    expected = at_most = None
    time_text = ""
    if pace is not None:
        arms, points = strategy.estimate_arms(), settings.num_evaluations
        expected = pace.predict_seconds(trainings.expected, arms, points)
        at_most = pace.predict_seconds(trainings.maximum, trainings.max_arms, points)
        time_text = format_time_estimate(expected, at_most, settings.budget_hours)
    peaks, needed = (planned.peak_bytes, planned.needed_bytes) if planned else ({}, {})
    criterion = strategy.space.criterion
    margin = criterion.margin if isinstance(criterion.margin, float) else None  # a share of the gain is not known yet
    resolution, examples_needed = estimate_resolution(criterion, data.splits["validation"].examples, margin)
    preflight = Preflight(
        metric=settings.metric_name,
        margin=margin,
        goal=settings.goal,
        form=data.form,
        splits=dict(data.splits),
        splits_given=data.splits_given,
        left_out=describe_data_issues(data),
        longest=prepared.runtime.data.max_sequence_length,
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
            trainings_to_adapter=trainings.expected_until_adapter,
            seconds=expected,
        ),
        not_evaluated=data.not_evaluated,
        resolution=resolution,
        examples_needed=examples_needed,
    )
    return preflight, time_text


# Standard deviation between examples of the difference of two ranks: medians of the twelve long grids (benchmarks/selection/noise_model.py).
EXAMPLE_STD: dict[MetricKind, float] = {"token_loss": 0.08, "pair_loss": 0.5, "loss": 0.5, "accuracy": 0.4}


def estimate_resolution(criterion: Criterion, examples: int, margin: float | None) -> tuple[float | None, int | None]:
    """Estimate the smallest difference that this many examples can tell from 0, and the number of examples that can tell the margin.

    The estimate is for two adapters of one training, as the standard deviation of earlier grids divided by √n, and one-sided at
    95%. Both are None for a metric that no grid has, and the number if it is above `MAX_NEEDED_EXAMPLES`.
    """
    kind = infer_metric_kind(criterion.metric, criterion.higher_is_better, criterion.loss)
    if kind not in EXAMPLE_STD:
        return None, None
    bound = NORMAL.inv_cdf(CONFIDENCE) * EXAMPLE_STD[kind]
    ratio = math.inf if margin is None else bound / margin
    return bound / math.sqrt(examples), None if ratio > math.sqrt(MAX_NEEDED_EXAMPLES) else math.ceil(ratio**2)


def _format_resolution(prepared: LoadedSelection, gain: float | None = None) -> Iterator[str]:
    """Yield a sentence on what the validation examples can tell; none for a metric that no grid has.

    Args:
        gain: What a training gained, of which the resolution is a share; None: not known yet.
    """
    data, criterion = prepared.started.data, prepared.strategy.space.criterion
    examples, share = data.splits["validation"].examples, get_margin_share(criterion.margin)
    margin = criterion.margin if isinstance(criterion.margin, float) else None
    margin = margin if gain is None or share is None else share * gain
    resolution, needed = estimate_resolution(criterion, examples, margin)
    if resolution is None:
        return
    unit = "nats" if criterion.metric == "loss" else f"in {criterion.metric}"
    difference, target = f"a difference of about {resolution:.2g} {unit}", f"the margin of {margin:g}" if margin else ""
    if gain is not None and share is not None:
        difference, target = f"about {resolution / gain:.1%} of the gain", f"{100 * share:.2g}%"
    if gain is not None and resolution >= gain:
        yield f"Your {examples:,} held-out rows can hardly tell the gain of {gain:.2g} from none."
        return
    text = f"Your {examples:,} held-out rows can tell {difference}"
    available = examples + data.not_evaluated
    if needed is not None and needed > examples:
        ways = f"--max-eval-examples {needed}" if needed <= available else f"have {available:,}"
        text += f"; {target} needs about {needed:,} ({ways})"
    yield f"{text}."


def _format_exceptions(prepared: LoadedSelection) -> Iterator[str]:
    """Yield what differs from an ordinary selection: adapters that cannot share a pass, parameters without adapters, no truncation."""
    targets = prepared.runtime.targets
    if targets.unshared_reason is not None:
        yield targets.unshared_reason
    if skipped_parameters := ",".join(targets.left_out):
        yield (
            f"all-linear adapts only modules, while PEFT also adapts the parameters {skipped_parameters}. To adapt them, with one "
            f"adapter per pass: --set target_parameters={skipped_parameters}"
        )
    if targets.untruncatable_reason is not None:
        yield f"no adapter is truncated ({targets.untruncatable_reason}): the training rank is decided from trainings alone"


MIN_MEASURED_STEPS = 30  # in shorter trainings, the measured steps would be a noticeable fraction of the time


class PreflightHook(Hook):
    """Reports the expected cost of the selection. If trainings are long, it measures a few steps."""

    _run: Run
    _base: TrialFinished | None = None  # until the gain of a training is known

    def on_start(self, run: Run) -> None:
        self._run = run

    def on_event(self, event: Event) -> None:
        if isinstance(event, TrialFinished):
            self._report_share(event)
        if not isinstance(event, SelectionPlanned):
            return
        prepared = self._run.selection
        assert isinstance(prepared, LoadedSelection)
        # A finished trial has a measured time.
        has_result = any(isinstance(outcome, TrialFinished) and outcome.rank > 0 for outcome in event.outcomes)
        pace = None
        if prepared.steps >= MIN_MEASURED_STEPS and not has_result:
            self._run.send_notice(MEASURING)
            pace = _measure_top_pace(prepared)
        preflight, time_text = _build_preflight(prepared, pace)
        lines = [
            format_preflight_cost(preflight, time_text),
            *_format_resolution(prepared),
            *_format_exceptions(prepared),
        ]
        if any(row.fits is False for row in preflight.ranks):
            lines.append(format_memory(preflight))
        if names := [spec.name for spec in prepared.settings.metric_specs if not spec.is_eval_metric]:
            lines.append(
                f"{', '.join(names)}: measured on the base, at the end of each training, and on the test split: "
                f"{prepared.started.data.splits['validation'].examples} examples, at most {prepared.settings.max_new_tokens} new tokens "
                "each if the model generates text"
            )
        self._report(lines)

    def _report_share(self, finished: TrialFinished) -> None:
        """Report what the validation examples can tell of the gain, as soon as the first training after the base shows one."""
        base, prepared = self._base, self._run.selection
        assert isinstance(prepared, LoadedSelection)
        if finished.rank == 0:
            self._base = finished
        elif base is not None and finished.value_metric is None and finished.arm.is_direct:
            space = prepared.strategy.space
            gain, self._base = orient_value(base, space) - orient_value(finished, space), None
            if gain > 0 and get_margin_share(space.criterion.margin) is not None:
                self._report(_format_resolution(prepared, gain))

    def _report(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._run.send_notice(line)
