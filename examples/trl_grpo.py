"""TRL's `GRPOTrainer` with the profile `rl`: the reward of one greedy answer to each held-out prompt decides.

python examples/trl_grpo.py --model path/to/model --data data.jsonl     (rows of prompt and completion)
"""

from __future__ import annotations

from typing import Any

from common import options, rows_of
from datasets import Dataset
from trl import GRPOConfig

from rightrank import select_rank_with
from rightrank.interop.trl import GRPOTrain
from rightrank.train.metrics import token_f1


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
