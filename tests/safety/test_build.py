"""Build twice, in two folders and at two times, and compare the bytes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.safety.audit import summarize

pytestmark = pytest.mark.trains

ROOT = Path(__file__).parents[2]
PACKAGED = ("src", "pyproject.toml", "README.md", "LICENSE")


def build_files(folder: Path) -> dict[str, str]:
    """Name → SHA-256 of wheel and sdist, from a copy of the sources with new times and an umask of its own."""
    folder.mkdir()
    for name in PACKAGED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, folder / name, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copyfile(source, folder / name)
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build"], cwd=folder, env=environment, check=True, capture_output=True
    )
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "dist").iterdir())}


@pytest.mark.skipif(find_spec("hatchling") is None, reason="the build backend is not installed: pip install hatchling")
def test_two_builds_are_the_same_bytes(tmp_path: Path) -> None:
    first, second = build_files(tmp_path / "a"), build_files(tmp_path / "another place")
    assert len(first) == 2
    assert first == second
    wheel = next((tmp_path / "a" / "dist").glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    packaged = [path for path in (ROOT / "src").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(ROOT / "src")) for path in packaged} <= set(names)  # templates too
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert b"rightrank = rightrank.cli:main" in zipfile.ZipFile(wheel).read(entry_points)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", ".")) or ".." in name]
    with tarfile.open(next((tmp_path / "a" / "dist").glob("*.tar.gz"))) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk() or ".." in member.name]


FOUND = {"name": "good", "version": "1", "vulns": []}
FAULTY = {"name": "bad", "version": "2", "vulns": [{"id": "PYSEC-1"}, {"id": "PYSEC-2"}]}
UNKNOWN = {"name": "odd", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "line", "status"),
    [
        ([FOUND, FOUND], "audit: 2 of 2 packages were looked up, none of them has an advisory", 0),
        (
            [FOUND, FAULTY],
            "audit: 2 of 2 packages were looked up, 1 have advisories (bad 2: PYSEC-1, PYSEC-2)",
            1,
        ),
        ([UNKNOWN, UNKNOWN], "audit: 0 of 2 packages were looked up; 2 were not, such as odd (not found)", 1),
        (
            [FOUND, UNKNOWN],
            "audit: 1 of 2 packages were looked up, none of them has an advisory; 1 were not, such as odd (not found)",
            1,
        ),
        ([FOUND, {"name": "rightrank", "skip_reason": "editable"}], "audit: 1 of 1 packages were looked up, none of them has an advisory", 0),
    ],
)  # fmt: skip
def test_a_package_that_was_not_looked_up_is_not_called_good(
    packages: list[dict[str, object]], line: str, status: int
) -> None:
    assert summarize({"dependencies": packages}) == (line, status)
