"""Judging a run: blind pairs of answers for people or for a program, and the decision on what they chose.

Every rank's best adapter answers the same test prompts as the reference's. A pair shows both answers in a random order under the
letters A and B; the ranks are in a file of their own. Equal answers are ties and are shown to nobody.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shlex
import shutil
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rightrank.data.files import UnreadableError, read_json_object, write_text
from rightrank.decision.comparison import CONFIDENCE, Bounds, descending, examples_needed
from rightrank.decision.intervals import RULE_OF_THREE, Estimate, two_sided
from rightrank.decision.run import Records, best_trial, decision_so_far, last_decided, records_of
from rightrank.plugins.judge.judgements import Judgement, read_judgements
from rightrank.plugins.judge.page import judge_page
from rightrank.runs.folder import RunFolder
from rightrank.runs.prepare import Request, prepare
from rightrank.schema.arrays import Floats
from rightrank.schema.decision import Decision, NextRun, RankEvidence, StaircaseStep, Verdict
from rightrank.schema.errors import DataError, ResultsError, RunError, RunFolderError, SettingsError
from rightrank.schema.events import JournalRecord
from rightrank.schema.settings import make_settings
from rightrank.train.adapter_runtime import adapter_attached
from rightrank.train.generation import promptable_examples, write_completion
from rightrank.train.scorers import command_on, run_program


def clustered_mean(scores: Sequence[float], prompts: Sequence[Hashable], judges: Sequence[Hashable]) -> Estimate:
    """The mean over judgements, its prompts as `examples` and its judges as `seeds`.

    With one judge the interval is over prompts alone. Where all scores are equal, nothing varies and the rule of three is used: the
    one-sided 95% bound lies 3/prompts away.

    Args:
        scores: [judgements] 1 for a win, 1/2 for a tie, 0 for a loss.
        prompts: [judgements] the prompt of each.
        judges: [judgements] the judge of each.
    """
    values = np.asarray(scores, dtype=np.float64)
    count = len(values)
    residuals = values - values.mean()
    by_prompt, by_judge = _sums(residuals, prompts), _sums(residuals, judges)
    by_both = _sums(residuals, list(zip(prompts, judges, strict=True)))
    of_prompts = _variance(by_prompt, count)
    if of_prompts == 0.0:
        of_prompts = (RULE_OF_THREE / len(by_prompt)) ** 2
    of_judges = _variance(by_judge, count) if len(by_judge) > 1 else 0.0
    both = min(_variance(by_both, count), of_prompts, of_judges)
    spread = float(np.mean(by_prompt**2))
    skewness = float(np.mean(by_prompt**3)) / spread**1.5 if spread > 0 else 0.0
    judges_degrees = max(1.0, len(by_judge) - 1.0)
    return Estimate(
        float(values.mean()), of_prompts, of_judges, both, len(by_prompt), len(by_judge), judges_degrees, skewness
    )


def _sums(residuals: Floats, names: Sequence[Hashable]) -> Floats:
    places: dict[Hashable, int] = {}
    index = np.array([places.setdefault(name, len(places)) for name in names])
    sums: Floats = np.bincount(index, weights=residuals, minlength=len(places)).astype(np.float64)
    return sums


def _variance(sums: Floats, count: int) -> float:
    """Of the mean, from the sums of its clusters."""
    clusters = len(sums)
    return float((sums**2).sum()) / count**2 * clusters / max(1, clusters - 1)


METRIC = "win_rate"
WIN_RATE_MARGIN = 0.05
EVEN = 0.5
MIN_JUDGEMENTS = 2  # of a rank against the reference


@dataclass(frozen=True, slots=True)
class _Judged:
    """One rank against the reference; `worse` is 1/2 minus its win rate."""

    rank: int
    worse: Estimate

    @property
    def low(self) -> float:
        return max(-EVEN, self.worse.bound(1 - CONFIDENCE))

    @property
    def high(self) -> float:
        return min(EVEN, self.worse.bound(CONFIDENCE))

    def holds(self, margin: float) -> bool | None:
        return Bounds(self.worse.mean, self.low, self.high).is_enough(margin)


def reference_of(judgements: Sequence[Judgement]) -> int:
    """The rank that is compared with the most others; the largest of several."""
    others: dict[int, set[int]] = {}
    for one in judgements:
        others.setdefault(one.rank_a, set()).add(one.rank_b)
        others.setdefault(one.rank_b, set()).add(one.rank_a)
    return max(others, key=lambda rank: (len(others[rank]), rank))


def decide_judged(
    judgements: Sequence[Judgement], margin: float | None = None, reference: int | None = None
) -> Decision:
    """The decision that the judgements support.

    Args:
        judgements: only those of a pair with the reference count.
        margin: how far below 1/2 a win rate may be; None for .05.
        reference: None for the rank that is compared with the most others.

    Raises:
        ResultsError: a margin that is no win rate, or no rank with two judgements against the reference.
    """
    margin = WIN_RATE_MARGIN if margin is None else margin
    if not 0 < margin < EVEN:
        raise ResultsError(f"margin {margin:g} is not allowed: a win rate's margin is above 0 and below 0.5")
    top = reference_of(judgements) if reference is None else reference
    judged = _all(judgements, top)
    if not judged:
        raise ResultsError(f"no rank has {MIN_JUDGEMENTS} judgements against rank {top}: judge more pairs with it")
    chosen, failing = _walk(judged, top, margin)
    verdict = _verdict(judged, chosen, failing, top, margin)
    judges = {one.judge for one in judgements}
    runs = [_next_run(judged[failing], margin, len(judges))] if failing and verdict == "undecided" else []
    return Decision(
        rank=None if verdict == "undecided" else chosen,
        fallback_rank=chosen,
        verdict=verdict,
        flags=["one_judge"] if len(judges) == 1 else [],
        sentence=_sentence(verdict, chosen, top, judged, margin, failing),
        next_run=runs[0].sentence if runs else "Nothing more is needed at this margin.",
        metric=METRIC,
        higher_is_better=True,
        margin=margin,
        reference_rank=top,
        confidence=CONFIDENCE,
        learning_rate=None,
        staircase=_staircase(judged, top),
        ranks=_evidence(judged, top, margin),
        basis="items and seeds" if len(judges) > 1 else "items",
        basis_note=_basis_note(judgements, len(judges)),
        next_runs=runs,
    )


def _walk(judged: Mapping[int, _Judged], top: int, margin: float) -> tuple[int, int | None]:
    """`(smallest rank that holds, first rank below it that does not)`; None where all hold."""
    chosen = top
    for rank in descending(judged, top):
        if not judged[rank].holds(margin):
            return chosen, rank
        chosen = rank
    return chosen, None


def _verdict(judged: Mapping[int, _Judged], chosen: int, failing: int | None, top: int, margin: float) -> Verdict:
    if failing is None:
        return "flat"
    if judged[failing].holds(margin) is None:
        return "undecided"
    return "saturated" if chosen != top else "rising"


def _all(judgements: Sequence[Judgement], top: int) -> dict[int, _Judged]:
    found: dict[int, list[Judgement]] = {}
    for one in judgements:
        if top in (one.rank_a, one.rank_b):
            found.setdefault(one.rank_b if one.rank_a == top else one.rank_a, []).append(one)
    return {rank: _Judged(rank, _worse(own, rank)) for rank, own in sorted(found.items()) if len(own) >= MIN_JUDGEMENTS}


def _worse(own: Sequence[Judgement], rank: int) -> Estimate:
    scores = [EVEN - one.score_of(rank) for one in own]
    return clustered_mean(scores, [one.prompt for one in own], [one.judge for one in own])


def _evidence(judged: Mapping[int, _Judged], top: int, margin: float) -> list[RankEvidence]:
    rows = [
        RankEvidence(
            rank=top,
            value=EVEN,
            low=EVEN,
            high=EVEN,
            difference=0.0,
            difference_low=0.0,
            difference_high=0.0,
            non_inferior=True,
        )
    ]
    return sorted([*rows, *(_row(one, margin) for one in judged.values())], key=lambda one: one.rank)


def _row(one: _Judged, margin: float) -> RankEvidence:
    low, high = (EVEN - one.worse.bound(level) for level in reversed(two_sided(CONFIDENCE)))
    return RankEvidence(
        rank=one.rank,
        value=EVEN - one.worse.mean,
        low=max(0.0, low),
        high=min(1.0, high),
        difference=one.worse.mean,
        difference_low=one.low,
        difference_high=one.high,
        non_inferior=one.holds(margin),
        seeds=max(1, one.worse.seeds),
    )


def _staircase(judged: Mapping[int, _Judged], top: int) -> list[StaircaseStep]:
    steps, threshold = [StaircaseStep(margin=0.0, rank=top)], 0.0
    for rank in descending(judged, top):
        threshold = max(threshold, judged[rank].high)
        if threshold == steps[-1].margin:
            steps.pop()
        steps.append(StaircaseStep(margin=threshold, rank=rank))
    return steps


def _sentence(
    verdict: Verdict, chosen: int, top: int, judged: Mapping[int, _Judged], margin: float, other: int | None
) -> str:
    if verdict == "undecided":
        assert other is not None
        best = f"rank {chosen} is enough" if chosen != top else f"rank {top} is the reference"
        return f"Cannot tell: {best}, and the judgements cannot tell whether rank {other} is: {_rate(judged[other])}, margin {margin:g}."
    if verdict == "rising":
        assert other is not None
        return f"Rank {top} is needed: rank {other} is worse, {_rate(judged[other])}, margin {margin:g}."
    held = f"Rank {chosen} is enough: against rank {top}, {_rate(judged[chosen])}, margin {margin:g}"
    return f"{held}." if other is None else f"{held}; rank {other} is not, {_rate(judged[other])}."


def _rate(one: _Judged) -> str:
    low, high = EVEN - one.high, EVEN - one.low
    return f"it wins {EVEN - one.worse.mean:.0%} (95% bounds {low:.0%} to {high:.0%}, ties as halves)"


def _basis_note(judgements: Sequence[Judgement], judges: int) -> str:
    prompts = len({one.prompt for one in judgements})
    whose = (
        "the judges are a sample of more" if judges > 1 else "other judges may differ: the interval is for this judge"
    )
    return f"The intervals are over {prompts} prompts and {judges} judge{'s' if judges > 1 else ''}; {whose}."


def _next_run(one: _Judged, margin: float, judges: int) -> NextRun:
    """How many judgements would settle the rank, if its win rate stays as it is."""
    needed = examples_needed(one.worse, margin)
    if needed is not None:
        more = math.ceil(needed * max(1, judges))
        return NextRun(
            action="items",
            ranks=[one.rank],
            items=needed,
            sentence=(
                f"Judge rank {one.rank} on about {needed:,} prompts in place of {one.worse.examples:,} (about {more:,} judgements in "
                f"all, each by the {'same judge' if judges == 1 else f'{judges} judges'}) to settle it, if its win rate stays as it is."
            ),
        )
    cure = "more judges" if judges > 1 else "another margin"
    return NextRun(
        action="none",
        ranks=[one.rank],
        sentence=f"More prompts alone would not settle rank {one.rank} at this win rate: take {cure}.",
    )


FOLDER = "judging"
PAIRS, KEY, PAGE, JUDGEMENTS = "pairs.jsonl", "key.json", "judge.html", "judgements.jsonl"
OUTCOMES = ("a", "b", "tie")


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """What to judge; see `rightrank.api.judge` for each field."""

    run: Path
    prompts: int = 50
    ranks: Sequence[int] | None = None
    command: str | None = None
    collect: Sequence[Path] = ()
    judge: str | None = None
    margin: float | None = None
    seed: int = 0
    timeout_seconds: float = 3600.0
    notice: Callable[[str], None] = field(default=lambda _: None)


@dataclass(frozen=True, slots=True)
class JudgedRun:
    """The files of a judging, and the decision once somebody has judged."""

    page: Path
    pairs: Path
    count: int  # pairs to look at
    judgements: Path | None
    decision: Decision | None
    understood: list[str]


def judge_run(request: JudgeRequest) -> JudgedRun:
    """Make the pairs if there are none, ask the program or read the choices, and decide.

    Raises:
        InputError: a run without two adapters or without prompts, or choices that can't be used; nothing is written.
        RunError: the program failed.
    """
    folder = RunFolder.existing(request.run)
    if request.command is not None and request.collect:
        raise SettingsError("--command and --collect were both given: give one of them")
    place = folder.path / FOLDER
    program = None if request.command is None else _program(request.command)
    collected = [_collected(file) for file in request.collect]
    with folder.locked():
        if not (place / KEY).is_file():
            _make_pairs(request, folder, place)
        key = _key(place)
        choices: dict[str, Mapping[str, str]] = {}
        if program is not None:
            choices[request.judge or "command"] = _asked(program, request.timeout_seconds, place / PAIRS)
        for name, chosen in collected:
            choices[request.judge or name] = chosen
        if choices:
            _keep(place, key, choices)
    written = place / JUDGEMENTS
    count = sum("same" not in one for one in key["pairs"].values())
    if not written.is_file():
        return JudgedRun(place / PAGE, place / PAIRS, count, None, None, [])
    judgements, understood = read_judgements(written)
    decision = decide_judged(judgements, request.margin, key["reference"])
    return JudgedRun(place / PAGE, place / PAIRS, count, written, decision, understood)


def _make_pairs(request: JudgeRequest, folder: RunFolder, place: Path) -> None:
    journal = folder.journal.read()
    records = records_of(journal, str(folder.path))
    if records.started.data.form == "own":
        raise RunFolderError(
            f"{folder.path}: a custom trainer's run has no model to answer with: judge its answers yourself, and give the rows to "
            "`rightrank decide`"
        )
    reference, trials = _contenders(records, journal, request.ranks)
    answers, texts = _answers(request, folder, records, trials)
    generator = random.Random(request.seed)
    pairs: dict[str, dict[str, Any]] = {}
    shown: list[dict[str, str]] = []
    for prompt, text in texts.items():
        for rank in sorted(trials.keys() - {reference}):
            first, second = (rank, reference) if generator.random() < 0.5 else (reference, rank)
            name = hashlib.sha256(f"{request.seed} {prompt} {rank} {reference}".encode()).hexdigest()[:16]
            pairs[name] = {"prompt": prompt, "rank_a": first, "rank_b": second}
            if answers[first][prompt] == answers[second][prompt]:
                pairs[name]["same"] = True
            else:
                shown.append({"id": name, "prompt": text, "a": answers[first][prompt], "b": answers[second][prompt]})
    generator.shuffle(shown)
    place.mkdir(exist_ok=True)
    write_text(place / PAIRS, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in shown))
    write_text(place / PAGE, judge_page(shown))
    # last: it says that all are there
    write_text(place / KEY, json.dumps({"reference": reference, "pairs": pairs}, indent=1) + "\n")


def _contenders(
    records: Records, journal: Sequence[JournalRecord], asked: Sequence[int] | None
) -> tuple[int, dict[int, str]]:
    """`(reference, trial by rank)`: the best training of each rank; with goal adapter, the best truncation of each."""
    decided = last_decided(journal)
    decision = decided.decision if decided is not None else decision_so_far(records)
    if decision is not None:
        reference = decision.reference_rank
        trials = {one.rank: best_trial(records, decision, one.rank).trial_id for one in decision.ranks if one.rank > 0}
    elif records.adapters:
        answer = records.adapters[-1].answer
        reference, trials = answer.trained_rank, {}
        for one in sorted(answer.candidates, key=lambda one: -one.difference):
            trials[one.rank] = one.trial_id
        trials[reference] = answer.reference_id
    else:
        trials, reference = {}, 0
    if asked is not None:
        unknown = [rank for rank in asked if rank not in trials]
        if unknown:
            raise ResultsError(
                f"rank {unknown[0]} has no adapter in the run; there are {', '.join(map(str, sorted(trials)))}"
            )
        trials = {rank: trial for rank, trial in trials.items() if rank in asked or rank == reference}
    if len(trials) < 2:
        raise ResultsError("fewer than two ranks have an adapter: there is nothing to compare; train further ranks")
    return reference, trials


def _answers(
    request: JudgeRequest, folder: RunFolder, records: Records, trials: Mapping[int, str]
) -> tuple[dict[int, dict[str, str]], dict[str, str]]:
    """`(answers by rank and prompt id, prompt texts by id)`."""
    values = dict(records.started.settings)
    model, data = str(values.pop("model")), str(values.pop("data"))
    settings = make_settings({name: value for name, value in values.items() if value is not None})
    with tempfile.TemporaryDirectory(prefix="rightrank-") as cache:
        prepared = prepare(Request(model, None, data, settings), Path(cache) / "cache")
        runtime = prepared.runtime
        examples = promptable_examples(runtime, request.prompts)
        if not examples:
            raise DataError(f"{data}: no test example has a prompt to answer; judging needs `prompt` and `completion`")
        texts = {example.item_id: str(example.content["prompt"]) for example in examples}
        found: dict[int, dict[str, str]] = {}
        for rank, trial in sorted(trials.items()):
            with adapter_attached(runtime, folder.finished_adapter(trial)):
                found[rank] = {example.item_id: write_completion(runtime, example) for example in examples}
            request.notice(f"rank {rank}: {len(examples)} prompts answered")
    return found, texts


def _key(place: Path) -> dict[str, Any]:
    try:
        return read_json_object(place / KEY, 64 * 2**20)
    except UnreadableError as error:
        raise RunFolderError(
            f"{place / KEY}: not readable ({error}); remove the folder {place} to make the pairs again"
        ) from None


def _program(command: str) -> list[str]:
    """The words of the judge's command."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise SettingsError(f"--command: {command!r} can't be read as a command ({error})") from None
    if not words or shutil.which(words[0]) is None:
        raise SettingsError(f"--command: no program {words[0] if words else ''!r} on the PATH; give its path")
    return words


def _asked(words: list[str], timeout_seconds: float, pairs: Path) -> dict[str, str]:
    """The choices of a program that reads the pairs and prints `{"id": …, "outcome": "a"}` for each."""
    printed = run_program(command_on(words, pairs), timeout_seconds)
    found: dict[str, str] = {}
    for number, line in enumerate(filter(str.strip, printed.splitlines()), start=1):
        try:
            one = json.loads(line)
            found[str(one["id"])] = str(one["outcome"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise RunError(
                f'--command: line {number} is {line[:80]!r}; print {{"id": …, "outcome": "a"}} for each pair'
            ) from None
    return found


def _collected(file: Path) -> tuple[str, dict[str, str]]:
    """The judge's name and choices, as the page saves them."""
    try:
        found = read_json_object(file, 64 * 2**20)
    except UnreadableError as error:
        raise DataError(f"{file}: not readable ({error}); give the file that the page saved") from None
    choices, judge = found.get("choices"), found.get("judge")
    if not isinstance(choices, dict) or not isinstance(judge, str) or not judge:
        raise DataError(f"{file}: no `judge` and `choices` in it; give the file that the page saved")
    return judge, {str(name): str(outcome) for name, outcome in choices.items()}


def _keep(place: Path, key: Mapping[str, Any], choices: Mapping[str, Mapping[str, str]]) -> None:
    """Write the judgements of these judges as rows, in place of earlier ones of theirs."""
    pairs: Mapping[str, Mapping[str, Any]] = key["pairs"]
    rows: list[dict[str, Any]] = []
    file = place / JUDGEMENTS
    if file.is_file():
        earlier, _ = read_judgements(file)
        rows += [one.model_dump() for one in earlier if one.judge not in choices]
    for judge, chosen in choices.items():
        for name, outcome in chosen.items():
            if name not in pairs:
                raise DataError(
                    f"judge {judge!r}: pair {name!r} is not one of this run's; judge the pairs in {place / PAIRS}"
                )
            if outcome not in OUTCOMES:
                raise DataError(f"judge {judge!r}, pair {name!r}: outcome is {outcome!r}; give a, b or tie")
        same = {name: "tie" for name, pair in pairs.items() if "same" in pair}
        for name, outcome in {**chosen, **same}.items():
            shown = {field: pairs[name][field] for field in ("prompt", "rank_a", "rank_b")}
            rows.append(shown | {"outcome": outcome, "judge": judge})
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
