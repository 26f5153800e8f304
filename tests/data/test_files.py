"""Test atomic writes on local and network disks and when the process is killed, and examples that are stored on disk."""

from __future__ import annotations

import errno
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from rightrank.data.files import replace_file, replace_folder, report_disk_errors, sweep_leftovers, write_text
from rightrank.data.forms import Example
from rightrank.data.splits import ExampleStore, load_data
from rightrank.schema.errors import RunError
from tests.tiny import build_small_settings


def write_half(path: Path) -> None:
    with replace_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_text(path, "old")
    with pytest.raises(RuntimeError):
        write_half(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_flushed_before_their_folder_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        calls.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        calls.append(f"→ {target.name}")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    with replace_folder(tmp_path / "adapter") as temporary:
        (temporary / "weights").write_text("w")
    assert calls.index("weights") < calls.index("→ adapter") < len(calls) - 1
    assert calls[-1] == tmp_path.name


def test_a_rename_that_was_not_done_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "decision.json", "old")

    def fail_to_rename(self: Path, target: Path) -> Path:
        self.unlink()
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "replace", fail_to_rename)
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "decision.json", "new")
    assert (tmp_path / "decision.json").read_text() == "old"


def test_an_open_folder_on_nfs_is_removed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a folder with an open file, which NFS renames to .nfsXXXX, until it can be removed."""
    import shutil

    with replace_folder(tmp_path / "adapter") as temporary:
        (temporary / "weights").write_text("one")
    monkeypatch.setattr(shutil, "rmtree", lambda *_arguments, **_named: None)
    with replace_folder(tmp_path / "adapter") as temporary:
        (temporary / "weights").write_text("two")
    monkeypatch.undo()
    assert (tmp_path / "adapter" / "weights").read_text() == "two"
    assert len(list(tmp_path.glob(".adapter.*.rightrank-old"))) == 1
    sweep_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / ".abc.77.rightrank-tmp").mkdir()
    (tmp_path / "trials" / ".abc.77.rightrank-tmp" / "weights").write_text("half")
    (tmp_path / ".report.html.77.rightrank-tmp").write_text("half")
    (tmp_path / ".adapter.77.rightrank-old").mkdir()
    (tmp_path / ".adapter.77.rightrank-old" / "weights").write_text("whole")
    (tmp_path / ".lock").write_text("")
    for user_file in (".notes.tmp", ".weights.1234.tmp", ".weights.5.old"):
        (tmp_path / user_file).write_text("the user's own")
    sweep_leftovers(tmp_path)
    names = [".lock", ".notes.tmp", ".weights.1234.tmp", ".weights.5.old", "adapter", "trials"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "adapter" / "weights").read_text() == "whole"
    assert list((tmp_path / "trials").iterdir()) == []


def test_a_disk_error_says_what_helps(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="make room or give a folder"), report_disk_errors(tmp_path):
        raise OSError(errno.EROFS, "can't")


def generate_examples(count: int) -> Iterator[Example]:
    for number in range(count):
        messages = [
            {"role": "user", "content": f"é {number} {'x' * (number % 90)}"},
            {"role": "assistant", "content": "\u2028"},
        ]
        yield Example(f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}", {"messages": messages}, f"d.jsonl:{number}")


def test_examples_are_stored_in_order_and_by_index(tmp_path: Path) -> None:
    examples = list(generate_examples(600))  # more than two batches of 256
    store = ExampleStore(examples, tmp_path / "work")
    assert list(store) == examples
    assert [store[number] for number in (599, 0, -1)] == [examples[599], examples[0], examples[599]]
    assert store[10:13] == examples[10:13]
    assert list((tmp_path / "work").iterdir()) == []
    with pytest.raises(IndexError):
        store[600]


def test_memory_does_not_grow_with_the_length_of_texts(tmp_path: Path) -> None:
    settings = build_small_settings(max_eval_examples=20)

    def measure_peak_bytes(letters: int) -> int:
        rows = ({"text": f"row {number} {'y' * letters}"} for number in range(4000))
        tracemalloc.start()
        splits = load_data(rows, settings, tmp_path)
        peak_bytes = tracemalloc.get_traced_memory()[1]  # the peak during loading
        tracemalloc.stop()
        assert len(splits.examples["train"]) > 2000
        return peak_bytes

    short, long = measure_peak_bytes(10), measure_peak_bytes(2000)
    assert long - short < 3 * 2**20  # The texts take 8 MB; only held-out examples and one batch are in memory.
