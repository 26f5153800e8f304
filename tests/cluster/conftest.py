"""Provide the run in one process that runs with workers are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from rightrank import select_rank
from tests.cluster.runs import STEPS
from tests.tiny import build_small_settings


@pytest.fixture(scope="session")
def alone(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    select_rank(str(model_folder), completion_file, out, settings=build_small_settings(**STEPS))
    return out
