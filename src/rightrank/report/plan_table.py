"""A plan for a person: the table of ranks, where the memory goes, what fits and what to change."""

from __future__ import annotations

from rightrank.records.plan import Plan, RankPlan

COMPONENT_NAMES = {
    "weights": "weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits_and_loss": "logits, loss",
    "temporary": "temporary",
    "workspace": "workspace",
    "rounding": "rounding",
}


def size(count: float) -> str:
    """`1.5 GiB`."""
    sign, count = ("-" if count < 0 else ""), abs(count)
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{sign}{count:.0f} {unit}" if unit == "B" else f"{sign}{count:.1f} {unit}"
        count /= 1024
    return f"{sign}{count:.2f} GiB"


def plan_text(plan: Plan) -> str:
    """The whole answer in plain lines."""
    parts = [
        f"{plan.architecture}: {plan.base_parameters:,} parameters, {size(plan.base_bytes)} of weights; "
        f"{plan.targets} adapted matrices",
        "",
        *_table(plan),
        "",
        *_where(plan.ranks[-1], plan),
        "",
        *_answer(plan),
    ]
    parts += [f"note: {note}" for note in plan.notes]
    return "\n".join(parts)


def _table(plan: Plan) -> list[str]:
    timed = any(row.seconds_per_step is not None for row in plan.ranks)
    heads = ["rank", "parameters", "adapter", "peak", "reserved", "with headroom", "TFLOP/step"]
    heads += ["s/step"] * timed + ["fits"] * (plan.memory_bytes is not None)
    rows = [heads] + [_row(row, plan, timed) for row in plan.ranks]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _row(row: RankPlan, plan: Plan, timed: bool) -> list[str]:
    cells = [
        str(row.rank),
        f"{row.trainable_parameters:,}",
        size(row.adapter_bytes),
        size(row.peak_bytes),
        size(row.peak_reserved_bytes),
        size(row.needed_bytes),
        f"{row.flops_per_step / 1e12:.3g}",
    ]
    if timed:
        cells.append("–" if row.seconds_per_step is None else f"{row.seconds_per_step:.3g}")
    if plan.memory_bytes is not None:
        cells.append("yes" if row.fits else "no")
    return cells


def _where(row: RankPlan, plan: Plan) -> list[str]:
    parts = [
        f"{COMPONENT_NAMES.get(name, name.replace('_', ' '))} {size(count)}"
        for name, count in row.components.items()
        if count
    ]
    lines = [f"rank {row.rank}, at its peak ({row.peak_at}):", "  " + ", ".join(parts)]
    kept = list(plan.activations.items())[:6]
    if kept:
        lines.append("  activations: " + ", ".join(f"{name} {size(count)}" for name, count in kept))
    return lines


def _answer(plan: Plan) -> list[str]:
    lines = [
        f"peak: {plan.sources['peak_bytes']}, to be trusted to {plan.ranks[0].error_share:.0%} (assumed); "
        f"beside it {size(plan.context_bytes)} for the process (assumed) and {plan.headroom_share:.0%} of headroom"
    ]
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
    for limit in plan.limits:
        lines.append(f"limit by {limit.name}: {'none' if limit.rank is None else limit.rank} ({limit.reason})")
    if plan.suggested_ranks:
        lines.append(f"ranks to begin with: {', '.join(map(str, plan.suggested_ranks))}")
    if plan.selection is not None:
        lines.append(_selection_line(plan))
    return lines


def _fits_line(plan: Plan) -> str:
    budget = size(plan.memory_bytes or 0)
    if plan.max_rank is None:
        return f"no rank asked for fits in {budget}; to make rank {plan.ranks[0].rank} fit, change:"
    possible = ""
    if plan.largest_possible_rank is not None and plan.largest_possible_rank != plan.max_rank:
        possible = f" (of all ranks: {plan.largest_possible_rank})"
    return f"largest rank asked for that fits in {budget}: {plan.max_rank}{possible}"


def _selection_line(plan: Plan) -> str:
    cost = plan.selection
    assert cost is not None
    line = f"selection: {cost.trainings} trainings of {cost.steps} steps, {cost.flops / 1e15:.3g} PFLOP"
    if cost.seconds is not None:
        line += f", about {cost.seconds / 3600:.2g} h"
    if cost.price is not None:
        line += f", {cost.price:.2f} at the price given"
    return line
