"""The examples in the docstrings of `Executor` and `Crew` do what the docstrings require."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.scale.stub_worker import StubWorker

import rightrank.plugins.cluster.pool
from rightrank.plugins.cluster.pool import Crew, Job, Pool, PoolExecutor, PoolOptions, WorkerSetup
from rightrank.plugins.cluster.worker import versions
from rightrank.runs import calls as custom
from rightrank.runs.executor import Executor
from rightrank.schema.trials import Arm, Trial, TrialFinished


def example(of: type, name: str, **names: Any) -> Any:
    """The class `name` in the docstring of a protocol."""
    code = re.search(rf"^    class {name}.*", inspect.getdoc(of) or "", re.DOTALL | re.MULTILINE)
    assert code is not None
    exec(textwrap.dedent(code[0]), names)
    return names[name]


def trials() -> list[Trial]:
    return [
        Trial(trial_id=f"t{rank}", arm=Arm(rank=rank, learning_rate=1e-3, lora_alpha=32.0, seed=0, steps=2))
        for rank in (1, 4, 16)
    ]


def test_the_executor_of_the_docstring_yields_one_outcome_per_trial() -> None:
    executor: Executor = example(Executor, "FormulaExecutor", **vars(rightrank.runs.executor) | vars(custom))()
    outcomes = list(executor.run(trials(), None))
    assert [outcome.arm for outcome in outcomes] == [trial.arm for trial in trials()]
    assert all(isinstance(outcome, TrialFinished) for outcome in outcomes)


def test_the_crew_of_the_docstring_serves_a_pool(tmp_path: Path) -> None:
    (tmp_path / "probe").write_text("token")
    job = Job(name="job", model="m", data="d", settings={}, folder=tmp_path, fingerprint="f")
    setup = WorkerSetup(jobs=[job], working_folder=Path.cwd(), share=str(tmp_path), probe="probe")
    names = vars(rightrank.plugins.cluster.pool) | vars(rightrank.plugins.cluster.pool) | {"Worker": StubWorker}
    crew: Crew = example(Crew, "InlineCrew", **names)(setup)
    pool = Pool(crew, PoolOptions(workers=2, versions=versions(), token="token"))
    outcomes = list(PoolExecutor(pool, "job").run(trials(), None))
    pool.close()
    assert sorted(outcome.trial_id for outcome in outcomes) == ["t1", "t16", "t4"]
