"""A user's training function as tasks of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from rightrank.plugins.cluster.ray_cluster import connected
from rightrank.runs.calls import NO_RESULT, Call, TrainerDivergedError, TrainerError, TrainFunction, call_inline
from rightrank.schema.trials import TrialTask

POLL_SECONDS = 0.2  # between looks at the reports of a call


def call_on_ray(train: TrainFunction) -> Call:
    """Call `train` as a task of the Ray cluster at `RAY_ADDRESS`, or on this machine; with a GPU if the cluster has any.

    Ray repeats a call whose node is lost. Reports pass through a queue, which is an actor without a CPU of its own.

    Raises:
        MissingExtraError, RunError: Ray is not installed, or no cluster can be joined.
    """
    ray = connected(os.environ.get("RAY_ADDRESS"))
    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    options: dict[str, int] = {"num_cpus": 1, "num_gpus": gpus, "max_retries": 2, "max_calls": 1}
    remote = ray.remote(**options)(_reporting_by_queue(call_inline(train)))

    def call(task: TrialTask) -> object:
        from ray.util.queue import Queue

        reports = Queue(actor_options={"num_cpus": 0})
        try:
            answer = remote.remote(task.reporting_to(None), reports)
            while not ray.wait([answer], timeout=POLL_SECONDS)[0]:
                _pass_on(reports, task)
            _pass_on(reports, task)
            return ray.get(answer)
        except ray.exceptions.RayTaskError as error:  # what `train` raised
            kind = TrainerDivergedError if isinstance(error.cause, TrainerDivergedError) else TrainerError
            raise kind(str(error.cause)) from None
        except ray.exceptions.RayError as error:
            raise TrainerError(f"{NO_RESULT} ({type(error).__name__})") from None
        finally:
            reports.shutdown()

    return call


def _reporting_by_queue(call: Call) -> Callable[[TrialTask, Any], object]:
    def remote_call(task: TrialTask, reports: Any) -> object:
        return call(task.reporting_to(reports.put))

    return remote_call


def _pass_on(reports: Any, task: TrialTask) -> None:
    """Report to the task what waits in the queue."""
    for point in reports.get_nowait_batch(reports.qsize()):
        task.report(point.step, point.value, point.item_scores)
