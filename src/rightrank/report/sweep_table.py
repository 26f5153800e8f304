"""What a sweep found, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rightrank.records import SweepRow


def sweep_text(rows: Sequence[SweepRow]) -> str:
    """One line a setting and rank."""
    lines = [f"{'setting':<24} {'rank':>5} {'rate':>9} {'held-out':>10} {'gain':>9}"]
    lines += [
        f"{row.setting:<24} {row.rank:>5} {row.learning_rate:>9g} {row.value:>10.4f} {row.gain:>+9.4f}" for row in rows
    ]
    return "\n".join(lines)
