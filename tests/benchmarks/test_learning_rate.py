"""Check that the grids of `benchmarks/learning_rate` are as they were locked, and that sentences have the numbers of their judgement."""

from __future__ import annotations

import json

from benchmarks.learning_rate import judge, lock

from rightrank.decision.sentences import MEASURED_PROBABILITIES
from rightrank.report.answer import LONGER_ADVICE


def test_what_is_committed_agrees_with_its_locks() -> None:
    locks = lock.read_lock()
    assert set(locks["code"]) == set(lock.CODE)
    for name, entry in locks["grids"].items():
        assert lock.hash_file(lock.GRIDS / name) == entry["sha256"], name


def test_the_sentences_have_the_numbers_of_the_judgement() -> None:
    bins = json.loads(judge.JUDGED.read_text())["d: stated probabilities"]["bins"]
    for measured in bins:
        assert f"{measured['stated']:.2f}" in MEASURED_PROBABILITIES
        assert f"{measured['true']:.0%}" in MEASURED_PROBABILITIES
    rows = {row["policy"]: row for row in json.loads((lock.HERE / "table_new.json").read_text())["rows"]}
    regrets = {policy: row["regret of the adapter"]["mean"] for policy, row in rows.items()}
    gains = {policy: regrets["adapter"] - regret for policy, regret in regrets.items()}
    assert f"{gains['twice the steps, truncated']:.3f} nats" in LONGER_ADVICE
    assert max(gains["adapter, a second seed"], gains["best-adapter"]) <= 0.002 + 5e-4
