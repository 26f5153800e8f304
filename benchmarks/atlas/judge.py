"""Judges the expectation on sources that it has not seen: `python -m benchmarks.atlas.judge`; writes `judged.json` and `calibration.svg`.

A sweep of a source is asked for as a question, with every source of its group left out of the atlas. Each rank that the sweep tried is
one probability against one answer, enough or not. Scores are means over a sweep's ranks, then over a group's sweeps, then over groups.
The power of the likeness is chosen on two thirds of the groups that were read until `FIXED`; the last third fitted nothing. Groups that were read
later came after every choice and are judged once.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from rightrank.plugins.atlas.estimate import TOKENS_A_ROW, Question, likeness, probabilities, question_of
from rightrank.plugins.atlas.rows import Atlas, Sweep, load
from rightrank.report.figure import Axis, Figure, Series
from rightrank.report.svg import svg_file

HERE = Path(__file__).parent
POWERS = (0.0, 0.5, 1.0, 2.0)
BITS_A_TOKEN, BITS_A_PARAMETER = 2.0, 2.0
FIXED = "2026-11-27"  # the day on which the estimate was fixed
LEAST = 0.01  # a probability is never closer to 0 or 1 when it is scored
Answers = list[tuple[float, bool]]
Rule = Callable[[Sweep], float]


def rank_parameters(parameters: float) -> float:
    """Trained parameters for each rank on all linear layers, within a third for dense models from 135M to 8B."""
    return 2.6e6 * (parameters / 8e9) ** 0.55


def always_16(_sweep: Sweep) -> float:
    return 16


def folk_rule(sweep: Sweep) -> float:
    """16·log2(rows / 10,000), between 4 and 256; 16 where the rows are not known."""
    rows = sweep.rows or (None if sweep.tokens is None else sweep.tokens / TOKENS_A_ROW)
    return 16 if rows is None else min(256.0, max(4.0, 16 * math.log2(max(rows, 1) / 10_000)))


def capacity(sweep: Sweep) -> float:
    """The rank that holds the bits of the data; 16 where data or base are not known."""
    tokens = sweep.tokens or (None if sweep.rows is None else sweep.rows * TOKENS_A_ROW)
    if tokens is None or sweep.parameters is None:
        return 16
    return max(1.0, tokens * BITS_A_TOKEN / (BITS_A_PARAMETER * rank_parameters(sweep.parameters)))


RULES: Mapping[str, Rule] = {"always 16": always_16, "folk rule": folk_rule, "capacity arithmetic": capacity}


def held_out(group: str) -> bool:
    """Whether the group fits nothing: a third, by its name."""
    return zlib.crc32(group.encode()) % 3 == 0


def predicted(atlas: Atlas, power: float, margin: float | None) -> dict[str, Answers]:
    """By sweep, the probability of each rank that says something, and what it says; its group is not in the atlas."""
    answers: dict[str, Answers] = {}
    for sweep in _judged(atlas):
        others = [other for other in atlas.sweeps if atlas.group(other) != atlas.group(sweep)]
        found = probabilities(margin, others, atlas.group, sweep.ranks)
        if power:
            prior = {rank: share for rank, (share, _) in found.items()}
            near = partial(weight, question_of(sweep, margin), power)
            found = probabilities(margin, others, atlas.group, sweep.ranks, near, prior)
        answers[sweep.id] = [(found[rank][0], told) for rank, told in _told(sweep, margin)]
    return answers


def weight(question: Question, power: float, sweep: Sweep) -> float:
    """Of a sweep, by its likeness to the question."""
    return likeness(question, sweep) ** power


def ruled(atlas: Atlas, rule: Rule, margin: float | None, fit: Sequence[str]) -> dict[str, Answers]:
    """A rule's rank as probabilities: how often ranks from it on, and below it, were enough in the groups that fit."""
    above = {s.id: [(rank >= rule(s), told) for rank, told in _told(s, margin)] for s in _judged(atlas)}
    by_side = {
        side: _mean_over_groups(
            atlas, {name: [float(t) for a, t in pairs if a is side] for name, pairs in above.items()}, fit
        )
        for side in (True, False)
    }
    return {name: [(by_side[side], told) for side, told in pairs] for name, pairs in above.items()}


def scores(atlas: Atlas, answers: Mapping[str, Answers], groups: Sequence[str]) -> dict[str, float]:
    """The mean log score (nats, higher is better) and the Brier score of the groups."""
    kept = {name: [(min(1 - LEAST, max(LEAST, p)), told) for p, told in pairs] for name, pairs in answers.items()}
    logs = {name: [math.log(p if told else 1 - p) for p, told in pairs] for name, pairs in kept.items()}
    brier = {name: [(p - told) ** 2 for p, told in pairs] for name, pairs in kept.items()}
    return {
        "log_score": round(_mean_over_groups(atlas, logs, groups), 4),
        "brier": round(_mean_over_groups(atlas, brier, groups), 4),
    }


def difference(
    atlas: Atlas, one: Mapping[str, Answers], other: Mapping[str, Answers], groups: Sequence[str]
) -> list[float]:
    """Log score of one minus the other: mean, and the 90% interval over groups drawn with return."""
    by_group = [scores(atlas, one, [g])["log_score"] - scores(atlas, other, [g])["log_score"] for g in groups]
    draws = np.random.default_rng(0).choice(by_group, (4000, len(by_group))).mean(axis=1)
    return [round(float(value), 4) for value in (np.mean(by_group), *np.quantile(draws, [0.05, 0.95]))]


def calibration(answers: Mapping[str, Answers], atlas: Atlas, groups: Sequence[str]) -> list[dict[str, float]]:
    """By fifth of probability, what was said and how often it was so; every group weighs the same."""
    bins: dict[int, list[tuple[float, float, float]]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    for sweep in _judged(atlas):
        counts[atlas.group(sweep)] += len(answers[sweep.id])
    for sweep in _judged(atlas):
        if atlas.group(sweep) in groups:
            for p, told in answers[sweep.id]:
                bins[min(4, int(5 * p))].append((p, told, 1 / counts[atlas.group(sweep)]))
    return [
        {
            "said": round(float(np.average([p for p, _, _ in found], weights=[w for *_, w in found])), 3),
            "was": round(float(np.average([t for _, t, _ in found], weights=[w for *_, w in found])), 3),
            "groups": round(sum(w for *_, w in found), 2),
        }
        for _, found in sorted(bins.items())
    ]


def _judged(atlas: Atlas) -> list[Sweep]:
    return [sweep for sweep in atlas.sweeps if not sweep.diverges]


def _told(sweep: Sweep, margin: float | None) -> list[tuple[int, bool]]:
    return [(rank, told) for rank in sweep.ranks if (told := sweep.tells(rank, margin)) is not None]


def _mean_over_groups(atlas: Atlas, values: Mapping[str, Sequence[float]], groups: Sequence[str]) -> float:
    by_group: dict[str, list[float]] = defaultdict(list)
    for sweep in _judged(atlas):
        if atlas.group(sweep) in groups and values[sweep.id]:
            by_group[atlas.group(sweep)].append(fmean(values[sweep.id]))
    return fmean(map(fmean, by_group.values()))


def judge(margin: float | None = None) -> dict[str, Any]:
    atlas = load()
    groups = sorted({atlas.group(sweep) for sweep in _judged(atlas) if _told(sweep, margin)})
    fresh = sorted({atlas.group(s) for s in _judged(atlas) if atlas.sources[s.source]["read"] > FIXED} & set(groups))
    fit, test = ([g for g in groups if g not in fresh and held_out(g) is side] for side in (False, True))
    models = {f"likeness^{power:g}": predicted(atlas, power, margin) for power in POWERS}
    chosen = max(POWERS[1:], key=lambda power: scores(atlas, models[f"likeness^{power:g}"], fit)["log_score"])
    named = {
        "base rate": models["likeness^0"],
        "likeness": models[f"likeness^{chosen:g}"],
        **{name: ruled(atlas, rule, margin, fit) for name, rule in RULES.items()},
    }
    return {
        "sweeps": len(_judged(atlas)),
        "groups": {"fit": len(fit), "held_out": len(test), "fresh": len(fresh)},
        "powers_on_fit": {name: scores(atlas, answers, fit) for name, answers in models.items()},
        "printed": "likeness^0",
        "chosen": f"likeness^{chosen:g}",
        "fit": {name: scores(atlas, answers, fit) for name, answers in named.items()},
        "held_out": {name: scores(atlas, answers, test) for name, answers in named.items()},
        "fresh": {name: scores(atlas, answers, fresh) for name, answers in named.items()},
        "all": {name: scores(atlas, answers, groups) for name, answers in named.items()},
        "base_rate_minus": {
            name: {
                "held_out": difference(atlas, named["base rate"], answers, test),
                "all": difference(atlas, named["base rate"], answers, groups),
            }
            for name, answers in named.items()
            if name != "base rate"
        },
        "calibration": calibration(named["base rate"], atlas, groups),
    }


def calibration_figure(bins: Sequence[Mapping[str, float]]) -> Figure:
    """What was said against how often it was so."""
    said, was = [b["said"] for b in bins], [b["was"] for b in bins]
    return Figure(
        name="calibration",
        title="`rightrank expect` on sources that it has not seen: what it said against what was so",
        alt="Calibration of the expectation: "
        + ", ".join(f"said {s:.0%}, was {w:.0%}" for s, w in zip(said, was, strict=True)),
        x=Axis("probability that a rank is enough", limits=(0, 1)),
        y=Axis("share of ranks that were enough", limits=(0, 1)),
        series=(
            Series("said = was", (0.0, 1.0), (0.0, 1.0), kind="line", dashed=True, tone="second"),
            Series("sweeps of groups left out", tuple(said), tuple(was)),
        ),
        columns=("said", "was", "groups"),
        rows=tuple((b["said"], b["was"], b["groups"]) for b in bins),
    )


def main() -> None:
    found = {"default margins": judge(), "margin .01": judge(0.01)}
    (HERE / "judged.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (HERE / "calibration.svg").write_text(
        svg_file(calibration_figure(found["default margins"]["calibration"])), encoding="utf-8"
    )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
