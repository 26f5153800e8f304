"""TRL's `GRPOTrainer` with the profile `rl`: the reward of one greedy answer to each held-out prompt decides.

python examples/trl_grpo.py --model path/to/model --data data.jsonl     (rows of prompt and completion)

`GRPOTrain` trains a task with its rank, learning rate and seed, reports the held-out scores along the way, stops early a run that has
collapsed, goes back to the best look by the validation rows, and measures it on the test rows. Copy it, and give it your reward functions.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from common import options, rows_of
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rightrank import EvalPoint, TrialResult, TrialTask, select_rank_with
from rightrank.decision.table import best_point, collapse_of
from rightrank.schema.errors import ReportError
from rightrank.train.metrics import token_f1

MIN_LOOKS_TO_END = 3  # the best one, and two far below it
RewardFunction: TypeAlias = Callable[..., Sequence[float | None]]
Rows: TypeAlias = Any  # a `datasets.Dataset`, or a list of rows


@dataclass(frozen=True, kw_only=True)
class GRPOTrain:
    """One training with `GRPOTrainer`: the adapter, the looks, the best checkpoint, and its test by the reward of one greedy
    completion of each held-out prompt.

    Rows have `prompt`, a string or a list of messages, and the columns that the reward functions read.
    """

    metric = "reward"
    higher_is_better = True

    model: str
    """Folder or hub name of the base."""
    args: Any
    """The trainer's configuration. Learning rate, seed, steps and output folder come from the task."""
    train_dataset: Rows
    validation: Rows
    """Rows of the looks. The best checkpoint is the one with the best mean over them."""
    test: Rows
    """Rows that measure the best checkpoint. Ranks are compared by them."""
    reward_funcs: RewardFunction | Sequence[RewardFunction]
    looks: int = 10
    """Evaluations along the training, beside the one before the first step."""
    eval_batch_size: int = 64
    lora: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of `LoraConfig`, such as `target_modules`; all linear layers by default."""

    def __call__(self, task: TrialTask) -> TrialResult:
        """Train the task. Rank 0 is the base, which is measured and not trained."""
        gc.collect()  # the trainer before, and the model with which it is in a cycle
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        if task.rank == 0:
            base = AutoModelForCausalLM.from_pretrained(self.model, **(self.args.model_init_kwargs or {}))
            return self._measured(base, tokenizer)

        lora: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **self.lora}
        looks = _Looks(task, partial(self.rewards, tokenizer=tokenizer, rows=self.validation), self.looks)
        trainer = GRPOTrainer(
            self.model,
            reward_funcs=self._functions(),
            args=self._args_of(task),
            train_dataset=self.train_dataset,
            peft_config=LoraConfig(r=task.rank, lora_alpha=task.lora_alpha, **lora),  # type: ignore[arg-type]
            callbacks=[looks],
        )
        trainer.train()
        if looks.best:
            set_peft_model_state_dict(trainer.model, looks.best)
        trainer.model.save_pretrained(task.folder)
        return self._measured(trainer.model, tokenizer, looks)

    @torch.no_grad()
    def rewards(self, model: Any, tokenizer: Any, rows: Rows) -> list[float]:
        """The weighted sum of the rewards of each row's greedy completion, in the order of the rows.

        None stands for a reward that does not apply to a completion, as in TRL.

        Raises:
            ReportError: a function returned too few or too many rewards.
        """
        functions = self._functions()
        weights = self.args.reward_weights or [1.0] * len(functions)
        was_training, rewards = model.training, []
        model.eval()
        for start in range(0, len(rows), self.eval_batch_size):
            batch = [rows[place] for place in range(start, min(start + self.eval_batch_size, len(rows)))]
            prompts = [row["prompt"] for row in batch]
            completions, ids = _greedy(model, tokenizer, prompts, self.args.max_completion_length)
            columns = {name: [row[name] for row in batch] for name in batch[0] if name != "prompt"}
            rewarded = [
                list(function(prompts=prompts, completions=completions, completion_ids=ids, **columns))
                for function in functions
            ]
            wrong = next((len(given) for given in rewarded if len(given) != len(batch)), None)
            if wrong is not None:
                raise ReportError(f"got {wrong} rewards for {len(batch)} completions from a reward function")
            rewards += [
                sum(w * float(r) for w, r in zip(weights, row, strict=True) if r is not None)
                for row in zip(*rewarded, strict=True)
            ]
        model.train(was_training)
        return rewards

    def _functions(self) -> list[RewardFunction]:
        given = self.reward_funcs
        return [given] if callable(given) else list(given)

    def _measured(self, model: Any, tokenizer: Any, looks: _Looks | None = None) -> TrialResult:
        scores = self.rewards(model, tokenizer, self.test)
        return TrialResult(
            metrics={self.metric: sum(scores) / len(scores)},
            item_scores=scores,
            points=[] if looks is None else looks.points,
            trainable_parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            if looks
            else 0,
        )

    def _args_of(self, task: TrialTask) -> Any:
        """A copy of the configuration with what the task decides, without checkpoints and evaluations of its own."""
        args = copy.deepcopy(self.args)
        args.output_dir = str(task.folder / "trainer")
        args.learning_rate, args.seed, args.data_seed = task.learning_rate, task.seed, task.seed
        args.max_steps = task.steps or args.max_steps
        args.save_strategy = args.eval_strategy = "no"
        return args


def _greedy(model: Any, tokenizer: Any, prompts: list[Any], max_new_tokens: int) -> tuple[list[Any], list[list[int]]]:
    """The completions, strings or messages as the prompts are, and their tokens."""
    chat = not isinstance(prompts[0], str)
    if chat:
        prompts = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(
        prompts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=not chat,
        return_token_type_ids=False,
    ).to(model.device)
    written = model.generate(
        **encoded,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    end, rows = tokenizer.eos_token_id, written[:, encoded["input_ids"].shape[1] :].tolist()
    ids = [row[: row.index(end) + 1] if end in row else row for row in rows]
    answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [[{"role": "assistant", "content": text}] for text in answers] if chat else answers, ids


def should_stop_early(points: Sequence[EvalPoint], drop: float) -> bool:
    """Whether a training has collapsed so far that further steps are not worth their cost.

    Its last two looks are both far below the best, and below the middle between the first look and the best. Runs recover from
    lesser falls: a published one from .83 by way of .51 and .47 to .82 (docs/explanation/science.md, archive).
    """
    ordered = sorted(points, key=lambda point: point.step)
    if len(ordered) < MIN_LOOKS_TO_END:
        return False
    middle = (ordered[0].value + best_point(ordered, higher_is_better=True).value) / 2
    below = [point.value < middle for point in ordered[-2:]]
    both = (ordered, ordered[:-1])
    return all(below) and all(collapse_of(looks, drop) is not None for looks in both)


@dataclass(eq=False)
class _Looks(TrainerCallback):
    """Score the validation examples before the first step and at evenly spaced steps, and report each look to the task.

    The callback keeps the adapter of the best look, and ends a training that has collapsed for two looks (`should_stop_early`).
    """

    task: TrialTask
    score: Callable[[Any], list[float]]  # of the model: the reward of each validation row
    looks: int
    points: list[EvalPoint] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)  # the adapter of the best look

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._look(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step, steps = state.global_step, state.max_steps
        due = {max(1, round(steps * number / self.looks)) for number in range(1, self.looks + 1)}
        if step not in due:
            return
        self._look(model, step)
        drop = self.task.collapse_drop
        if drop is not None and should_stop_early(self.points, drop):
            control.should_training_stop = True

    def _look(self, model: Any, step: int) -> None:
        scores = self.score(model)
        value = sum(scores) / len(scores)
        self.task.report(step, value, scores)
        self.points.append(EvalPoint(step=step, value=value, item_scores=scores))
        if best_point(self.points, higher_is_better=True).step == step:
            state = get_peft_model_state_dict(model)
            self.best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [token_f1(right, text) for right, text in zip(answer, completions, strict=True)]


if __name__ == "__main__":
    arguments = options()
    rows = [{"prompt": row["prompt"], "answer": row["completion"]} for row in rows_of(arguments.data)]
    count = arguments.held_out
    train = GRPOTrain(
        model=arguments.model,
        args=GRPOConfig(
            max_completion_length=16, num_generations=4, report_to=[], disable_tqdm=True, use_cpu=True, bf16=False
        ),
        train_dataset=Dataset.from_list(rows[2 * count :]),
        validation=rows[:count],
        test=rows[count : 2 * count],
        reward_funcs=reward,
    )
    given = {"ranks": (1, 4, 16), "learning_rates": (1e-5, 3e-5, 1e-4), "max_steps": arguments.steps}
    selected = select_rank_with(train, arguments.out, profile="rl", **given)
    print(selected.decision.sentence)
