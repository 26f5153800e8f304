"""A journal's records as evidence: what is compared with what, and which training is handed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rightrank.api.runs import decide
from rightrank.decision.adapter import Making
from rightrank.decision.records import (
    Records,
    answers_of,
    best_trial,
    comparable,
    compared,
    criterion_of,
    decide_on,
    decide_run,
    decision_so_far,
    records_of,
    run_table,
    trainings,
    trials_frame,
)
from rightrank.decision.rule import ASKED_CONFIDENCE, decision_of
from rightrank.decision.sentences import chance
from rightrank.decision.table import table_of
from rightrank.report.status import last_decided, run_status
from rightrank.schema.decision import Decision, TrainingRankEstimate
from rightrank.schema.errors import ResultsError, RunFolderError
from rightrank.schema.events import DecisionRecorded, JournalRecord, RunContinued, TestEvaluated
from rightrank.schema.trials import (
    EvalPoint,
    TrialCollapsed,
    TrialDiverged,
    TrialFailed,
    TrialFinished,
    TrialLook,
    TrialStarted,
)
from tests.report import runs
from tests.report.runs import ITEMS, TOKENS, answered_run, made_up_run


def journal_of(records: Records) -> list[JournalRecord]:
    return [records.started, *records.outcomes, *records.tests]


def begun(trial: TrialFinished) -> TrialStarted:
    return TrialStarted(trial_id=trial.trial_id, **trial.arm.model_dump())


def altered(trial: TrialFinished, **changes: object) -> TrialFinished:
    return trial.model_copy(update=changes)


def test_records_are_sorted_by_kind() -> None:
    made = made_up_run(diverged=[(4, 1e-3)])
    found = records_of(journal_of(made), "run")
    assert found == made
    assert len(found.finished()) == len(found.outcomes) - 1
    assert all(isinstance(trial, TrialFinished) for trial in found.finished())


@pytest.mark.parametrize("headless", [[], [begun(made_up_run().finished()[0])]], ids=["empty", "no start"])
def test_a_journal_without_a_start_is_no_run(headless: list[JournalRecord]) -> None:
    with pytest.raises(RunFolderError, match=r"here: no run has started here; give a folder"):
        records_of(headless, "here")


def test_the_last_word_on_a_trial_counts() -> None:
    first = made_up_run().finished()[1]
    again = altered(first, value=1.5)
    failed = TrialFailed(trial_id="other", **first.arm.model_dump(), error="error", reason="x")
    third = failed.model_copy(update={"trial_id": "third"})
    started = made_up_run().started
    assert Records.of(started, [begun(first), first, failed, third, again]).outcomes == [again, failed, third]


def test_every_kind_of_record_is_kept_apart() -> None:
    made = made_up_run()
    answered = answered_run().adapters
    found = Records.of(made.started, [*answered, *made.tests])
    assert (found.adapters, found.tests, found.outcomes, found.looks) == (answered, made.tests, [], {})


def test_a_look_that_is_reported_again_replaces_all_later_ones_and_a_new_start_drops_them() -> None:
    first = begun(made_up_run().finished()[1])
    looks = [
        TrialLook(trial_id=first.trial_id, step=step, value=value) for step, value in ((0, 1.0), (10, 2.0), (20, 3.0))
    ]
    again = TrialLook(trial_id=first.trial_id, step=10, value=4.0)
    other = TrialLook(trial_id="other", step=5, value=5.0)
    started = made_up_run().started
    found = Records.of(started, [first, *looks, other, again])
    assert found.looks == {first.trial_id: [looks[0].point, again.point], "other": [other.point]}
    found.keep(first)
    assert found.looks == {"other": [other.point]}


def test_a_rate_counts_as_tried_where_a_training_of_its_own_start_stopped_or_diverged() -> None:
    one, base = made_up_run().finished()[1], made_up_run().finished()[0]
    fields = one.arm.model_dump()
    looks = [
        base,
        altered(one, trial_id="stopped", learning_rate=0.1, stop_at=5),
        altered(one, trial_id="truncated", learning_rate=0.2, truncate_from=one.trial_id),
        TrialDiverged(trial_id="diverged", **(fields | {"learning_rate": 0.3}), step=1, reason="x"),
        TrialFailed(trial_id="failed", **(fields | {"learning_rate": 0.4}), error="error", reason="x"),
        altered(one, trial_id="higher", rank=2 * one.rank, learning_rate=0.5),
    ]
    table = table_of([one], "loss", False, looks=looks)
    assert base.rank == 0
    assert table.tried == {one.rank: {one.learning_rate, 0.1, 0.3}, 2 * one.rank: {0.5}}


def test_the_trial_that_began_last_and_has_not_ended_is_running() -> None:
    one, two, three = made_up_run().finished()[:3]

    def running(*journal: JournalRecord) -> str | None:
        return run_status("run", journal, made_up_run(), "training-rank", True, {}).running

    assert running() is None
    assert running(begun(one), one) is None
    assert running(begun(one), begun(two), one) == two.arm.label()
    assert running(begun(one), begun(two), begun(three), two) == three.arm.label()
    for ended in (
        TrialDiverged(trial_id=one.trial_id, **one.arm.model_dump(), step=1, reason="x"),
        TrialFailed(trial_id=one.trial_id, **one.arm.model_dump(), error="error", reason="x"),
    ):
        assert running(begun(one), ended) is None


def test_the_last_decision_is_found() -> None:
    records = made_up_run()
    decision = decide_run(records)
    decided = [DecisionRecorded(decision=decision, adapter_trial_id=name) for name in ("a", "b")]
    assert last_decided(journal_of(records)) is None
    assert last_decided([records.started, *decided, *records.tests]) == decided[1]


def test_a_run_is_decided_at_its_own_margin_and_kind_of_loss() -> None:
    records = made_up_run()
    assert decide_run(records).margin == 0.02
    records.started.settings["margin"] = None
    assert decide_run(records).margin == 0.005
    records.started.settings["margin"] = 1
    assert decide_run(records).margin == 1.0
    records.started.settings["margin"] = None
    relative = 0.01 * min(t.value for t in records.finished())
    for form, margin in (("classification", relative), ("own", 0.005)):
        other = Records.of(
            records.started.model_copy(update={"data": records.started.data.model_copy(update={"form": form})}),
            records.outcomes,
        )
        assert decide_run(other).margin == pytest.approx(margin, rel=0.01)


def test_a_decision_so_far_needs_two_ranks() -> None:
    records = made_up_run((1, 4, 16))
    records.outcomes[:] = [outcome for outcome in records.outcomes if outcome.rank < 16]
    assert [evidence.rank for evidence in decide_run(records).ranks] == [0, 1, 4]
    assert decision_so_far(records) == decide_run(records)
    records.outcomes[:] = [outcome for outcome in records.outcomes if outcome.rank < 4]
    assert decision_so_far(records) is None


def test_accuracy_is_read_from_the_correct_examples() -> None:
    records = made_up_run((1, 4), (1e-3,))
    right = {1: [1, 0] * (ITEMS // 2), 4: [1] * ITEMS, 0: [0] * ITEMS}
    outcomes = [
        altered(trial, item_correct=right[trial.rank], metrics={"accuracy": sum(right[trial.rank]) / ITEMS, "loss": 1})
        for trial in records.finished()
    ]
    started = records.started.model_copy(update={"metric": "accuracy", "higher_is_better": True})
    table = run_table(Records.of(started, outcomes))
    assert (table.metric, table.higher_is_better, table.kind) == ("accuracy", True, "accuracy")
    assert {rank: table.cells[rank, 1e-3, 0].loss for rank in (1, 4)} == {1: -0.5, 4: -1.0}
    assert table.cells[4, 1e-3, 0].others == {"loss": 1}


def test_a_cell_holds_what_its_trial_measured() -> None:
    records = made_up_run((1, 4), (1e-3,), diverged=[(4, 1e-3)])
    trial = records.finished()[1]
    cell = run_table(records).cells[1, 1e-3, 0]
    assert cell.trial_id == trial.trial_id
    assert cell.value == trial.value
    assert cell.loss == pytest.approx(trial.value)
    assert (cell.examples, float(cell.weights[0])) == (ITEMS, TOKENS)
    assert (cell.steps, cell.train_value, cell.others) == (trial.steps, trial.train_value, {})
    assert cell.points == tuple(trial.points)
    assert run_table(records).missing == {4: 1}


def test_a_cell_has_the_seconds_of_its_training_and_of_one_evaluation() -> None:
    trial = altered(made_up_run().finished()[1], train_seconds=12.0, eval_seconds=6.0)
    points = [EvalPoint(step=step, value=2.0, train_value=None) for step in (10, 20, 30)]
    for along, seconds in (([], 6.0), (points[:1], 6.0), (points, 2.0)):
        (cell,) = table_of([altered(trial, points=along)], "loss", False).cells.values()
        assert (cell.train_seconds, cell.eval_seconds) == (12.0, seconds)


def test_a_cell_has_the_groups_of_its_examples() -> None:
    trial = made_up_run().finished()[1]
    grouped = altered(trial, item_groups=[number // 2 for number in range(ITEMS)])
    (cell,) = table_of([grouped], "loss", False).cells.values()
    assert (cell.units, cell.examples) == (ITEMS // 2, ITEMS)
    (alone,) = table_of([trial], "loss", False).cells.values()
    assert (alone.groups, alone.units) == (None, ITEMS)


def test_like_is_compared_with_like() -> None:
    records = made_up_run((1, 4, 16), (1e-3,))
    base, one, four, sixteen = records.finished()
    records.outcomes[:] = [base, one, four, altered(sixteen, stop_at=10)]
    assert comparable(records) == [base, one, four]


def test_trainings_of_a_custom_trainer_have_any_metric() -> None:
    records = made_up_run((1, 4), (1e-3,))
    one, four = records.finished()[1:]
    started = records.started.model_copy(
        update={
            "metric": "score",
            "higher_is_better": True,
            "data": records.started.data.model_copy(update={"form": "own"}),
        }
    )
    failed = TrialFailed(trial_id="gone", **four.arm.model_dump(), error="error", reason="x")
    own = Records.of(
        started,
        [
            altered(one, metrics={"score": 3.0, "loss": 1.0}, item_scores=[2.0, 5.0], item_weights=[2.0, 1.0]),
            altered(four, metrics={"score": 4.0}, item_scores=[4.0, 4.0], item_weights=[2.0, 1.0]),
            failed,
        ],
    )
    table = run_table(own)
    cell = table.cells[1, 1e-3, 0]
    assert (table.metric, table.higher_is_better, table.missing) == ("score", True, {4: 1})
    assert (cell.value, cell.loss, cell.examples) == (3.0, -3.0, 2)
    assert cell.others == {"loss": 1.0}
    assert cell.steps == one.steps
    assert cell.points == tuple(one.points)
    assert cell.train_value == one.train_value
    assert table.cells[4, 1e-3, 0].value == 4.0


def test_the_best_seed_of_the_best_learning_rate_is_handed_over() -> None:
    records = made_up_run((1, 4), (1e-3, 3e-3), (0, 1, 2))
    decision = decide_run(records)
    of_four = [trial for trial in records.finished() if trial.rank == 4]
    learning_rate = next(evidence.learning_rate for evidence in decision.ranks if evidence.rank == 4)
    at_rate = [trial for trial in of_four if trial.learning_rate == learning_rate]
    assert best_trial(records, decision, 4) == min(at_rate, key=lambda trial: trial.value)
    mirrored = decision.model_copy(update={"higher_is_better": True})
    assert best_trial(records, mirrored, 4) == max(at_rate, key=lambda trial: trial.value)
    tied = Records.of(records.started, [altered(trial, value=2.0) for trial in records.finished()[::-1]])
    assert best_trial(tied, decision, 4).seed == 0


def test_a_perplexity_of_weighted_examples_is_the_weighted_mean_of_logarithms() -> None:
    records = made_up_run((1, 4), (1e-3,))
    trials = [
        altered(trial, metrics={"perplexity": 4.0}, item_scores=[2.0, 8.0], item_weights=[3.0, 1.0])
        for trial in records.finished()[1:]
    ]
    cell = table_of(trials, "perplexity", False).cells[4, 1e-3, 0]
    assert cell.loss == pytest.approx((3 * np.log(2.0) + np.log(8.0)) / 4)


def test_a_continued_run_has_the_settings_and_the_examples_that_it_was_last_continued_with() -> None:
    made = made_up_run()
    more = made.started.data.model_copy(update={"rows": 99})
    continued = [
        RunContinued(settings={"margin": 0.5, "seeds": [0, 1]}, evaluation_items=["a", "b"], data=more),
        RunContinued(settings={"margin": 0.25}),
        RunContinued(settings={}, evaluation_items=["a", "b", "c"]),
    ]
    started = records_of([*journal_of(made), *continued], "run").started
    assert started.settings == made.started.settings | {"margin": 0.25, "seeds": [0, 1]}
    assert started.evaluation_items == ["a", "b", "c"]
    assert started.data == made.started.data
    assert records_of([*journal_of(made), *continued[:2]], "run").started.data == more
    untouched = {"settings", "evaluation_items", "data"}
    assert started.model_dump(exclude=untouched) == made.started.model_dump(exclude=untouched)
    # Examples without settings, and settings without examples.
    only = records_of([made.started, RunContinued(settings={}, evaluation_items=["a"])], "run").started
    assert (only.settings, only.evaluation_items) == (made.started.settings, ["a"])
    assert records_of([made.started, RunContinued(settings={})], "run").started == made.started


def with_settings(records: Records, **settings: object) -> Records:
    started = records.started.model_copy(update={"settings": records.started.settings | settings})
    return Records.of(started, [*records.outcomes, *records.adapters])


def test_the_confidence_is_that_of_the_run_unless_another_is_asked() -> None:
    """A probability that is none is refused by its value: the one that was asked."""
    records = made_up_run()

    def asked(settings: dict[str, object], confidence: float | None = None) -> str:
        run = with_settings(records, **settings)
        with pytest.raises(ResultsError) as refused:
            decide_on(run, comparable(run), "loss", 0.02, confidence=confidence)
        return str(refused.value).removeprefix("confidence ").partition(" ")[0]

    assert asked({"confidence": 0.3}) == "0.3"
    assert asked({"confidence": 0.9}, 0.2) == "0.2"
    assert asked({"confidence": 0.3}, 0.2) == "0.2"
    assert asked({"confidence": 1}) == "1"
    assert asked({"profile": "rl", "confidence": 0.3}) == "0.3"


def used(decision: Decision) -> str:
    assert decision.checkpoint is not None
    return decision.checkpoint.used


def test_the_checkpoint_is_that_of_the_run_unless_another_is_asked() -> None:
    records = made_up_run()
    best = with_settings(records, checkpoint="best")
    assert used(decide_run(records)) == used(decide_run(with_settings(records, checkpoint="last"))) == "last"
    assert used(decide_run(best)) == "best"
    assert used(decide_on(best, comparable(best), "loss", checkpoint="last")) == "last"
    assert used(decide_on(records, comparable(records), "loss", checkpoint="best")) == "best"


def test_the_criterion_of_a_run_is_its_metric_at_its_margin() -> None:
    records = made_up_run()
    found = criterion_of(records)
    assert (found.metric, found.higher_is_better, found.margin, found.loss) == ("loss", False, 0.02, "token_loss")
    assert found.points_are_of_the_metric
    assert not found.trusts_values
    assert criterion_of(with_settings(records, margin=None)).margin is None
    assert criterion_of(with_settings(records, margin=1)).margin == 1.0
    started = records.started.model_copy(
        update={
            "metric": "f1",
            "higher_is_better": True,
            "points_metric": "loss",
            "data": records.started.data.model_copy(update={"form": "preference"}),
        }
    )
    other = criterion_of(Records.of(started, []))
    assert (other.metric, other.higher_is_better, other.loss) == ("f1", True, "pair_loss")
    assert not other.points_are_of_the_metric
    same = records.started.model_copy(update={"points_metric": "loss"})
    assert criterion_of(Records.of(same, [])).points_are_of_the_metric


def test_every_adapter_of_a_run_is_compared_with_the_reference_of_its_last_answer() -> None:
    records = answered_run(direct=[4])
    found = compared(records)
    assert [(one.rank, one.how) for one in found] == [
        (64, "trained"), (32, "truncated"), (16, "truncated"), (8, "truncated"), (4, "trained"), (4, "truncated"),
    ]  # fmt: skip
    assert [one.difference for one in found if one.trial_id == records.adapters[-1].answer.reference_id] == [0.0]
    assert compared(made_up_run()) == []


def test_the_cost_of_a_run_is_counted_in_whole_trainings() -> None:
    records = made_up_run((1, 4), (1e-3,))
    assert trainings(records) == 2.0  # the base is evaluated, not trained
    one, four = records.finished()[1:]
    stopped = altered(one, trial_id="stopped", stop_at=10)
    resumed = altered(one, trial_id="resumed", stop_at=30, continue_from="stopped")
    truncated = altered(four, trial_id="truncated", truncate_from=four.trial_id, steps=0)
    records.outcomes += [stopped, resumed, truncated]
    assert trainings(records) == pytest.approx(2 + 0.25 + 0.5)
    third = altered(one, trial_id="third", stop_at=None, steps=13)
    assert trainings(Records.of(records.started, [altered(four, steps=30), third])) == 1.433
    # A custom trainer may not tell its steps; then each training counts as one.
    own = Records.of(records.started, [altered(trial, steps=0) for trial in (one, four)])
    assert trainings(own) == 2.0
    assert trainings(Records.of(records.started, [])) == 0.0


def test_both_answers_are_one_document() -> None:
    records = answered_run(direct=[1, 4, 16])
    decision, adapter = decide_run(records), records.adapters[-1]
    found = answers_of(records, decision, "training-rank").document()
    assert {name: found[name] for name in ("metric", "higher_is_better", "goal")} == {
        "metric": "loss",
        "higher_is_better": False,
        "goal": "training-rank",
    }
    assert (found["rank"], found["verdict"], found["sentence"]) == (decision.rank, decision.verdict, decision.sentence)
    assert found["flags"] == list(decision.flags)
    assert found["adapter_sentence"] == adapter.answer.sentence
    assert found["cost"] == {"trainings": trainings(records), "trainings_to_adapter": 1.2}
    assert found["adapter_making"].startswith("trained at rank 64 (learning rate 0.003, 40 steps), truncated to rank ")
    assert found["handed_over"] == adapter.handed_over.model_dump(mode="json")
    assert found["adapter_answer"] == adapter.answer.model_dump(mode="json")
    assert found["training_rank_estimate"] is None


def test_a_question_that_was_not_asked_is_none_in_the_document() -> None:
    estimate = TrainingRankEstimate(low=8, high=16, trainings=3.0, sentence="Between 8 and 16.")
    first = answers_of(answered_run(), None, "adapter", estimate).document()
    assert [first[name] for name in ("rank", "verdict", "confidence", "sentence")] == [None] * 4
    assert first["training_rank_estimate"] == estimate.model_dump(mode="json")
    assert "flags" not in first
    assert (first["metric"], first["higher_is_better"], first["goal"]) == ("loss", False, "adapter")
    records = made_up_run()
    second = answers_of(records, decide_run(records), "training-rank").document()
    of_the_adapter = ("adapter_sentence", "adapter_making", "handed_over", "adapter_answer")
    assert {name: second[name] for name in of_the_adapter} == dict.fromkeys(of_the_adapter)
    assert second["cost"] == {"trainings": 8.0, "trainings_to_adapter": None}


def test_a_metric_that_is_only_reported_is_compared_where_it_was_asked_for() -> None:
    made = made_up_run((1, 4), (1e-3,))
    outcomes = [altered(one, metrics=one.metrics | {"reward_margin": 0.5 + one.rank}) for one in made.finished()]
    records = Records.of(made.started, outcomes)
    assert decide_run(records).other_metrics == []
    (asked,) = decide_run(with_settings(records, metrics=["reward_margin"])).other_metrics
    assert (asked.metric, asked.higher_is_better) == ("reward_margin", True)
    assert decide_run(with_settings(records, metrics="reward_margin")).other_metrics == []  # no list
    deciding = Records.of(
        made.started.model_copy(update={"metric": "reward_margin", "higher_is_better": True}), outcomes
    )
    assert [one.metric for one in decide_run(deciding).other_metrics] == ["loss"]
    by_loss = decide_on(deciding, comparable(deciding), "loss", 0.02).other_metrics
    assert [one.metric for one in by_loss] == ["reward_margin"]


def test_of_rewards_an_undecided_comparison_takes_the_smallest_rank_that_is_not_worse() -> None:
    made = made_up_run((16, 64), (3e-3,), (0, 1), with_base=False)
    rewards, *others = (with_settings(made, margin=0.009, **more) for more in ({"profile": "rl"}, {"profile": "x"}, {}))
    assert (decide_run(rewards).verdict, decide_run(rewards).rank) == ("saturated", 64)  # all others are worse
    assert (
        "it is the best of the ranks tried, and the next lower rank (16) is inconclusive"
        in decide_run(rewards).sentence
    )
    for other in others:
        assert (decide_run(other).verdict, decide_run(other).rank) == ("undecided", None)


def test_one_seed_of_rewards_is_answered_by_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "ITEMS", 200)
    records = made_up_run((16, 64), (3e-3,), with_base=False)
    rewards, plain = (decide_run(with_settings(records, margin=0.009, **more)) for more in ({"profile": "rl"}, {}))
    assert (rewards.asked, plain.asked) == (None, ASKED_CONFIDENCE)
    asked = decide_run(with_settings(records, margin=0.009, profile="rl", confidence=0.7))
    assert (asked.verdict, asked.rank) == (plain.verdict, plain.rank)


def test_the_direction_that_is_given_is_that_of_a_custom_trainer_s_metric() -> None:
    made = made_up_run((1, 4), (1e-3,))
    own = made.started.model_copy(
        update={"metric": "score", "data": made.started.data.model_copy(update={"form": "own"})}
    )
    records = Records.of(own, [altered(one, metrics={"score": 1.0}) for one in made.finished()[1:]])
    assert not run_table(records).higher_is_better
    assert run_table(records, higher=True).higher_is_better


def test_a_metric_without_a_direction_is_named() -> None:
    made = made_up_run((1, 4), (1e-3,))
    records = Records.of(made.started, [altered(one, metrics={"colour": 1.0}) for one in made.finished()])
    line = "metric 'colour': whether higher or lower is better is not known from its name; give --higher-is-better or"
    with pytest.raises(ResultsError, match=line):
        run_table(records, metric="colour")


def test_learning_rates_of_stopped_trainings_count_as_tried_in_a_run() -> None:
    records = made_up_run((1, 4), (1e-3,))
    stopped = altered(records.finished()[1], trial_id="stopped", learning_rate=0.1, stop_at=5)
    records.outcomes.append(stopped)
    assert run_table(records).tried[1] == {1e-3, 0.1}


def test_collapses_and_the_kept_step_are_in_the_table() -> None:
    one, four = made_up_run((1, 4), (1e-3,)).finished()[1:]
    collapsed = TrialCollapsed(
        trial_id="x", **four.arm.model_dump(), step=7, reason="x", value=9.0, best_step=3, best_value=1.0
    )
    table = table_of([altered(one, kept_step=20), collapsed], "loss", False)
    assert (table.collapsed, table.missing) == (1, {4: 1})
    assert table.cells[1, 1e-3, 0].kept_step == 20


def test_trainings_scored_on_other_examples_are_compared_by_their_values() -> None:
    one, four = made_up_run((1, 4), (1e-3,)).finished()[1:]
    fewer = altered(four, item_losses=four.item_losses[:20], item_tokens=four.item_tokens[:20])
    assert [cell.examples for cell in table_of([one, fewer], "loss", False).cells.values()] == [0, 0]
    table = table_of([one, four], "loss", False)
    assert [(cell.examples, cell.span) for cell in table.cells.values()] == [(ITEMS, 0.0)] * 2


def test_the_range_of_a_weighted_score_is_that_of_the_score() -> None:
    one = made_up_run((1, 4), (1e-3,)).finished()[1]
    scored = altered(one, metrics={"score": 4.0}, item_scores=[5.0, 2.0], item_weights=[2.0, 1.0])
    (cell,) = table_of([scored], "score", True).cells.values()
    assert (cell.sums.tolist(), cell.span) == ([-10.0, -2.0], 5.0)


def test_a_copy_has_the_same_records_and_changes_alone() -> None:
    made, trial = answered_run(), made_up_run().finished()[1]
    look = TrialLook(trial_id="other", step=5, value=5.0)
    on_test = TestEvaluated(trial_id=trial.trial_id, rank=trial.rank, value=1.0, item_losses=[], item_tokens=[])
    made = Records.of(made.started, [*made.outcomes, *made.adapters, on_test, look])
    copied, before = made.copy(), made.copy()
    assert copied == made
    again = altered(made.finished()[-1], value=9.0)
    for record in (again, trial, *made.tests, *made.adapters, look.model_copy(update={"trial_id": "third"})):
        copied.keep(record)
    assert made == before
    assert copied.by_id[again.trial_id] == again
    assert len(copied.outcomes) == len(made.outcomes) + (trial.trial_id not in made.by_id)
    assert all(len(getattr(copied, kind)) > len(getattr(made, kind)) for kind in ("tests", "adapters", "looks"))


def test_an_undecided_sentence_says_how_likely_the_open_rank_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "ITEMS", 200)
    table = run_table(made_up_run((16, 64), (3e-3,), (0, 1), with_base=False))
    decision = decision_of(table, 0.01, confidence=None)
    assert decision.verdict == "undecided"
    assert decision.sentence.endswith(f", {chance(decision.ranks[0].probability or 0.0)} likely enough).")


def test_an_adapter_of_which_only_the_rank_is_known_is_said_so() -> None:
    assert Making(4, 4, 0.0, 0, None, None).sentence() == "trained at rank 4"
    assert Making(2, 8, 0.0, 50, None, "SVD").sentence() == "trained at rank 8 (50 steps), truncated to rank 2 by SVD"


def test_trials_are_a_table() -> None:
    records = made_up_run(diverged=[(4, 1e-3)], seeds=(0, 1))
    table = trials_frame(records, examples=False)
    assert list(table.trial_id) == [outcome.trial_id for outcome in records.outcomes]
    assert set(table.status) == {"finished", "diverged"}
    assert list(table[table.stage == "base"]["rank"]) == [0]
    finished = [outcome for outcome in records.outcomes if isinstance(outcome, TrialFinished)]
    assert list(table[table.status == "finished"].loss) == [outcome.metrics["loss"] for outcome in finished]
    assert list(table[table.status == "diverged"].reason) == ["training loss is nan"] * 2
    assert trials_frame(Records.of(records.started, []), examples=False).empty
    assert trials_frame(Records.of(records.started, []), examples=True).empty


@pytest.mark.parametrize("kind", ["trials", "examples", "csv", "csv of examples", "csv with the index"])
def test_an_exported_run_decides_without_its_truncated_and_stopped_trainings(tmp_path: Path, kind: str) -> None:
    records = answered_run(direct=(1, 4, 16))
    whole = next(trial for trial in records.finished() if trial.rank == 16 and trial.is_direct)
    for number, changes in enumerate(({"stop_at": 10}, {"stop_at": 20}, {"stop_at": 20, "anneal_from": 10})):
        records.outcomes.append(altered(whole, trial_id=f"stage-{number}", metrics={"loss": 2.0 + number}, **changes))
    of_run = decide_run(records)
    table: Any = trials_frame(records, examples="examples" in kind)
    if "csv" in kind:
        path = tmp_path / "run.csv"
        table.to_csv(path, index="index" in kind)
        table = path
    read = decide(table, metric="loss", margin=of_run.margin)
    assert [one.rank for one in read.decision.ranks] == [0, 1, 4, 16, 64]
    assert {one.rank: one.value for one in read.decision.ranks} == {
        one.rank: pytest.approx(one.value) for one in of_run.ranks
    }
    rows = 7 * (ITEMS if "examples" in kind else 1)
    assert f"{rows} rows of truncated or stopped trainings left out" in read.understood


def test_an_exported_run_with_one_rank_is_told_what_to_do() -> None:
    table = trials_frame(answered_run(), examples=False)
    with pytest.raises(
        ResultsError, match=r"column stage says that 1 rank was trained to the end.*--goal training-rank"
    ):
        decide(table, metric="loss")


def test_a_column_named_stage_of_another_table_is_no_stage_of_a_run() -> None:
    rows = [{"rank": rank, "stage": "sft", "eval_loss": 2 + 1 / rank} for rank in (1, 4, 16)]
    assert [one.rank for one in decide(rows).decision.ranks] == [1, 4, 16]
    assert "not used: stage" in decide(rows).understood


def test_the_table_of_examples_decides_as_the_run() -> None:
    records = made_up_run(seeds=(0, 1))
    table = trials_frame(records, examples=True)
    of_run = decide_run(records)
    assert len(table) == sum(len(t.item_losses) for t in records.outcomes if isinstance(t, TrialFinished))
    read = decide(table, metric="loss", higher_is_better=False, margin=of_run.margin).decision
    assert (read.rank, read.verdict) == (of_run.rank, of_run.verdict)
    for ours, theirs in zip(read.ranks, of_run.ranks, strict=True):
        assert (ours.rank, ours.value) == (theirs.rank, pytest.approx(theirs.value))
        assert (ours.low, ours.high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))
