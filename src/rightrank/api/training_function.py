"""Select a rank with your own training function: `select_rank_with`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rightrank.runs.run import Hook, Selected
from rightrank.schema.metrics import Margin
from rightrank.schema.settings import Goal

if TYPE_CHECKING:
    from rightrank.trainers.custom_trainer import EvaluateFunction, TrainFunction


def select_rank_with(
    train: TrainFunction,
    out: str | Path,
    *,
    ranks: Sequence[int] | int = (0, 1, 4, 16, 64),
    learning_rates: Sequence[float] | float = (3e-4, 1e-3, 3e-3, 1e-2),
    seeds: Sequence[int] | int = (0,),
    metric: str = "loss",
    margin: Margin | None = None,
    evaluate: EvaluateFunction | None = None,
    goal: Goal = "training-rank",
    strategy: str = "grid",
    lora_alpha: float = 32.0,
    max_steps: int | None = None,
    callbacks: Sequence[Hook] = (),
    progress: bool = False,
) -> Selected:
    """Find the rank with your own training function: DPO, RL, diffusion, vision, any script.

    Args:
        train: called with a `TrialTask`; returns a mapping of held-out metrics or a `TrialResult`. It is also called for the base
            if 0 is among the ranks, as by default; if it raises an error for rank 0, the result says that the base was not measured.
            With `example_scores` in the result (the same examples in every trial) ranks are compared example by example, which
            resolves far smaller differences. `task.report(step, value, example_scores)` reports values during the training. All
            randomness must come from `task.seed`, so that trainings differ only in their rank.
        out: the run folder. A second call with the same arguments resumes; failed trials run again.
        seeds: the seeds of the trainings.
        metric: the name of the deciding metric, after `max:` or `min:` if its direction is not known from the name
            (`accuracy`, `reward`, `loss`, … are known).
        margin: the loss of quality that you accept: a share of the gain over rank 0 such as "2%", or a number in the metric's unit;
            None for 1% of the gain. A metric that is neither a loss nor a share of right answers needs rank 0 or a number.
        evaluate: called with a PEFT adapter folder and a `TrialTask`; returns the same as `train`. With it, the adapter that
            `train` saved for the largest rank is truncated to every lower rank, and the smallest one within the margin is
            exported (the deployment rank).
        goal: "adapter" stops at the deployment rank and needs `evaluate`; "training-rank" continues to the training rank.
        lora_alpha: passed to `train` in the task, and recorded for the adapters.
        max_steps: passed to `train` in the task as `steps`; None lets the function choose the length.
        callbacks: hooks that watch the selection and can stop it, such as `rightrank.runs.trackers.Trackers`.
        progress: show the progress on stderr.

    Raises:
        InputError: an argument that is not allowed, a metric without a known direction, or a folder made with other settings.
        AllTrialsFailedError: fewer than two ranks have a result.
        InterruptedRun: `should_stop` of a callback returned True.
    """
    from rightrank.data.files import report_disk_errors
    from rightrank.runs.folder import RunFolder
    from rightrank.runs.hooks import Report, View
    from rightrank.runs.run import select
    from rightrank.trainers.custom_trainer import build_custom_request

    values = {"ranks": ranks, "learning_rates": learning_rates, "seeds": seeds, "margin": margin, "goal": goal}
    values |= {"strategy": strategy, "lora_alpha": lora_alpha, "max_steps": max_steps}
    request = build_custom_request(train, evaluate, metric, values)
    folder = RunFolder(Path(out))
    with folder.lock(), report_disk_errors(folder.path), ExitStack() as stack:
        views = [stack.enter_context(View())] if progress else []
        return select(request.prepare, folder, [*views, Report(), *callbacks])
