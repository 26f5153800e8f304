"""The expectation: the base rate of the atlas, what is said where nothing is alike, and that a prior enters no answer."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from benchmarks.atlas.judge import RULES, capacity, folk_rule, held_out
from benchmarks.atlas.replayed import WAYS, said
from benchmarks.selection.compare import FAMILIES
from click.testing import CliRunner

import rightrank
from rightrank.cli import cli
from rightrank.decision.run import decide_run
from rightrank.hooks.report import write_report
from rightrank.models.ranks import rank_change_line, rate_warning
from rightrank.plugins.atlas.estimate import (
    RANKS,
    Question,
    expectation,
    kind_of,
    likeness,
    of_run,
    probabilities,
    size_of,
    wilson,
)
from rightrank.plugins.atlas.rows import load
from rightrank.plugins.atlas.view import atlas_row, figure_of, outlook, sentence
from rightrank.report.svg import svg_file
from rightrank.runs.folder import RunFolder
from rightrank.runs.values import answers
from rightrank.schema.errors import SettingsError
from tests.plugins.atlas.made_up import sweep
from tests.report.runs import made_up_run

ROOT = Path(__file__).parents[3]
JUDGED = ROOT / "benchmarks" / "atlas" / "judged.json"
PAGE = ROOT / "docs" / "explanation" / "expected.md"
AT_ONCE = """
import sys, time
sys.path[:0] = [sys.argv[1] + "/src"]
from rightrank.cli import cli
cli(["expect", "Qwen/Qwen2.5-1.5B", "--task", "language"], standalone_mode=False)
print([n for n in ("torch", "transformers", "numpy", "pandas") if n in sys.modules], time.process_time())
"""


def test_a_share_is_weighted_and_never_falls_with_rank() -> None:
    good, poor = sweep(seeds=3), sweep(id="b", source="t", tuned=False, values=(2.0, 2.0, 2.0, 2.0))
    found = probabilities(None, [good, poor], lambda row: row.source, (1, 4, 16))
    # 1 says no with weight 1, yes with .2; the prior of 1/2 weighs 4
    assert found[1][0] == pytest.approx((0.2 + 4 * 0.5) / (1.2 + 4))
    assert found[4][0] == pytest.approx((1.2 + 4 * 0.5) / (1.2 + 4))
    shares = [rank.probability for rank in expectation(Question()).ranks]
    assert all(low <= high for low, high in pairwise(shares))


def test_sweeps_of_one_source_do_not_shout_down_another() -> None:
    many = [sweep(id=f"m{n}", values=(2.0, 2.0, 2.0, 2.0)) for n in range(100)]
    other = sweep(id="o", source="t")
    found = probabilities(None, [*many, other], lambda row: row.source, (1,))
    assert found[1][1] == pytest.approx(100 * 0.5 / 10 + 0.5 + 4)


def test_a_divergence_curve_is_never_counted() -> None:
    assert any(row.diverges for row in load().sweeps)
    assert expectation(Question()).sweeps == sum(not row.diverges for row in load().sweeps)
    assert not any("divergence" in row["not_tuned"] for row in expectation(Question("language", 7e9)).nearest)


def test_likeness_names_the_nearest_and_leaves_the_chance_alone() -> None:
    question = Question("classification", 110e6, 2000, kind="accuracy")
    found, every = expectation(question), expectation(Question())
    assert [rank.probability for rank in found.ranks] == [rank.probability for rank in every.ranks]
    assert 0 < found.sweeps < every.sweeps
    assert likeness(question, sweep(family="classification", kind="accuracy", parameters=110e6, rows=2000)) == 1
    assert "silversuncn" in found.nearest[0]["source"]
    assert len({row["source"] for row in found.nearest}) == 5
    assert every.nearest == every.notes == ()
    assert "classification" in sentence(found)


@pytest.mark.parametrize("known", [{"task": "poems"}, {"model": "my-own-net"}])
def test_what_is_unknown_gives_the_base_rate_and_says_so(known: dict[str, Any]) -> None:
    found = rightrank.expect(**known)
    assert found.like == "all of the atlas"
    assert any(next(iter(known.values())) in note for note in found.notes)


def test_a_margin_that_nothing_resolves_is_said() -> None:
    found = rightrank.expect(task="classification", margin=1e-9)
    assert any("resolve this margin" in note for note in found.notes)
    with pytest.raises(SettingsError, match="margin is -1"):
        rightrank.expect(margin=-1)
    with pytest.raises(SettingsError, match=r"nowhere\.jsonl does not exist"):
        rightrank.expect(data="nowhere.jsonl")


def test_the_command_prints_what_the_issue_names(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"text": "word " * 40, "label": n % 2}) + "\n" for n in range(50)), encoding="utf-8"
    )
    plot = tmp_path / "expected.svg"
    arguments = ["expect", "bert-base-uncased", str(data), "--ranks", "4,16,64", "--json", "--plot", str(plot)]
    shown = CliRunner().invoke(cli, arguments)
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.output)
    assert {"sweeps", "ranks", "start_rank", "top_rank", "nearest"} <= found.keys()
    assert [set(rank) for rank in found["ranks"]] == [{"rank", "enough_in", "of", "probability", "low", "high"}] * 3
    assert [rank["rank"] for rank in found["ranks"]] == [4, 16, 64]
    assert {"source", "base", "task", "rank"} <= found["nearest"][0].keys()
    assert found["start_rank"] in (4, 16, 64)
    assert "classification, about 110M parameters" in found["like"]
    assert plot.read_text(encoding="utf-8").startswith("<svg")
    text = CliRunner().invoke(cli, ["expect"]).output
    assert "a start, not a bound" in text
    assert "multiply it by 0.57" in text
    assert "rank 256 at 0.0002 with alpha = 2r diverged" in text
    with pytest.raises(SettingsError, match="rank 0: give ranks from 1 on"):
        rightrank.expect(ranks=(0, 4))


def test_the_answer_comes_at_once_and_without_torch() -> None:
    told = subprocess.run(
        [sys.executable, "-c", AT_ONCE, str(ROOT)], capture_output=True, text=True, check=True
    ).stdout.splitlines()[-1]
    heavy, seconds = told.split(" ")
    assert heavy == "[]"
    assert float(seconds) < 2


def test_sizes_and_kinds_by_name() -> None:
    assert [size_of(name) for name in ("Qwen/Qwen2.5-1.5B", "SmolLM2-135M", "distilbert-base-uncased", "gpt2-xl", "x")] == [
        1.5e9, 135e6, 67e6, 1.56e9, None,
    ]  # fmt: skip
    assert [kind_of(name) for name in ("loss", "macro_f1", "bleu", None)] == ["loss", "accuracy", "other", None]


def test_a_selection_is_told_and_its_answer_is_not_touched() -> None:
    records = made_up_run()
    (before,) = outlook(records.started, None)
    (after,) = outlook(records.started, 4)
    likely = expectation(of_run(records.started)).start_rank
    assert before.startswith(f"before: rank {likely} was enough in half")
    assert after == f"before: {likely} likely; measured: 4"
    own = records.started.model_copy(update={"metric": "reward"})
    assert outlook(own, 4) == []


def test_a_run_gives_a_row_without_data_or_names() -> None:
    records = made_up_run()
    row = atlas_row(records)
    assert row["ranks"] == [1, 4, 16, 64]
    assert len(row["values"]) == 4
    assert (row["family"], row["kind"], row["better"]) == ("language", "loss", "low")
    assert not row.keys() & {"base", "model", "data", "task", "run", "path"}
    assert not any(isinstance(value, (dict, str)) and len(value) > 20 for value in row.values())


def test_a_row_says_which_checkpoint_the_run_kept() -> None:
    records = made_up_run()
    assert atlas_row(records)["checkpoint"] == "last"
    started = records.started.model_copy(update={"settings": {**records.started.settings, "checkpoint": "best"}})
    assert atlas_row(replace(records, started=started))["checkpoint"] == "best"


def test_the_figure_has_its_numbers() -> None:
    figure = figure_of(expectation(Question()))
    assert figure.series[0].x == RANKS
    assert "90% interval" in svg_file(figure)


def test_the_interval_holds_the_share() -> None:
    for share, count in ((0.0, 4), (0.5, 10), (1.0, 40)):
        low, high = wilson(share, count)
        assert 0 <= low <= share <= high <= 1


def test_the_rate_when_the_rank_changes() -> None:
    assert rank_change_line(16, 64, 32).endswith("with alpha = r multiply it by 0.57")
    assert "keep alpha at 32" in rank_change_line(16, 64, 32)
    assert "lora_alpha 128, which keeps the scale at 2" in rank_change_line(16, 64, 32, "constant")
    assert rank_change_line(16, 64, 32, "alpha/sqrt(r)").endswith("with rsLoRA was not measured")
    assert rate_warning(256, 512, 2e-4)
    assert not rate_warning(64, 128, 2e-4)
    assert not rate_warning(256, 32, 2e-4)


def test_the_rules_that_it_is_judged_beside() -> None:
    assert folk_rule(sweep(rows=40_000)) == pytest.approx(32)
    assert folk_rule(sweep(rows=5_000)) == 4
    assert capacity(sweep(parameters=8e9, tokens=26e6)) == pytest.approx(10)
    assert set(RULES) == {"always 16", "folk rule", "capacity arithmetic"}
    assert {held_out(group) for group in ("silversun", "tinker", "morrison", "ppm", "lllf", "mora")} == {True, False}


def test_the_stored_judgement_says_what_the_estimate_does() -> None:
    found = json.loads(JUDGED.read_text(encoding="utf-8"))["default margins"]
    assert found["printed"] == "likeness^0"
    mean, low, high = found["base_rate_minus"]["likeness"]["all"]
    assert low < 0 < high or mean > 0, "likeness adds something: let it in"
    for fifth in found["calibration"]:  # of few groups, what the count of groups can't tell apart
        chance = (fifth["was"] * (1 - fifth["was"]) / fifth["groups"]) ** 0.5
        assert abs(fifth["said"] - fifth["was"]) < (0.12 if fifth["groups"] > 8 else chance)


def test_the_report_shows_what_was_expected_beside_what_was_measured(tmp_path: Path) -> None:
    records = made_up_run()
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    decision = decide_run(records)
    write_report(folder, records, decision, answers(records, decision, "training-rank"))
    likely = expectation(of_run(records.started)).start_rank
    assert re.search(rf"before: {likely} likely; measured: \d+<", folder.report.read_text(encoding="utf-8"))


def test_no_default_follows_the_atlas_since_its_replay_saves_nothing_for_free() -> None:
    found = json.loads((ROOT / "benchmarks" / "atlas" / "replayed.json").read_text(encoding="utf-8"))
    assert found["families"].keys() == FAMILIES.keys()
    for way in WAYS:
        saved, lost = found["all"][way]["trainings_saved"], found["all"][way]["no_longer_exact"]
        assert saved <= 0 or lost > found["all"][way]["became_exact"], f"{way} wins: adopt it"
    assert said("linear", 0.02) == tuple(found["start_and_top"]["linear, 0.02"])


QUESTIONS = re.findall(r"\| `(--[^`]+)`: rank ([^|]+)\|", PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("options", "answer"), QUESTIONS, ids=[options for options, _ in QUESTIONS])
def test_the_page_of_ten_questions_says_what_the_command_says(options: str, answer: str) -> None:
    assert len(QUESTIONS) == 10
    shown = CliRunner().invoke(cli, ["expect", *shlex.split(options)]).output.splitlines()[0]
    said = re.findall(r"rank (\d+) was enough in (\d+) of the (\d+)", shown)
    assert said == re.findall(r"(\d+) in (\d+) of (\d+)", answer)
