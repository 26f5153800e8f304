"""Select a rank with TRL's `GRPOTrainer`, by the reward of one greedy answer to each held-out prompt.

python examples/trl_grpo.py --model path/to/model --data data.jsonl     (rows of prompt and completion)

`GRPOTrain` trains a task with its rank, learning rate and seed. It reports the held-out scores during the training, restores the checkpoint
with the best validation scores, and evaluates it on the test rows. Copy it and pass your reward functions.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from common import parse_options, read_rows
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rightrank import EvalPoint, TrialResult, TrialTask, select_rank_with
from rightrank.decision.table import find_best_point
from rightrank.evaluation.answers import score_token_f1
from rightrank.schema.errors import ReportError

RewardFunction: TypeAlias = Callable[..., Sequence[float | None]]
Rows: TypeAlias = Any  # a `datasets.Dataset`, or a list of rows


@dataclass(frozen=True, kw_only=True)
class GRPOTrain:
    """A training with `GRPOTrainer` that is evaluated by the reward of one greedy completion of each held-out prompt.

    Rows have `prompt`, a string or a list of messages, and the columns that the reward functions read.
    """

    model: str
    """Folder or hub name of the base model."""
    args: Any
    """The trainer's configuration. Learning rate, seed, steps and output folder come from the task."""
    train_dataset: Rows
    validation: Rows
    """Rows of the evaluations during training. The best checkpoint has the best mean over them."""
    test: Rows
    """Rows for the evaluation of the best checkpoint, by which ranks are compared."""
    reward_funcs: RewardFunction | Sequence[RewardFunction]
    num_evaluations: int = 10
    """Number of evaluations during the training, in addition to the one before the first step."""
    eval_batch_size: int = 64
    lora: Mapping[str, Any] = field(default_factory=dict)
    """Extra settings of `LoraConfig`, such as `target_modules`; all linear layers by default."""

    def __call__(self, task: TrialTask) -> TrialResult:
        """Train the task. Rank 0 is the base model, which is evaluated but not trained."""
        gc.collect()  # frees the previous trainer and its model, which reference each other
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        if task.rank == 0:
            base = AutoModelForCausalLM.from_pretrained(self.model, **(self.args.model_init_kwargs or {}))
            return self._measure(base, tokenizer)

        lora: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **self.lora}
        evaluations = _EvaluationCallback(
            task, partial(self.compute_rewards, tokenizer=tokenizer, rows=self.validation), self.num_evaluations
        )
        trainer = GRPOTrainer(
            self.model,
            reward_funcs=self._list_reward_functions(),
            args=self._build_args(task),
            train_dataset=self.train_dataset,
            peft_config=LoraConfig(r=task.rank, lora_alpha=task.lora_alpha, **lora),  # type: ignore[arg-type]
            callbacks=[evaluations],
        )
        trainer.train()
        if evaluations.best:
            set_peft_model_state_dict(trainer.model, evaluations.best)
        trainer.model.save_pretrained(task.folder)
        return self._measure(trainer.model, tokenizer, evaluations)

    @torch.no_grad()
    def compute_rewards(self, model: Any, tokenizer: Any, rows: Rows) -> list[float]:
        """Return the weighted sum of the rewards of each row's greedy completion, in the order of the rows.

        As in TRL, a reward of None does not apply to a completion.

        Raises:
            ReportError: a function returned too few or too many rewards.
        """
        functions = self._list_reward_functions()
        weights = self.args.reward_weights or [1.0] * len(functions)
        was_training, rewards = model.training, []
        model.eval()
        for start in range(0, len(rows), self.eval_batch_size):
            batch = [rows[index] for index in range(start, min(start + self.eval_batch_size, len(rows)))]
            prompts = [row["prompt"] for row in batch]
            completions, ids = _generate_greedily(model, tokenizer, prompts, self.args.max_completion_length)
            columns = {name: [row[name] for row in batch] for name in batch[0] if name != "prompt"}
            rewards_by_function = [
                list(function(prompts=prompts, completions=completions, completion_ids=ids, **columns))
                for function in functions
            ]
            wrong_length = next((len(values) for values in rewards_by_function if len(values) != len(batch)), None)
            if wrong_length is not None:
                raise ReportError(f"got {wrong_length} rewards for {len(batch)} completions from a reward function")
            rewards += [
                sum(w * float(r) for w, r in zip(weights, row, strict=True) if r is not None)
                for row in zip(*rewards_by_function, strict=True)
            ]
        model.train(was_training)
        return rewards

    def _list_reward_functions(self) -> list[RewardFunction]:
        functions = self.reward_funcs
        return [functions] if callable(functions) else list(functions)

    def _measure(self, model: Any, tokenizer: Any, evaluations: _EvaluationCallback | None = None) -> TrialResult:
        scores = self.compute_rewards(model, tokenizer, self.test)
        return TrialResult(
            metrics={"reward": sum(scores) / len(scores)},
            example_scores=scores,
            points=[] if evaluations is None else evaluations.points,
            trainable_parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            if evaluations
            else 0,
        )

    def _build_args(self, task: TrialTask) -> Any:
        """Copy the configuration, apply the task's settings, and turn off the trainer's checkpoints and evaluations."""
        args = copy.deepcopy(self.args)
        args.output_dir = str(task.folder / "trainer")
        args.learning_rate, args.seed, args.data_seed = task.learning_rate, task.seed, task.seed
        args.max_steps = task.steps or args.max_steps
        args.save_strategy = args.eval_strategy = "no"
        return args


def _generate_greedily(
    model: Any, tokenizer: Any, prompts: list[Any], max_new_tokens: int
) -> tuple[list[Any], list[list[int]]]:
    """Return the completions, as strings or messages like the prompts, and their tokens."""
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


@dataclass(eq=False)
class _EvaluationCallback(TrainerCallback):
    """Evaluate the validation examples before the first step and at evenly spaced steps, and report the results to the task.

    The callback keeps the adapter of the best evaluation.
    """

    task: TrialTask
    score: Callable[[Any], list[float]]  # returns the reward of each validation row for a model
    num_evaluations: int
    points: list[EvalPoint] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)  # the adapter of the best evaluation

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._evaluate(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step, steps = state.global_step, state.max_steps
        due = {max(1, round(steps * number / self.num_evaluations)) for number in range(1, self.num_evaluations + 1)}
        if step in due:
            self._evaluate(model, step)

    def _evaluate(self, model: Any, step: int) -> None:
        scores = self.score(model)
        value = sum(scores) / len(scores)
        self.task.report(step, value, scores)
        self.points.append(EvalPoint(step=step, value=value, example_scores=scores))
        if find_best_point(self.points, higher_is_better=True).step == step:
            state = get_peft_model_state_dict(model)
            self.best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def reward_completions(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [score_token_f1(right, text) for right, text in zip(answer, completions, strict=True)]


if __name__ == "__main__":
    arguments = parse_options()
    rows = [{"prompt": row["prompt"], "answer": row["completion"]} for row in read_rows(arguments.data)]
    count = arguments.held_out
    train = GRPOTrain(
        model=arguments.model,
        args=GRPOConfig(
            max_completion_length=16, num_generations=4, report_to=[], disable_tqdm=True, use_cpu=True, bf16=False
        ),
        train_dataset=Dataset.from_list(rows[2 * count :]),
        validation=rows[:count],
        test=rows[count : 2 * count],
        reward_funcs=reward_completions,
    )
    search_settings = {"ranks": (1, 4, 16), "learning_rates": (1e-5, 3e-5, 1e-4), "seeds": (0, 1, 2)}
    selected = select_rank_with(
        train,
        arguments.out,
        metric="reward",
        strategy="upward",
        margin=0.02,
        max_steps=arguments.steps,
        **search_settings,
    )
    print(selected.decision.sentence)
