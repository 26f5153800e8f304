"""Test `GRPOTrain` of `examples/trl_grpo.py`: seeds, held-out scores, the best checkpoint, bad rewards."""

from __future__ import annotations

import math
import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rightrank import TrialTask
from rightrank.schema.errors import NotFiniteError, ReportError, RunError
from rightrank.trainers.custom_trainer import call_function
from tests.tiny import generate_sentences

pytestmark = [
    pytest.mark.trains,
    pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed"),
    pytest.mark.filterwarnings("ignore"),  # a trainer's own deprecations
]

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPTS = [{"prompt": f"{text} ", "answer": text.split()[0]} for text in generate_sentences(24, 5)]
QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "logging_steps": 100}


@pytest.fixture(autouse=True)
def beside_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def reward_letters(completions: list[str], **_: Any) -> list[float]:
    """Return the fraction of letters that are an e."""
    return [text.count("e") / max(1, len(text)) for text in completions]


def make_grpo(model: Path, reward: Any = reward_letters, **more: Any) -> Any:
    from trl import GRPOConfig

    train = runpy.run_path(str(EXAMPLES / "trl_grpo.py"))["GRPOTrain"]
    settings = GRPOConfig(per_device_train_batch_size=8, num_generations=4, max_completion_length=6, **QUIET)
    options = {
        "num_evaluations": 2,
        "train_dataset": PROMPTS[8:],
        "validation": PROMPTS[:4],
        "test": PROMPTS[4:8],
    } | more
    options["train_dataset"] = make_dataset(options["train_dataset"])
    return train(model=str(model), args=settings, reward_funcs=reward, **options)


def make_dataset(rows: list[dict[str, str]]) -> Any:

    return Dataset.from_list(rows)


def make_task(folder: Path, **more: Any) -> TrialTask:
    folder.mkdir(exist_ok=True)
    values = {"rank": 2, "learning_rate": 1e-2, "lora_alpha": 32.0, "seed": 0, "steps": 4}
    return TrialTask(trial_id="trial", folder=folder, **values | more)


def test_a_seed_repeats_a_training_and_another_does_not(model_folder: Path, tmp_path: Path) -> None:
    train = make_grpo(model_folder)
    first, repeated, other_seed = (
        train(make_task(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == repeated
    assert first.points[0] == other_seed.points[0]  # before the first step
    assert first.points[-1] != other_seed.points[-1]
    assert [point.step for point in first.points] == [0, 2, 4]
    assert all(len(point.example_scores or []) == 4 for point in first.points)
    assert first.trainable_parameters > 0


def test_the_best_look_is_what_is_saved_and_measured(model_folder: Path, tmp_path: Path) -> None:
    """Reward only the untrained adapter's answers, so that the evaluation before the first step is the best."""

    train = make_grpo(model_folder)
    untrained = train(make_task(tmp_path / "base", rank=0))
    level = untrained.metrics["reward"]
    best = make_grpo(model_folder, FirstAnswers())
    result = best(make_task(tmp_path / "a", learning_rate=0.3))
    assert [point.value for point in result.points] == [1.0, 0.0, 0.0]
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = base(ids).logits
        actual = PeftModel.from_pretrained(base, tmp_path / "a")(ids).logits
    torch.testing.assert_close(actual, expected)
    assert level >= 0


class FirstAnswers:
    """1 for the first answer to each held-out prompt that was seen, 0 for any other answer and any sampled one."""

    __name__ = "first_answers"

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        firsts = [self.seen.setdefault(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        return [float(text == first) for text, first in zip(completions, firsts, strict=True)]


def return_short(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * (len(completions) - 1)


def return_nan(completions: list[str], **_: Any) -> list[float]:
    return [math.nan] * len(completions)


def raise_error(completions: list[str], **_: Any) -> list[float]:
    raise ZeroDivisionError("no judge")


@pytest.mark.parametrize(
    ("reward", "error", "reason"),
    [
        (return_short, ReportError, "got 3 rewards for 4 completions"),
        (return_nan, NotFiniteError, "gave value = nan: Input should be a finite number"),
        (raise_error, RunError, "raised ZeroDivisionError: no judge"),
    ],
)
def test_a_bad_reward_is_one_clear_line(
    model_folder: Path, tmp_path: Path, reward: Any, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason) as raised:
        call_function(make_grpo(model_folder, [reward]), make_task(tmp_path / "a"), "reward")
    assert "\n" not in str(raised.value)
