"""Preference pairs (DPO): the rank that is enough for pairs made in memory, by the loss and by the reward accuracy.

python examples/preference_pairs.py --model path/to/model --data pairs.jsonl     (rows of prompt, chosen and rejected)
"""

from __future__ import annotations

from common import options, rows_of

from rightrank import SelectSettings, select_rank

arguments = options()
selected = select_rank(
    arguments.model,
    rows_of(arguments.data),
    out=arguments.out,
    ranks=(1, 4, 16),
    metrics=["reward_accuracy"],
    max_steps=arguments.steps,
    eval_items=arguments.held_out,
    settings=SelectSettings(beta=0.1),
)
assert selected.decision is not None
print(selected.decision)
for other in selected.decision.other_metrics:
    print(f"by {other.metric}: {other.sentence}")
