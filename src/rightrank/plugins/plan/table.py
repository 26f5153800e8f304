"""A plan as text: the table of ranks, the parts of the memory, what fits and what to change."""

from __future__ import annotations

from rightrank.report.format import size, table_lines
from rightrank.schema.results import Extent, Plan, RankPlan, SelectionCost
from rightrank.schema.scaling import LARGE_RANK, rank_change_line, rate_warning


def plan_text(plan: Plan) -> str:
    """The whole plan in plain lines."""
    parts = [
        f"{plan.architecture}: {plan.base_parameters:,} parameters, {size(plan.base_bytes)} of weights; "
        f"{plan.targets} adapted matrices",
        "",
        *_table(plan),
        "",
        *_memory_parts(plan.ranks[-1], plan),
        "",
        *_answer(plan),
    ]
    parts += [f"note: {note}" for note in plan.notes]
    return "\n".join(parts)


def _table(plan: Plan) -> list[str]:
    heads = ["rank", "parameters", "adapter", "peak", "reserved", "with headroom", "TFLOP/step"]
    both = plan.ranks[0].select_needed_bytes is not None
    heads += ["fits"] * (plan.memory_bytes is not None)
    heads += ["in select"] * both + ["fits"] * (both and plan.memory_bytes is not None)
    return table_lines([heads, *(_row(row, plan) for row in plan.ranks)])


def _row(row: RankPlan, plan: Plan) -> list[str]:
    cells = [
        str(row.rank),
        f"{row.trainable_parameters:,}",
        size(row.adapter_bytes),
        size(row.peak_bytes),
        size(row.peak_reserved_bytes),
        size(row.needed_bytes),
        f"{row.flops_per_step / 1e12:.3g}",
    ]
    if plan.memory_bytes is not None:
        cells.append("yes" if row.fits else "no")
    if row.select_needed_bytes is not None:
        cells.append(size(row.select_needed_bytes))
        cells += ["yes" if row.fits_in_select else "no"] * (plan.memory_bytes is not None)
    return cells


def _memory_parts(row: RankPlan, plan: Plan) -> list[str]:
    parts = [
        f"{'logits, loss' if name == 'logits_and_loss' else name.replace('_', ' ')} {size(count)}"
        for name, count in row.components.items()
        if count
    ]
    lines = [f"rank {row.rank}, at its peak ({row.peak_at}):", "  " + ", ".join(parts)]
    kept = list(plan.activations.items())[:6]
    if kept:
        lines.append("  activations: " + ", ".join(f"{name} {size(count)}" for name, count in kept))
    return lines


def _answer(plan: Plan) -> list[str]:
    last, source = plan.ranks[-1], plan.sources["peak_bytes"]
    lines = [
        f"peak: {source}; at rank {last.rank} from {size(last.peak_low_bytes)} to {size(last.peak_high_bytes)} "
        f"(±{last.error_share:.0%}: {plan.errors[source].basis})",
        f"in addition {size(plan.context_bytes)} for the process ({plan.sources['context_bytes']}) and "
        f"{plan.headroom_share:.0%} headroom (assumed)",
    ]
    if last.select_needed_bytes is not None:
        lines.append(
            "the step is that of transformers' Trainer; `in select` is a step of `rightrank select`, with headroom: the loss in "
            "chunks, and no padding"
        )
    if plan.memory_bytes is not None:
        lines.append(_fits_line(plan))
    for change in plan.changes:
        fits = "fits" if change.fits else "does not fit yet"
        lines.append(
            f"  {change.setting} {change.value}: {size(change.peak_reserved_bytes)} reserved, {fits} ({change.price})"
        )
    for price in plan.prices:
        lines.append(
            f"{price.axis}: {size(price.difference_bytes)} more reserved, {price.flops_factor:.2f} × the arithmetic"
        )
    if len(plan.ranks) > 1:
        lines.append(f"learning rate, {rank_change_line(plan.ranks[0].rank, last.rank)}")
    if last.rank >= LARGE_RANK:
        lines.append(rate_warning(last.rank, 2 * last.rank))
    if plan.selection is not None:
        lines += _selection_lines(plan.selection)
    return lines


def _fits_line(plan: Plan) -> str:
    budget = size(plan.memory_bytes or 0)
    if plan.max_rank is None:
        return f"no requested rank fits in {budget}; to make rank {plan.ranks[0].rank} fit, change:"
    possible = ""
    if plan.largest_possible_rank is not None and plan.largest_possible_rank != plan.max_rank:
        possible = f" (largest of all ranks: {plan.largest_possible_rank})"
    return f"largest requested rank that fits in {budget}: {plan.max_rank}{possible}"


def _selection_lines(cost: SelectionCost) -> list[str]:
    """The operations of a selection, expected and at most, and of one training of each rank."""
    name = f"selection by {cost.strategy}"
    whole = f"{name}: {_extent(cost.expected, cost.steps)}"
    if cost.expected != cost.most:
        whole = f"{name}: about {_extent(cost.expected, cost.steps)}; at most {_extent(cost.most, cost.steps)}"
    each = ", ".join(f"rank {row.rank} {_amount(row.flops)}" for row in cost.ranks)
    return [
        whole,
        f"  one complete training with its evaluations: {each}",
        "  `rightrank select MODEL DATA --dry-run` measures its time on this device",
    ]


def _extent(extent: Extent, steps: int) -> str:
    return f"{extent.trainings:.3g} trainings of {steps} steps, {_amount(extent.flops)}"


def _amount(flops: float) -> str:
    """`1.5 PFLOP`."""
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"):
        if flops < 1000:
            return f"{flops:.3g} {unit}"
        flops /= 1000
    return f"{flops:.3g} PFLOP"
