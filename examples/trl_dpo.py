"""TRL's `DPOTrainer`: the preference loss of each held-out pair decides.

python examples/trl_dpo.py --model path/to/model --data pairs.jsonl     (rows of prompt, chosen and rejected)
"""

from __future__ import annotations

import torch
from common import options, rows_of
from datasets import Dataset
from trl import DPOConfig

from rightrank import select_rank_with
from rightrank.interop.trl import DPOTrain

if __name__ == "__main__":
    arguments = options()
    rows, count = rows_of(arguments.data), arguments.held_out
    train = DPOTrain(
        model=arguments.model,
        args=DPOConfig(
            report_to=[],
            disable_tqdm=True,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),  # on a GPU where there is one
        ),
        train_dataset=Dataset.from_list(rows[2 * count :]),
        validation=rows[:count],
        test=rows[count : 2 * count],
    )
    selected = select_rank_with(
        train, arguments.out, ranks=(1, 4, 16), learning_rates=(1e-4, 1e-3), max_steps=arguments.steps
    )
    print(selected.decision.sentence)
