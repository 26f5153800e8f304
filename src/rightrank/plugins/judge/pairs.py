"""Judging a run: blind pairs of answers for people or programs, and what they chose.

Every rank's best adapter answers the same test prompts as the reference's. A pair shows both answers in a random order under the
letters A and B; the ranks are in a file of their own. Equal answers are ties and are shown to nobody.

The page on which a person judges is one file that opens from disk and sends nothing anywhere.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from rightrank.data.files import UnreadableError, read_json_object, write_text
from rightrank.data.forms import Example
from rightrank.decision.records import Records, best_trial, decision_so_far, records_of
from rightrank.interop.tables import raw_rows
from rightrank.plugins.judge.judgements import SCORES, decide_judged, judgements_of
from rightrank.report.html import page_script, templates
from rightrank.report.status import last_decided
from rightrank.runs.folder import RunFolder
from rightrank.runs.prepare import prepare
from rightrank.runs.values import Request
from rightrank.schema.decision import Decision
from rightrank.schema.errors import DataError, ResultsError, RunFolderError
from rightrank.schema.events import JournalRecord
from rightrank.train.generation import write_completion
from rightrank.train.runtime import Runtime, adapter_attached

MAX_PROMPT_TOKENS = 256  # of a prompt that people judge
FOLDER = "judging"
PAIRS, KEY, PAGE, JUDGEMENTS = "pairs.jsonl", "key.json", "judge.html", "judgements.jsonl"


@dataclass(frozen=True, slots=True)
class JudgedRun:
    """The files of a judging, and the decision once somebody has judged."""

    page: Path
    pairs: Path
    count: int  # pairs to look at
    judgements: Path | None
    decision: Decision | None
    understood: list[str]


def judge_run(
    run: Path, prompts: int, collect: Sequence[Path], margin: float | None, notice: Callable[[str], None]
) -> JudgedRun:
    """Make the pairs if there are none, read the choices, and decide; see `rightrank.plugins.judge.judge`."""
    folder = RunFolder.existing(run)
    place = folder.path / FOLDER
    choices = dict(_collected(file) for file in collect)
    with folder.locked():
        if not (place / KEY).is_file():
            _make_pairs(folder, place, prompts, notice)
        key = _key(place)
        if choices:
            _keep(place, key, choices)
    written = place / JUDGEMENTS
    count = sum("same" not in pair for pair in key["pairs"].values())
    if not written.is_file():
        return JudgedRun(place / PAGE, place / PAIRS, count, None, None, [])
    judgements, understood = judgements_of(raw_rows(written))
    decision = decide_judged(judgements, margin, key["reference"])
    return JudgedRun(place / PAGE, place / PAIRS, count, written, decision, understood)


def _make_pairs(folder: RunFolder, place: Path, prompts: int, notice: Callable[[str], None]) -> None:
    journal = folder.journal.read()
    records = records_of(journal, str(folder.path))
    if records.started.is_own:
        raise RunFolderError(
            f"{folder.path}: a custom trainer's run has no model to answer with: judge its answers yourself, and give the rows to "
            "`rightrank decide`"
        )
    reference, trials = _contenders(records, journal)
    answers, texts = _answers(folder, records, trials, prompts)
    notice(f"{len(trials)} ranks answered {len(texts)} prompts")
    generator = random.Random(0)
    pairs: dict[str, dict[str, Any]] = {}
    shown: list[dict[str, str]] = []
    for prompt, text in texts.items():
        for rank in sorted(trials.keys() - {reference}):
            first, second = (rank, reference) if generator.random() < 0.5 else (reference, rank)
            name = hashlib.sha256(f"{prompt} {rank} {reference}".encode()).hexdigest()[:16]
            pairs[name] = {"prompt": prompt, "rank_a": first, "rank_b": second}
            if answers[first][prompt] == answers[second][prompt]:
                pairs[name]["same"] = True
            else:
                shown.append({"id": name, "prompt": text, "a": answers[first][prompt], "b": answers[second][prompt]})
    generator.shuffle(shown)
    place.mkdir(exist_ok=True)
    write_text(place / PAIRS, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in shown))
    write_text(place / PAGE, judge_page(shown))
    # last: it says that all are there
    write_text(place / KEY, json.dumps({"reference": reference, "pairs": pairs}, indent=1) + "\n")


def _contenders(records: Records, journal: Sequence[JournalRecord]) -> tuple[int, dict[int, str]]:
    """`(reference, trial by rank)`: the best training of each rank; with goal adapter, the best truncation of each."""
    decided = last_decided(journal)
    decision = decided.decision if decided is not None else decision_so_far(records)
    if decision is not None:
        reference = decision.reference_rank
        ranks = (evidence.rank for evidence in decision.ranks if evidence.rank > 0)
        trials = {rank: best_trial(records, decision, rank).trial_id for rank in ranks}
    elif records.adapters:
        answer = records.adapters[-1].answer
        reference, trials = answer.trained_rank, {}
        for candidate in sorted(answer.candidates, key=lambda candidate: -candidate.difference):
            trials[candidate.rank] = candidate.trial_id
        trials[reference] = answer.reference_id
    else:
        trials, reference = {}, 0
    if len(trials) < 2:
        raise ResultsError("fewer than two ranks have an adapter: there is nothing to compare; train further ranks")
    return reference, trials


def _answers(
    folder: RunFolder, records: Records, trials: Mapping[int, str], prompts: int
) -> tuple[dict[int, dict[str, str]], dict[str, str]]:
    """`(answers by rank and prompt id, prompt texts by id)`."""
    model, data = str(records.started.model_name), str(records.started.data_name)
    with tempfile.TemporaryDirectory(prefix="rightrank-") as cache:
        prepared = prepare(Request(model, None, data, records.settings), Path(cache) / "cache")
        runtime = prepared.runtime
        examples = promptable_examples(runtime, prompts)
        if not examples:
            raise DataError(f"{data}: no test example has a prompt to answer; judging needs `prompt` and `completion`")
        texts = {example.item_id: str(example.content["prompt"]) for example in examples}
        answers: dict[int, dict[str, str]] = {}
        for rank, trial in sorted(trials.items()):
            with adapter_attached(runtime, folder.finished_adapter(trial)):
                answers[rank] = {example.item_id: write_completion(runtime, example) for example in examples}
    return answers, texts


def _key(place: Path) -> dict[str, Any]:
    try:
        return read_json_object(place / KEY, 64 * 2**20)
    except UnreadableError as error:
        raise RunFolderError(
            f"{place / KEY}: not readable ({error}); remove the folder {place} to make the pairs again"
        ) from None


def _collected(file: Path) -> tuple[str, dict[str, str]]:
    """A judge's name and choices: `{"judge": …, "choices": {id: outcome}}`, as the page saves them."""
    try:
        saved = read_json_object(file, 64 * 2**20)
    except UnreadableError as error:
        raise DataError(f"{file}: not readable ({error}); give the file that the page saved") from None
    choices, judge = saved.get("choices"), saved.get("judge")
    if not isinstance(choices, dict) or not isinstance(judge, str) or not judge:
        raise DataError(f"{file}: no `judge` and `choices` in it; give the file that the page saved")
    return judge, {str(name): str(outcome) for name, outcome in choices.items()}


def _keep(place: Path, key: Mapping[str, Any], choices: Mapping[str, Mapping[str, str]]) -> None:
    """Write the judgements of these judges as rows, in place of earlier ones of theirs."""
    pairs: Mapping[str, Mapping[str, Any]] = key["pairs"]
    rows: list[dict[str, Any]] = []
    file = place / JUDGEMENTS
    if file.is_file():
        earlier, _ = judgements_of(raw_rows(file))
        rows += [judgement.model_dump() for judgement in earlier if judgement.judge not in choices]
    for judge, chosen in choices.items():
        for name, outcome in chosen.items():
            if name not in pairs:
                raise DataError(
                    f"judge {judge!r}: pair {name!r} is not one of this run's; judge the pairs in {place / PAIRS}"
                )
            if outcome not in SCORES:
                raise DataError(f"judge {judge!r}, pair {name!r}: outcome is {outcome!r}; give a, b or tie")
        same = {name: "tie" for name, pair in pairs.items() if "same" in pair}
        for name, outcome in {**chosen, **same}.items():
            shown = {field: pairs[name][field] for field in ("prompt", "rank_a", "rank_b")}
            rows.append(shown | {"outcome": outcome, "judge": judge})
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def judge_page(pairs: Sequence[Mapping[str, str]]) -> str:
    """The page for these pairs, each with `id`, `prompt`, `a` and `b`."""
    assets = [files("rightrank.plugins.judge").joinpath(name) for name in ("judge.html", "judge.js", "judge.css")]
    page, script, style = (asset.read_text(encoding="utf-8").strip("\n") for asset in assets)
    return templates().from_string(page).render(style=style, **page_script(script, list(pairs)))


def promptable_examples(runtime: Runtime, count: int) -> list[Example]:
    """The first `count` test examples with a string prompt that is not too long to show."""
    if runtime.data.summary.form not in ("prompt_completion", "preference"):
        return []
    tokenizer = runtime.loaded.tokenizer
    prompts = ((example, example.content["prompt"]) for example in runtime.data.texts["test"])
    strings = ((example, tokenizer(prompt)["input_ids"]) for example, prompt in prompts if isinstance(prompt, str))
    return list(islice((example for example, ids in strings if 0 < len(ids) <= MAX_PROMPT_TOKENS), count))
