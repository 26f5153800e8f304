"""Small real models and data, made once a session: nothing is downloaded. What trains is marked."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers of a test run share the cores

import pytest
from hypothesis import settings

from tests.tiny import generate_sentences, save_tiny_llama, write_completions, write_jsonl

gc.disable()  # until the tests are collected: objects of imports are permanent, and visiting them takes a third of the time
settings.register_profile("no limit of time", deadline=None)  # an example may take long on a busy machine
settings.register_profile("check", deadline=None, max_examples=20)  # a fifth, for `make check`
settings.load_profile("no limit of time")

TESTS = Path(__file__).parent
NEEDS_A_MODEL = {"model_folder", "alone"}  # a test that takes one of these fixtures trains or evaluates


LONG = (
    "tests/test_demo.py",
    "tests/cluster/",
    "tests/trainers/",
    "tests/exports/",
    "tests/docs/",
    "tests/benchmarks/",
    "tests/runs/",
    "tests/training/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # In this order: at the end, a long file would leave a core idle.
    items.sort(key=lambda item: next((n for n, name in enumerate(LONG) if item.nodeid.startswith(name)), len(LONG)))
    for item in items:
        if NEEDS_A_MODEL.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.trains)
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """Skip fsync, which a small selection calls a hundred times: files of a test need not survive a power loss."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def done_once() -> Iterator[None]:
    """Cache work that many small selections repeat and discard, for the tests of each folder; PEFT writes no card."""
    from peft import PeftModel

    with pytest.MonkeyPatch.context() as patch:
        for file in sorted(TESTS.glob("*/once.py")):
            import_module(f"tests.{file.parent.name}.once").remember(patch)
        patch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)  # which `save_adapter` removes
        yield


@pytest.fixture(scope="session")
def model_folder(done_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random 3-layer Llama with a byte-level tokenizer."""
    return save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def completion_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 200 rows of prompt and completion."""
    return write_completions(tmp_path_factory.mktemp("data") / "completions.jsonl")


@pytest.fixture(scope="session")
def small_run(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with `model`, `data.jsonl` and the finished selection `run`, made in it with relative paths."""
    from rightrank.cli import main
    from tests.commands import SELECT

    folder = tmp_path_factory.mktemp("small")
    shutil.copytree(model_folder, folder / "model")
    shutil.copyfile(completion_file, folder / "data.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit, match=r"^0$"):
            main(SELECT)
    return folder


@pytest.fixture(scope="session")
def class_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write rows of text and label; the label says whether the sentence contains a cat."""
    rows = [{"text": text, "label": "cat" if "cat" in text else "none"} for text in generate_sentences(300, seed=2)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "classes.jsonl", rows)
