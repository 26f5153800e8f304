"""Build twice, in two folders and at two times, and compare the bytes. Install the wheel alone, and use it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.report.runs import write_answered_run
from tests.tiny import write_adapter

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


@pytest.mark.skipif(find_spec("hatchling") is None, reason="the build backend is not installed: pip install hatchling")
def test_the_wheel_alone_answers_without_the_packages_of_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Install the wheel in a new environment, where commands that train name the package that is missing."""
    build_files(tmp_path / "build")
    wheel = next((tmp_path / "build" / "dist").glob("*.whl"))
    venv.create(tmp_path / "light", with_pip=False)
    python = tmp_path / "light" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", str(wheel)], check=True)
    packages = subprocess.run([*pip, "freeze"], capture_output=True, text=True, check=True).stdout.splitlines()
    installed = next((tmp_path / "light" / "lib").glob("python*/site-packages"))
    megabytes = sum(path.stat().st_size for path in installed.rglob("*") if path.is_file()) / 1e6
    with capsys.disabled():
        print(f"\nrightrank alone: {len(packages)} packages, {megabytes:.0f} MB")
    stated = re.search(r"(\d+) packages, (\d+) MB", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert stated is not None
    assert abs(int(stated[1]) - len(packages)) <= 3
    assert abs(int(stated[2]) - megabytes) <= 0.2 * megabytes

    def use(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(python.with_name("rightrank")), *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    write_answered_run(tmp_path / "run", direct=(4, 16))
    (tmp_path / "runs.csv").write_text("rank,eval_loss\n1,2.3\n4,2.05\n16,2.001\n64,2.0\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    write_adapter(tmp_path / "adapter")
    commands = ("expect", "decide runs.csv", "decide run", "status run", "report run", "select --help")
    for command in (*commands, "inspect adapter", "resize adapter small --rank 2", "export small --to vllm"):
        process = use(*command.split())
        assert process.returncode == 0, process.stderr
        assert len(process.stdout) > 10, command
    process = use("select", "model", "data.jsonl", "--out", "new")
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].endswith("pip install 'rightrank[train]'")
    assert not (tmp_path / "new").exists()
