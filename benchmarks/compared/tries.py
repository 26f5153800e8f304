"""Measure how often the best of 14 candidates is accepted although it is worse, with and without the guard of `compare --tries`.

    python -m benchmarks.compared.tries     # writes tries.json and tries.svg

Every candidate is compared with one reference on the same examples. Its true mean difference is known, which stands for fresh data without end. The
candidate with the lowest validation loss is accepted

    plain           if its loss is below that of the reference
    compare         if `compare` shows that it is better: the 95% upper bound of the difference is at most 0
    compare, tries  the same with --tries 14
    final split     if `compare` shows it on a half of the examples, where the other half chose the candidate
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compared.calibration import Floats
from benchmarks.machine import describe_machine
from benchmarks.results import store_result
from rightrank.decision.comparison import compute_file_bounds, correct_confidence

HERE = Path(__file__).parent
TRIES, ROUNDS, SEED = 14, 2000, 0
POLICIES = ("plain", "compare", "compare, tries", "final split")
# The deviation of a paired difference between examples: .03 nats for a truncation at rank 16, .12 for a training of another rank or rate.
SETTINGS: dict[str, tuple[float, int, bool]] = {  # deviation in nats, examples, heavy tails
    "0.03 nats, 256": (0.03, 256, False),
    "0.12, 256": (0.12, 256, False),
    "0.12, heavy tails, 256": (0.12, 256, True),
    "0.12, 1,024": (0.12, 1024, False),
    "0.3, 256": (0.3, 256, False),
}
WORLDS: dict[
    str, Callable[[np.random.Generator], Floats]
] = {  # the true differences of the candidates, above 0 is worse
    "no change helps": lambda generator: np.full(TRIES, 0.002),
    "some help": lambda generator: generator.normal(0.005, 0.01, TRIES),
}


def draw_differences(generator: np.random.Generator, effects: Floats, setting: tuple[float, int, bool]) -> Floats:
    """Draw [candidates, examples] loss differences, which share the noise of the reference."""
    deviation, examples, has_heavy_tails = setting
    size = (len(effects) + 1, examples)
    noise = generator.standard_t(3, size) / np.sqrt(3) if has_heavy_tails else generator.standard_normal(size)
    return effects[:, None] + deviation * np.sqrt(0.5) * (noise[1:] - noise[0])


def accept_candidates(differences: Floats, weights: Floats) -> dict[str, int | None]:
    """Return the candidate that each policy accepts, or None."""
    half = differences.shape[1] // 2

    def find_best(columns: slice) -> int:
        return int(np.argmin(differences[:, columns] @ weights[columns]))

    def is_better(candidate: int, columns: slice, tries: int = 1) -> bool:
        sums, confidence = differences[candidate, columns] * weights[columns], correct_confidence(tries)
        return compute_file_bounds(sums, weights[columns], confidence=confidence).high <= 0

    best, first_best, everything = find_best(slice(None)), find_best(slice(half)), slice(None)
    accepted = {
        "plain": (best, float(differences[best] @ weights) < 0),
        "compare": (best, is_better(best, everything)),
        "compare, tries": (best, is_better(best, everything, TRIES)),
        "final split": (first_best, is_better(first_best, slice(half, None))),
    }
    return {policy: candidate if is_accepted else None for policy, (candidate, is_accepted) in accepted.items()}


def simulate_policies(world: str, setting: str, rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Return for each policy the share of rounds that accept a worse candidate, and the share that accept a better one."""
    generator = np.random.default_rng([SEED, list(WORLDS).index(world), list(SETTINGS).index(setting)])
    counts = {policy: {"worse": 0, "better": 0} for policy in POLICIES}
    for _ in range(rounds):
        effects = WORLDS[world](generator)
        differences = draw_differences(generator, effects, SETTINGS[setting])
        weights = generator.integers(5, 40, differences.shape[1]).astype(np.float64)  # tokens
        for policy, candidate in accept_candidates(differences, weights).items():
            if candidate is not None:
                counts[policy]["worse" if effects[candidate] > 0 else "better"] += 1
    return {policy: {name: n / rounds for name, n in shares.items()} for policy, shares in counts.items()}


def draw_figure(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw the accepted candidates by policy, setting and world."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    panels = (("no change helps", "worse"), ("some help", "worse"), ("some help", "better"))
    for plot, (world, outcome) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        in_world = [row for row in rows if row["world"] == world]
        for index, policy in enumerate(POLICIES):
            shares = [100 * row["policies"][policy][outcome] for row in in_world]
            plot.bar(np.arange(len(shares)) + 0.2 * (index - 1.5), shares, 0.2, label=policy)
        plot.set_title(f"{world}: accepted, {outcome} on fresh data", fontsize=9)
        plot.set_xticks(range(len(in_world)), [row["setting"].replace(", ", "\n") for row in in_world], fontsize=7)
        plot.axhline(5, color="black", linewidth=0.6, linestyle=":")
    figure.axes[0].set_ylabel("% of searches")
    figure.axes[2].legend(fontsize=8)
    with rc_context({"svg.hashsalt": "tries", "svg.fonttype": "none"}):
        figure.savefig(out, metadata={"Date": None})


def format_rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the page's table: accepted and worse, and in brackets accepted and better, in percent."""

    def format_shares(shares: dict[str, float]) -> str:
        return f"{100 * shares['worse']:.1f} ({100 * shares['better']:.1f})"

    return [
        f"| {row['world']} | {row['setting']} | {' | '.join(format_shares(row['policies'][name]) for name in POLICIES)} |"
        for row in rows
    ]


def main() -> None:
    rows = []
    for world in WORLDS:
        for setting in SETTINGS:
            rows.append({"world": world, "setting": setting, "policies": simulate_policies(world, setting)})
            print(format_rows(rows[-1:])[0])
    machine = describe_machine()
    store_result(
        {"machine": machine, "tries": TRIES, "rounds": ROUNDS, "seed": SEED, "rows": rows}, HERE / "tries.json"
    )
    draw_figure(rows, HERE / "tries.svg")


if __name__ == "__main__":
    main()
