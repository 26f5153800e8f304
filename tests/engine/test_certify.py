"""`select --certify`: one arm again alone, the comparison in journal and report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rightrank.api import select_rank
from rightrank.engine.certify import largest_differences, tensor_difference
from rightrank.records import Certified
from tests.conftest import small_settings


def certified(run: Path) -> Certified:
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    (found,) = [line for line in lines if line["type"] == "certified"]
    return Certified.model_validate(found)


def test_a_packed_selection_certifies_an_arm(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    settings = small_settings(pack_size=2, max_steps=4)
    select_rank(str(model_folder), completion_file, tmp_path / "run", settings=settings)
    assert "certified" not in (tmp_path / "run" / "journal.jsonl").read_text()
    # A finished run can be certified afterwards: it is the same run.
    select_rank(
        str(model_folder), completion_file, tmp_path / "run", settings=settings.model_copy(update={"certify": True})
    )
    certificate = certified(tmp_path / "run")
    assert certificate.passed is True
    assert certificate.pack_size == 2
    assert certificate.steps == 4
    assert 0 < certificate.loss_difference + certificate.adapter_difference < 1e-3
    assert certificate.sentence().startswith(
        f"Rank {certificate.rank} was trained in a pack of 2, and again alone: the same."
    )
    assert "Certificate: trained together as alone" in (tmp_path / "run" / "report.html").read_text()


def test_bfloat16_is_held_against_the_difference_of_seeds(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    settings = small_settings(pack_size=4, max_steps=6, dtype="bfloat16", certify=True, seeds=(0, 1))
    select_rank(str(model_folder), completion_file, tmp_path / "run", settings=settings)
    certificate = certified(tmp_path / "run")
    assert not certificate.exact
    assert certificate.seed_difference is not None
    assert certificate.value_difference <= 0.1 * certificate.seed_difference
    assert certificate.passed is True


def test_differences_are_relative_and_seen_in_any_tensor() -> None:
    assert largest_differences([2.0, 1.1], [2.0, 1.0]) == (0.0, pytest.approx(0.1))
    one = {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.full((4, 2), 1e-3)}
    assert tensor_difference(one, one) == 0
    other = one | {"q.lora_B.weight": torch.full((4, 2), 2e-3)}
    assert tensor_difference(one, other) == pytest.approx(0.5)
