"""Nested trainings, other batches between seeds, and the locked grids that judge once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks.selection import judge_locked, locks, nested, noise, planted

from rightrank.models.kinds import linear


def test_the_diagonal_is_the_mean_of_the_prefixes() -> None:
    """B·P·A is the mean over the ranks of what each prefix gives at its own scale."""
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(5, 4, generator=generator), torch.randn(4, 3, generator=generator)
    between = nested.diagonal((1, 2, 4), 4.0, "alpha/r")
    prefixes = [4.0 / rank * b[:, :rank] @ a[:rank] for rank in (1, 2, 4)]
    assert torch.allclose(b @ (between[:, None] * a), sum(prefixes) / 3, atol=1e-6)
    assert nested.prefix((1, 2, 4), 4.0, "alpha/r", "own", 2).tolist() == [2.0, 2.0, 0.0, 0.0]
    assert nested.prefix((1, 2, 4), 4.0, "constant", "kept", 2).tolist() == pytest.approx([1.0, 2 / 3, 0.0, 0.0])


def test_the_scale_of_adapters_comes_back() -> None:
    plain = linear._scale
    with nested.scaled_by(torch.ones(2)):
        assert linear._scale is not plain
    assert linear._scale is plain


def test_a_nested_student_of_one_rank_is_a_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted, "RANKS", (16,))
    data = planted.Data(planted.teachers(4)[3])
    students = planted.Students([16, 16], [2e-2, 6e-2], [0, 1])
    ours, theirs = nested.NestedTraining(data, students, "alpha/r"), planted.Training(data, students, planted.initial(students))  # fmt: skip
    for step in range(3):
        ours.step(step, 1.0)
        theirs.step(step, 1.0)
    assert ours.values() == pytest.approx(theirs.values(), rel=1e-4)


def test_batches_are_shared_or_reversed_by_the_way() -> None:
    teacher = planted.teachers(2)[1]
    tokens = {
        way: [noise.Reordered(teacher, noise.PLANS[way]).batch(seed, 0)[0] for seed in (0, 1)] for way in noise.PLANS
    }
    last = planted.Data(teacher).batch(0, teacher.steps - 1)[0]
    assert not torch.equal(*tokens["independent"])
    assert torch.equal(*tokens["shared"])
    assert torch.equal(tokens["antithetic"][1], last)


def test_the_locked_grids_judge_once_when_six_are_whole_and_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOCKED", tmp_path)
    monkeypatch.setattr(locks, "LOCK", tmp_path / "lock.json")
    (tmp_path / "grids").mkdir()
    for number in range(6):
        grid = tmp_path / "grids" / f"{number}.json"
        grid.write_text(json.dumps({"curves": [{"seeds": [0], "partial": number == 5}]}))
        locks.lock(grid, "abc")
    judged = tmp_path / "judged.json"
    assert "5 of 6" in str(judge_locked.refusal(judged))
    grid.write_text(json.dumps({"curves": [{"seeds": [0, 1], "partial": False}]}))
    locks.lock(grid, "abc")
    assert judge_locked.refusal(judged) is None
    (tmp_path / "0.json").write_text("{}")
    assert "touched after their lock: 0.json" in str(judge_locked.refusal(judged))
    judged.write_text('{"date": "2026-11-28"}')
    assert "judge once" in str(judge_locked.refusal(judged))
