"""Select a rank for preference pairs (DPO) in memory, by the loss and by the reward accuracy.

python examples/preference_pairs.py --model path/to/model --data pairs.jsonl     (rows of prompt, chosen and rejected)
"""

from __future__ import annotations

from common import parse_options, read_rows

from rightrank import SelectSettings, decide, select_rank

arguments = parse_options()
selected = select_rank(
    arguments.model,
    read_rows(arguments.data),
    out=arguments.out,
    goal="training-rank",
    ranks=(1, 4, 16),
    max_steps=arguments.steps,
    max_eval_examples=arguments.held_out,
    settings=SelectSettings(beta=0.1, metrics=["reward_accuracy"]),
)
assert selected.decision is not None
print(selected.decision)
print(f"by reward_accuracy: {decide(selected.run, metric='reward_accuracy').decision.sentence}")
