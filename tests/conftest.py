"""Small real models and data, made once a session: nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers of a test run share the cores

import pytest

from tests.tiny import save_tiny_llama, sentences, write_completions, write_jsonl


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 3-layer Llama with a byte-level tokenizer."""
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def completion_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 rows of prompt and completion."""
    return write_completions(tmp_path_factory.mktemp("data") / "completions.jsonl")


@pytest.fixture(scope="session")
def class_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of text and label: whether the sentence holds a cat."""
    rows = [{"text": text, "label": "cat" if "cat" in text else "none"} for text in sentences(300, seed=2)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "classes.jsonl", rows)


@pytest.fixture(autouse=True)
def own_calibrations(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What was measured on this machine before is not there, and nothing is kept for the next test."""
    folder = tmp_path_factory.getbasetemp() / "calibrations" / uuid4().hex
    monkeypatch.setattr("rightrank.planning.calibrate._path", lambda: folder / "calibration.json")
