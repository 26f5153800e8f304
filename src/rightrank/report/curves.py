"""Curves over the steps of a training: held-out values, and the training loss of every training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from rightrank.decision.run import Records
from rightrank.report.figure import Axis, Figure, Series, metric_axis
from rightrank.schema.decision import Decision, RankEvidence
from rightrank.schema.trials import TrialFinished


def trained(decision: Decision) -> list[RankEvidence]:
    """The ranks that were trained, ascending."""
    return sorted((evidence for evidence in decision.ranks if evidence.rank > 0), key=lambda evidence: evidence.rank)


def _best_trials(records: Records, decision: Decision | None) -> dict[int, list[TrialFinished]]:
    """The trials of each rank at its best learning rate: those that the decision names, if there is one."""
    finished = records.finished()
    by_id = {trial.trial_id: trial for trial in finished}
    if decision is not None:
        named = {e.rank: [by_id[i] for i in e.trial_ids if i in by_id] for e in trained(decision)}
        return {rank: trials for rank, trials in named.items() if trials}
    groups = by_rank([trial for trial in finished if trial.rank > 0 and trial.arm.is_direct])
    return {rank: [best_of(trials, records)] for rank, trials in groups.items()}


def best_of(trials: Sequence[TrialFinished], records: Records) -> TrialFinished:
    """The trial with the best held-out value."""
    sign = -1 if records.started.higher_is_better else 1
    return min(trials, key=lambda trial: sign * trial.value)


def by_rank(trials: Sequence[TrialFinished]) -> dict[int, list[TrialFinished]]:
    """The trials of each rank, ranks ascending."""
    ranks = sorted({trial.rank for trial in trials})
    return {rank: [trial for trial in trials if trial.rank == rank] for rank in ranks}


MAX_POINTS = 100  # of the training loss of one training; each is the mean over equally many steps
SMOOTHED_OVER = 0.1  # of the steps: a batch's loss varies more than two ranks differ
FIRST_SHOWN = 0.1  # of the steps: what falls before may be off the scale, or the end would be a flat line
MAX_TRAININGS = 12


def learning_figure(records: Records, decision: Decision | None) -> Figure | None:
    """Held-out values and the training loss by step: each rank at its best learning rate, means over seeds."""
    best = _best_trials(records, decision)
    finished = {trial.trial_id: trial for trial in records.finished()}
    metric = records.started.points_metric or records.started.metric
    base = next((trial.metrics.get(metric) for trial in finished.values() if trial.rank == 0), None)
    series: list[Series] = []
    rows: list[tuple[int, int, float, float | None]] = []
    for place, (rank, trials) in enumerate(best.items()):
        held, before = _mean([_held_out(trial, finished, metric) for trial in trials]), _before_points(trials)
        rows += [(rank, step, value, before.get(step)) for step, value in held.items()]
        if held and min(held) > 0 and base is not None:  # at step 0 the adapter is the base model
            held = {0: base, **held}
        if held:
            series.append(Series(f"rank {rank}", tuple(held), tuple(held.values()), tone=place))
        losses = _mean_losses(trials) or before
        if losses and metric == "loss":
            x, y = tuple(losses), tuple(losses.values())
            series.append(Series(f"rank {rank}", x, y, kind="line", dashed=True, tone=place))
    if not series:
        return None
    ends = ", ".join(
        f"rank {rank} {fmean(t.metrics.get(metric, t.value) for t in trials):.4g}" for rank, trials in best.items()
    )
    return Figure(
        name="learning_curves",
        title="Learning curves (training dashed)" if metric == "loss" else "Learning curves",
        alt=f"Held-out {metric} by step, each rank at its best learning rate. At the end: {ends}.",
        x=Axis("step"),
        y=metric_axis(metric, "held-out", _late_limits(series)),
        series=tuple(series),
        columns=("rank", "step", "held-out", "training"),
        rows=tuple(rows),
    )


def _late_limits(series: Sequence[Series]) -> tuple[float, float]:
    """The limits of all values after the first steps, with some room."""
    begin = FIRST_SHOWN * max(one.x[-1] for one in series)
    late = [value for one in series for step, value in zip(one.x, one.y, strict=True) if step >= begin]
    room = 0.06 * ((max(late) - min(late)) or abs(late[0]) or 1.0)
    return min(late) - room, max(late) + room


def _held_out(trial: TrialFinished, finished: Mapping[str, TrialFinished], metric: str) -> dict[int, float]:
    """Step → held-out value of the training, with those at which it had been stopped before it was resumed."""
    found = {point.step: point.value for point in trial.points}
    stage = finished.get(trial.continue_from or "")
    while stage is not None:
        if stage.stop_at is not None and metric in stage.metrics:
            found.setdefault(stage.stop_at, stage.metrics[metric])
        stage = finished.get(stage.continue_from or "")
    return found


def _mean(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The mean of the curves at the steps that all of them have."""
    steps = sorted(set.intersection(*map(set, curves)))
    return {step: fmean(curve[step] for curve in curves) for step in steps}


def _before_points(trials: Sequence[TrialFinished]) -> dict[int, float]:
    """Step of an evaluation → mean training loss since the one before, mean over the trials."""
    known = [(p.step, p.train_value) for trial in trials for p in trial.points if p.train_value is not None]
    return {at: fmean(value for step, value in known if step == at) for at in sorted({step for step, _ in known})}


def _mean_losses(trials: Sequence[TrialFinished]) -> dict[float, float]:
    """Step → training loss, mean over the trials; empty where they did not record as many losses."""
    losses = [trial.train_losses for trial in trials]
    if len({len(one) for one in losses}) != 1:
        return {}
    curve = averaged([fmean(step) for step in zip(*losses, strict=True)])
    return smoothed(curve, SMOOTHED_OVER * len(losses[0]))


def averaged(losses: Sequence[float]) -> dict[float, float]:
    """Step → mean loss of at most `MAX_POINTS` groups of consecutive steps; the step is the middle of its group.

    `losses` are one for each step, beginning with step 1.
    """
    width = max(1, -(-len(losses) // MAX_POINTS))
    groups = [(start, losses[start : start + width]) for start in range(0, len(losses), width)]
    return {start + (len(group) + 1) / 2: fmean(group) for start, group in groups}


def smoothed(curve: Mapping[float, float], width: float) -> dict[float, float]:
    """The running mean over `width` steps around each point, over fewer at the ends of the curve."""
    return {step: fmean(value for other, value in curve.items() if abs(other - step) <= width / 2) for step in curve}


def training_loss_figure(records: Records) -> Figure | None:
    """Training loss by step of every training as a running mean, dashed where it stopped early; None where no step was recorded.

    A training that resumes another one has its steps too, and is shown in its place. Of more than `MAX_TRAININGS`, the
    best of every rank are shown, then the second best, and so on.
    """
    trainings = _trainings(records)
    if not trainings:
        return None
    shown = _most_telling(trainings, records.started.higher_is_better)
    ranks = list(by_rank(trainings))
    labels = _labels(shown)
    count = "" if len(shown) == len(trainings) else f" ({len(shown)} of {len(trainings)} trainings)"
    curves = [averaged(trial.train_losses) for trial in shown]
    width = SMOOTHED_OVER * max(len(trial.train_losses) for trial in shown)
    means = [smoothed(curve, width) for curve in curves]
    ends = ", ".join(f"{label} {list(mean.values())[-1]:.4g}" for label, mean in zip(labels, means, strict=True))
    series = [
        Series(
            label,
            tuple(mean),
            tuple(mean.values()),
            kind="line",
            dashed=trial.stop_at is not None,
            tone=ranks.index(trial.rank),
        )
        for trial, label, mean in zip(shown, labels, means, strict=True)
    ]
    return Figure(
        name="training_loss",
        title=f"Training loss by step, running mean{count}",
        alt=f"Training loss by step. At the end: {ends}.",
        x=Axis("step"),
        y=Axis("training loss, nats", limits=_late_limits(series)),
        series=tuple(series),
        columns=("rank", "learning rate", "seed", "step", "training loss", "running mean"),
        rows=tuple(
            (trial.rank, trial.learning_rate, trial.seed, step, loss, mean[step])
            for trial, curve, mean in zip(shown, curves, means, strict=True)
            for step, loss in curve.items()
        ),
    )


def _trainings(records: Records) -> list[TrialFinished]:
    """The trainings from step 0 with recorded losses, without those that another one resumes and annealed copies."""
    finished = records.finished()
    resumed = {trial.continue_from for trial in finished if not trial.arm.is_annealed}
    return [
        trial
        for trial in finished
        if trial.train_losses
        and trial.truncate_from is None
        and not trial.arm.is_annealed
        and trial.trial_id not in resumed
    ]


def _most_telling(trainings: Sequence[TrialFinished], higher_is_better: bool) -> list[TrialFinished]:
    """At most `MAX_TRAININGS`, by ascending rank and learning rate."""
    sign = -1 if higher_is_better else 1
    places: list[tuple[int, int, TrialFinished]] = []
    for rank, trials in by_rank(trainings).items():
        ordered = sorted(trials, key=lambda trial: (trial.stop_at is not None, sign * trial.value))
        places += [(place, rank, trial) for place, trial in enumerate(ordered)]
    chosen = [trial for _, _, trial in sorted(places, key=lambda found: found[:2])[:MAX_TRAININGS]]
    return sorted(chosen, key=lambda trial: (trial.rank, trial.learning_rate, trial.seed))


def _labels(trials: Sequence[TrialFinished]) -> list[str]:
    """`rank 4 at 0.001`, with whatever else tells two trainings apart."""
    plain = [f"rank {trial.rank} at {trial.learning_rate:g}" for trial in trials]
    if len({trial.seed for trial in trials}) > 1:
        plain = [f"{label}, seed {trial.seed}" for label, trial in zip(plain, trials, strict=True)]
    return [
        label if plain.count(label) == 1 else f"{label}, trial {trial.trial_id[:4]}"
        for label, trial in zip(plain, trials, strict=True)
    ]
