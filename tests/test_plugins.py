"""The door for plug-ins: each can be deleted, one that fails costs a notice and its own commands, others can be added."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from rightrank.runs import plugins
from tests.tiny import write_completions

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
FOLDERS = sorted(path.name for path in (SOURCE / "rightrank" / "plugins").iterdir() if (path / "__init__.py").is_file())

# Imports every module that is left, and runs a selection for the adapter. Arguments: model, data, out.
SELECTION = """\
import importlib, pkgutil, sys
import rightrank
for module in pkgutil.walk_packages(rightrank.__path__, "rightrank."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:  # a door into a program that is not installed
            if error.name.startswith("rightrank"):
                raise
if __name__ == "__main__":
    small = dict(ranks=(1, 4), learning_rates=(1e-2,), max_steps=4, batch_size=4, seq_len=32, max_eval_examples=8, device="cpu")
    selected = rightrank.select_rank(*sys.argv[1:], goal="adapter", **small)
    print(selected.adapter.rank)
"""


def run_python(source: Path, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(source), *([] if folder is None else [str(folder)])]),
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=source.parent)


def copy_source_without(names: Sequence[str], folder: Path) -> Path:
    """Copy the source without the folders of these plug-ins."""
    shutil.copytree(SOURCE, folder / "src")  # with the compiled files, whose times are kept
    for name in names:
        shutil.rmtree(folder / "src" / "rightrank" / "plugins" / name)
    return folder / "src"


def test_the_entry_points_are_the_folders() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"][plugins.GROUP] == {name: f"{plugins.GROUP}.{name}:PLUGIN" for name in FOLDERS}
    assert [plugin.name for plugin in plugins._load_plugins().values()] == FOLDERS


@pytest.mark.trains
def test_a_plug_in_can_be_deleted(tmp_path: Path) -> None:
    """Check that the others load without it. A contract of `.importlinter` says that none imports another."""
    source = copy_source_without([], tmp_path)
    for name in FOLDERS:
        folder = source / "rightrank" / "plugins" / name
        folder.rename(tmp_path / name)
        process = run_python(source, "-c", "import rightrank.cli as cli; print(*cli.cli.list_commands(None))")
        assert (process.returncode, process.stderr) == (0, "")
        (tmp_path / name).rename(folder)


@pytest.mark.trains
def test_a_selection_needs_no_plug_in(model_folder: Path, tmp_path: Path) -> None:
    source = copy_source_without(FOLDERS, tmp_path)
    data = write_completions(tmp_path / "data.jsonl", 40)
    process = run_python(source, "-c", SELECTION, str(model_folder), str(data), str(tmp_path / "run"))
    assert process.returncode == 0, process.stderr
    assert process.stdout.split()[-1] in ("1", "4")
    assert "plug-in" not in process.stderr


@pytest.mark.trains
def test_a_plug_in_that_cannot_be_imported_costs_one_notice_and_its_commands(tmp_path: Path) -> None:
    source = copy_source_without([], tmp_path)
    broken = source / "rightrank" / "plugins" / "plan" / "__init__.py"
    broken.write_text("import no_such_package\n", encoding="utf-8")
    process = run_python(source, "-m", "rightrank", "--help")
    assert process.returncode == 0
    assert [line for line in process.stderr.splitlines() if line] == [
        "rightrank: the plug-in 'plan' can't be imported (ModuleNotFoundError: No module named 'no_such_package') and is left out"
    ]
    assert not re.search(r"^  plan\b", process.stdout, re.MULTILINE)
    assert re.search(r"^  expect\b", process.stdout, re.MULTILINE)


@pytest.mark.trains
def test_the_plug_in_of_the_docs_works(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "write-a-plug-in.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"```(?:python|toml) title=\"([\w./-]+)\"\n(.*?)```", page, re.DOTALL))
    code = files["rightrank_chat.py"]
    assert sum(bool(line) for line in code.splitlines()) <= 30
    (tmp_path / "rightrank_chat.py").write_text(code, encoding="utf-8")
    entry = tomllib.loads(files["pyproject.toml"])["project"]["entry-points"][plugins.GROUP]
    metadata = tmp_path / "rightrank_chat-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: rightrank-chat\nVersion: 1\n", encoding="utf-8")
    lines = [f"[{plugins.GROUP}]", *(f"{name} = {value}" for name, value in entry.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    assert "chat-test" in run_python(SOURCE, "-m", "rightrank", "--help", folder=tmp_path).stdout
    script = textwrap.dedent("""
        import json, http.server, os, threading
        import rightrank

        class Chat(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                texts.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        texts = []
        server = http.server.HTTPServer(("127.0.0.1", 0), Chat)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.environ["CHAT_URL"] = f"http://127.0.0.1:{server.server_port}"
        rightrank.select_rank_with(lambda task: {"loss": 1 / task.rank}, "run", ranks=(1, 4), learning_rates=(1e-3,))
        rightrank.chat("done")
        print(json.dumps(texts))
    """)
    (tmp_path / "work").mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), str(tmp_path)])}
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path / "work"
    )
    assert process.returncode == 0, process.stderr
    posted = json.loads(process.stdout)
    assert posted[-1] == "done"
    assert any("rank 4" in text for text in posted)


PLUGIN_MODULE = re.compile(r"rightrank\.plugins\.(\w+)")
MARK = "plug_in("


@pytest.mark.parametrize("name", FOLDERS)
def test_only_its_own_tests_import_a_plug_in(name: str) -> None:
    """Require the marker `plug_in` in other tests that need it. Benchmarks may use every plug-in."""
    own_folders = (ROOT / "tests" / "plugins" / name, ROOT / "tests" / "benchmarks")
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if any(map(path.is_relative_to, own_folders)) or name not in PLUGIN_MODULE.findall(text):
            continue
        assert not re.search(rf"^from rightrank\.plugins\.{name}\b", text, re.MULTILINE), path
        assert f'{MARK}"{name}")' in text or "find_spec" in text, path


def copy_without(names: Sequence[str], folder: Path) -> Path:
    """Copy the project without these plug-ins and their tests."""
    source = copy_source_without(names, folder)
    for tree in ("tests", "benchmarks", "examples", "docs", "skills"):
        shutil.copytree(ROOT / tree, folder / tree, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for file in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(file, folder / file.name)
    for name in names:
        shutil.rmtree(folder / "tests" / "plugins" / name, ignore_errors=True)
    return source


@pytest.mark.trains
def test_the_remaining_tests_pass_without_plug_ins(tmp_path: Path) -> None:
    """Collect all tests, and run those without training that use the commands, pages and settings of plug-ins.

    `test_only_its_own_tests_import_a_plug_in` checks that a test of one plug-in needs no other.
    """
    source = copy_source_without(FOLDERS, tmp_path)
    for folder in ("tests", "benchmarks", "examples", "docs", "skills"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for file in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(file, tmp_path / file.name)
    for folder in ("plugins", "benchmarks"):
        shutil.rmtree(tmp_path / "tests" / folder)
    asking = "cli or schema or test_source or test_refusals or test_views or test_pages"
    options = ("-q", "-x", "-p", "no:cacheprovider", "-m", "not trains", "-k", asking)
    process = run_python(source, "-m", "pytest", *options, "tests", folder=tmp_path)
    assert process.returncode == 0, process.stdout[-2000:]
