"""Lines for a person before the first trial: what the selection will cost, and what its data and its margin allow."""

from __future__ import annotations

import math

from rightrank.decision.judge import CONFIDENCE
from rightrank.decision.metrics import TOKEN_LOSS_MARGIN
from rightrank.errors import SettingsError
from rightrank.kinds.experts import expert_rank
from rightrank.maths.intervals import normal_quantile
from rightrank.preparation import Prepared
from rightrank.records import RunStarted
from rightrank.settings import SelectSettings
from rightrank.strategies import Strategy
from rightrank.strategies.space import MIN_RECOVERY_PART, recovery_steps

# Nats, of one example's difference between an adapter truncated to a quarter of its rank and the adapter itself: rank 64 to
# 16 on SmolLM2 and two texts (SCIENCE.md, truncated against trained).
TYPICAL_DEVIATION = 0.02


def require_truncated(prepared: Prepared) -> bool:
    """Whether adapters can be truncated, which the first question needs.

    Raises:
        SettingsError: goal `adapter` with adapters that can't be.
    """
    reason = prepared.runtime.arm_targets.why_not_truncated
    if reason is not None and prepared.settings.goal == "adapter":
        raise SettingsError(
            f"goal 'adapter' needs adapters that can be truncated ({reason}); give goal 'training-rank'"
        )
    return reason is None


def kind_lines(prepared: Prepared) -> list[str]:
    """What the kind of the adapters changes: the forward pass, and the ranks of experts."""
    targets, settings = prepared.runtime.arm_targets, prepared.settings
    lines = [] if targets.why_alone is None else [targets.why_alone]
    shares = sorted({module.share for module in targets.shared.modules if module.share > 1})
    for share in shares:
        ranks = ", ".join(f"{rank} → {expert_rank(rank, share)}" for rank in settings.ranks)
        lines.append(
            f"divide_rank_by_experts: an expert's rank is the adapter's over {share} experts, at least 1: {ranks}"
        )
    left_out = ",".join(targets.shared.left_out)
    if left_out:
        lines.append(
            f"all-linear adapts modules alone; PEFT's also adapts the parameters {left_out}: for adapters on them, which "
            f"train alone, --set target_parameters={left_out}"
        )
    return lines


def adapter_lines(prepared: Prepared) -> list[str]:
    """What the first question's answer can rest on; a line each."""
    reason = prepared.runtime.arm_targets.why_not_truncated
    if reason is not None:
        return [f"no adapter is truncated ({reason}): the rank to train at is sought from trainings alone"]
    return [
        f"top rank {max(prepared.settings.ranks)}: trained once, then truncated to lower ranks for the adapter",
        *_recovery_lines(prepared),
        *_margin_lines(prepared),
    ]


def _recovery_lines(prepared: Prepared) -> list[str]:
    """Says so where no training example is left for recovery."""
    steps, unseen = prepared.steps, prepared.unseen_steps
    if recovery_steps(steps, unseen):
        return []
    needed = math.ceil(MIN_RECOVERY_PART * steps)
    return [
        f"no recovery after truncation: it takes training examples that no training sees, for {needed} steps or more, and "
        f"there are {unseen} steps of them; the adapter is sought among plain truncations (a lower --max-steps leaves more)"
    ]


def _margin_lines(prepared: Prepared) -> list[str]:
    """Says so where the margin is below what the validation examples can show."""
    settings = prepared.settings
    if settings.metric_name != "loss" or not prepared.is_token_loss:
        return []
    margin = TOKEN_LOSS_MARGIN if settings.margin is None else settings.margin
    examples = prepared.started.data.splits["selection"].items
    reach = normal_quantile(CONFIDENCE) * TYPICAL_DEVIATION
    if reach / math.sqrt(examples) < margin:
        return []
    return [
        f"margin {margin:g} is likely below what {examples} validation examples can show of an adapter: about "
        f"{math.ceil((reach / margin) ** 2):,} are needed (an estimate: a truncation to a quarter of the top rank typically "
        f"differs by {TYPICAL_DEVIATION:g} nats from example to example); give more data and --eval-items, or a wider --margin"
    ]


def answers_line(settings: SelectSettings, started: RunStarted) -> str:
    """When the metrics besides the loss are measured, and on how many examples."""
    names = [spec.name for spec in settings.metric_specs if not spec.is_measured_along]
    when = "at the end of each training" if settings.answers_at == "end" else f"{settings.eval_points} times a training"
    examples = started.data.splits["selection"].items
    return (
        f"{', '.join(names)}: measured on the base, {when}, and on the test split: "
        f"{examples} examples, at most {settings.max_new_tokens} new tokens each where the model writes; the time is reported after the base"
    )


def cost_line(strategy: Strategy, steps: int) -> str:
    cost = strategy.cost()
    if cost.expected == cost.maximum:
        return f"strategy {strategy.name}: {cost.maximum:.3g} trainings of {steps} steps"
    first = f"; the adapter after about {cost.to_adapter:.3g}" if cost.to_adapter < cost.expected else ""
    return (
        f"strategy {strategy.name}: about {cost.expected:.3g} trainings of {steps} steps, {cost.maximum:.3g} at most "
        f"(one stopped early counts for its part){first}"
    )
