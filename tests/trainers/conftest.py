"""Provide tokenized rows for the tests of other trainers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.trainers.trainings import Rows


@pytest.fixture
def rows(model_folder: Path, completion_file: Path) -> Rows:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenized_rows = []
    for line in completion_file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        tokenized_rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return tokenized_rows
