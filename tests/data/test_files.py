"""One way to write a file: whole or not at all, on a disk or on a network, killed or not."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from rightrank.data.files import replacing, replacing_folder, report_disk_errors, sweep_leftovers, write_text
from rightrank.schema.errors import RunError

SOURCE = Path(__file__).parents[2] / "src" / "rightrank"


def half_write(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError


def test_a_block_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_text(path, "old")
    with pytest.raises(RuntimeError):
        half_write(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_a_folder_are_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        done.append(f"→ {target.name}")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    with replacing_folder(tmp_path / "adapter") as temporary:
        (temporary / "weights").write_text("w")
    assert done.index("weights") < done.index("→ adapter") < len(done) - 1
    assert done[-1] == tmp_path.name


def test_a_rename_whose_answer_was_lost_counts_as_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS sends a rename again when no answer came; the second finds nothing to rename."""
    real = Path.replace

    def twice(self: Path, target: Path) -> Path:
        real(self, target)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "replace", twice)
    write_text(tmp_path / "decision.json", "new")
    assert (tmp_path / "decision.json").read_text() == "new"
    with replacing_folder(tmp_path / "adapter") as temporary:
        (temporary / "weights").write_text("w")
    assert (tmp_path / "adapter" / "weights").read_text() == "w"


def test_a_rename_that_was_not_done_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "decision.json", "old")

    def lost(self: Path, target: Path) -> Path:
        self.unlink()
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "replace", lost)
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "decision.json", "new")
    assert (tmp_path / "decision.json").read_text() == "old"


def test_a_file_system_that_can_not_flush_a_folder_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def sync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        write_text(tmp_path / "a", "y")
    assert (tmp_path / "a").read_text() == "x"


def test_an_opened_old_folder_that_nfs_keeps_is_left_and_swept_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that somebody has open lives on as .nfsXXXX, and its folder can't be removed yet."""
    import shutil

    with replacing_folder(tmp_path / "adapter") as temporary:
        (temporary / "weights").write_text("one")
    monkeypatch.setattr(shutil, "rmtree", lambda *_arguments, **_named: None)
    with replacing_folder(tmp_path / "adapter") as temporary:
        (temporary / "weights").write_text("two")
    monkeypatch.undo()
    assert (tmp_path / "adapter" / "weights").read_text() == "two"
    assert len(list(tmp_path.glob(".adapter.*.rightrank-old"))) == 1
    sweep_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_a_killed_process_left_is_swept_and_a_folder_moved_aside_comes_back(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / ".abc.77.rightrank-tmp").mkdir()
    (tmp_path / "trials" / ".abc.77.rightrank-tmp" / "weights").write_text("half")
    (tmp_path / ".report.html.77.rightrank-tmp").write_text("half")
    (tmp_path / ".adapter.77.rightrank-old").mkdir()
    (tmp_path / ".adapter.77.rightrank-old" / "weights").write_text("whole")
    (tmp_path / ".lock").write_text("")
    for own in (".notes.tmp", ".weights.1234.tmp", ".weights.5.old"):
        (tmp_path / own).write_text("the user's own")
    sweep_leftovers(tmp_path)
    names = [".lock", ".notes.tmp", ".weights.1234.tmp", ".weights.5.old", "adapter", "trials"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "adapter" / "weights").read_text() == "whole"
    assert list((tmp_path / "trials").iterdir()) == []


def test_nothing_else_in_the_source_opens_a_final_file_for_writing() -> None:
    """Writes go to `temporary` (or into a block that names it so), to standard output, or through data/files.py."""
    writing = re.compile(r"([\w.]+|\([^()]*\))\.(?:(?:write_text|write_bytes)\(|open\(\"(?:w|a|ab|wb|r\+b)\")")
    allowed = {
        ("train/prefix.py", "path"),  # room for a mapped file, which a run makes anew
        ("runs/journal.py", "self.path"),  # the append, and the cut of a torn line
        ("train/device.py", "_CLEAR"),  # a switch of the system
        ("plugins/cluster/processes.py", "log"),  # a worker's stderr, as it comes
        ("adapters/broken.py", "(copy / CONFIG_FILE)"),  # a copy in a temporary folder
        ("models/mlx.py", '(copy / "config.json")'),  # the same
    }
    found: set[tuple[str, str]] = set()
    for source in SOURCE.rglob("*.py"):
        for match in writing.finditer(source.read_text(encoding="utf-8")):
            target = match[1]
            if "temporary" not in target:
                found.add((str(source.relative_to(SOURCE)), target))
    assert found == allowed


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "make room and run the same command again"),
        (errno.EROFS, "give a folder that you may write to"),
        (errno.EACCES, "give a folder that you may write to"),
    ],
)
def test_a_disk_error_names_what_helps(number: int, advice: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=advice) as caught, report_disk_errors(tmp_path):
        raise OSError(number, "can't")
    assert ("make room" in str(caught.value)) == (number == errno.ENOSPC)
