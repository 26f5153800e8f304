"""Test that the example in the docstring of `Executor` follows the docstring."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

import rightrank.runs.selection
from rightrank.runs import custom_trainer
from rightrank.runs.selection import Executor
from rightrank.schema.trials import Arm, Trial, TrialFinished


def load_example(of: type, name: str, **names: Any) -> Any:
    """Return the class `name` in the docstring of a protocol."""
    code = re.search(rf"^    class {name}.*", inspect.getdoc(of) or "", re.DOTALL | re.MULTILINE)
    assert code is not None
    exec(textwrap.dedent(code[0]), names)
    return names[name]


def build_trials() -> list[Trial]:
    return [
        Trial(trial_id=f"t{rank}", arm=Arm(rank=rank, learning_rate=1e-3, lora_alpha=32.0, seed=0, steps=2))
        for rank in (1, 4, 16)
    ]


def test_the_executor_of_the_docstring_yields_one_outcome_per_trial() -> None:
    executor: Executor = load_example(
        Executor, "FormulaExecutor", **vars(rightrank.runs.selection) | vars(custom_trainer)
    )()
    outcomes = list(executor.run(build_trials(), None))
    assert [outcome.arm for outcome in outcomes] == [trial.arm for trial in build_trials()]
    assert all(isinstance(outcome, TrialFinished) for outcome in outcomes)
