"""A fleet as plain lines: the rank, what each adapter loses at every rank, and the slots of the servers."""

from __future__ import annotations

from pathlib import Path

from rightrank.records.adapter import AdapterCandidate
from rightrank.records.fleet import Fleet, FleetSlots
from rightrank.report.format import size, table_lines, visible


def fleet_text(found: Fleet) -> str:
    """Everything, for a person."""
    ranks = sorted({one.rank for adapter in found.adapters for one in adapter.candidates}, reverse=True)
    rows = [["adapter", "rank", "needs", *(f"at {rank}" for rank in ranks)]]
    for adapter in found.adapters:
        best = {one.rank: one for one in reversed(adapter.candidates)}
        cells = ["" if rank not in best else _loss(best[rank]) for rank in ranks]
        rows.append([visible(Path(adapter.out).name), str(adapter.rank_before), str(adapter.rank), *cells])
    lines = [
        found.sentence,
        "",
        *table_lines(rows),
        "(held-out, worse than the adapter itself by; * not shown to be within the margin)",
        "",
    ]
    lines += [_slots(slots) for slots in found.slots]
    if found.merge is not None:
        lines.append(
            f"exact sum: rank {found.merge.rank}, truncated to rank {found.merge.chosen_rank}: {found.merge.out}"
        )
    padded = "" if found.padded_to is None else f", each padded to rank {found.padded_to}"
    return "\n".join([*lines, f"adapters: {found.out}{padded}"])


def _loss(one: AdapterCandidate) -> str:
    return f"{one.difference:+.4f}{'' if one.holds else '*'}"


def _slots(slots: FleetSlots) -> str:
    return (
        f"{slots.server}: --max-lora-rank {slots.rank} (before {slots.rank_before}), {size(slots.bytes)} a slot in 16 bits, "
        f"{size(slots.saved_bytes)} saved"
    )
