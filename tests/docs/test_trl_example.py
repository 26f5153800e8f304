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
from transformers import AutoModelForCausalLM, AutoTokenizer

from rightrank import TrialTask, select_rank_with
from rightrank.schema.errors import AllTrialsFailedError, NotFiniteError, ReportError, RunError
from rightrank.trainers.calls import call_function
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


def test_a_bad_reward_ends_the_selection_before_the_first_step_and_the_metric_is_named_by_the_function(
    model_folder: Path, tmp_path: Path
) -> None:
    train = make_grpo(model_folder, return_short)
    options: dict[str, Any] = {"ranks": (1, 2), "learning_rates": (1e-2,), "max_steps": 2}
    with pytest.raises(AllTrialsFailedError, match=r"train got 3 rewards .* finished trials are kept"):
        select_rank_with(train, tmp_path / "run", **options)
    lines = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    assert sum('"type":"trial_started"' in line for line in lines) == 1
    selected = select_rank_with(make_grpo(model_folder), tmp_path / "other", **options).decision
    assert (selected.metric, selected.higher_is_better) == ("reward", True)


def test_a_reward_that_does_not_apply_counts_nothing(model_folder: Path, tmp_path: Path) -> None:
    def sometimes(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
        return [None if len(right) > 3 else 1.0 for right in answer]

    train = make_grpo(model_folder, [sometimes])
    result = train(make_task(tmp_path / "a", rank=0))
    assert result.example_scores == [float(len(row["answer"]) <= 3) for row in PROMPTS[4:8]]


def test_greedy_rewards_do_not_depend_on_the_batch(model_folder: Path) -> None:

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    model.train()
    rewards = []
    for size in (1, 6):
        train = make_grpo(model_folder, [reward_letters, reward_letters], eval_batch_size=size)
        train.args.reward_weights, train.args.max_completion_length = [1.0, 0.5], 8
        rewards.append(train.compute_rewards(model, tokenizer, PROMPTS[:6]))
    assert rewards[0] == pytest.approx(rewards[1])
    assert model.training
    messages = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in PROMPTS[:3]]
    judged: list[Any] = []

    def judge(completions: list[Any], **_: Any) -> list[float]:
        judged.extend(completions)
        return [1.0] * len(completions)

    train = make_grpo(model_folder, judge, eval_batch_size=2)
    train.args.reward_weights = [2.0]
    assert train.compute_rewards(model, tokenizer, messages) == [2.0] * 3
    assert [completion[0]["role"] for completion in judged] == ["assistant"] * 3
