"""Test the package's syntax trees for what its code must never do, and the threat table of SECURITY.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from rightrank import select_rank_with
from rightrank.runs import trackers
from rightrank.schema.errors import (
    RunError,
    SettingsError,
    describe_error,
    format_one_line,
    get_first_line,
    redact_secrets,
)
from rightrank.schema.settings import SelectSettings
from tests.commands import COMMANDS, run

SOURCE = Path(__file__).parents[2] / "src" / "rightrank"
PICKLES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "loky",
    "shelve",
    "marshal",
    "multiprocessing",
}
# Between the driver and the workers that it started itself, and never from a file.
MAY_PICKLE = {"cluster/workers.py"}
FORBIDDEN_CALLS = {
    "torch.load", "torch.hub.load", "np.load", "numpy.load", "pickle.load", "pickle.loads", "yaml.unsafe_load",
    "yaml.full_load", "os.system", "os.popen", "eval", "exec", "compile", "__import__", "tempfile.mktemp",
    "tarfile.open", "zipfile.ZipFile", "gzip.open", "shutil.unpack_archive", "datasets.load_dataset",
}  # fmt: skip


@cache
def iterate_modules() -> tuple[tuple[str, ast.Module], ...]:
    paths = sorted(SOURCE.rglob("*.py"))
    return tuple((path.relative_to(SOURCE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))) for path in paths)


def get_dotted_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{get_dotted_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def list_imports(tree: ast.Module) -> set[str]:
    plain = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    return plain | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def test_nothing_imports_a_pickle() -> None:
    importers = {
        name for name, tree in iterate_modules() if {module.split(".")[0] for module in list_imports(tree)} & PICKLES
    }
    assert importers <= MAY_PICKLE


def test_nothing_calls_what_runs_or_unpacks_a_file() -> None:
    calls = {
        f"{name}:{node.lineno} {get_dotted_name(node.func)}"
        for name, tree in iterate_modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and get_dotted_name(node.func) in FORBIDDEN_CALLS
    }
    assert not calls


def test_yaml_is_read_by_the_plain_loader_alone() -> None:
    calls = [
        (name, get_dotted_name(node.func), get_dotted_name(node.args[-1]))
        for name, tree in iterate_modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and get_dotted_name(node.func) in ("yaml.load", "yaml.safe_load", "yaml.load_all")
    ]
    assert set(calls) == {("data/files.py", "yaml.load", "_PlainLoader")}


def test_every_subprocess_is_a_list_of_words() -> None:
    shells = [
        f"{name}:{node.lineno}"
        for name, tree in iterate_modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "shell"
    ]
    assert not shells


def test_models_are_loaded_with_the_user_s_word_on_foreign_code() -> None:
    """Require every `from_pretrained` and `from_config` of a model or tokenizer to set `trust_remote_code`, or to build from a
    configuration class of transformers itself.
    """
    literal = [
        f"{name}:{keyword.lineno}"
        for name, tree in iterate_modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "trust_remote_code" and isinstance(keyword.value, ast.Constant) and keyword.value.value
    ]
    assert not literal


ROOT = Path(__file__).parents[2]
SECRET = "hunter2OfAnyone4711"
FORMS = {  # how a secret comes with other text
    "an address": f"s3://someone:{SECRET}@bucket/runs",
    "an address as a path": f"https:/someone:{SECRET}@host/rows.jsonl",
    "a query": f"https://host/rows.jsonl?X-Amz-Signature={SECRET}&part=1",
    "an option": f"python judge.py --api-key {SECRET}",
    "a variable": f"srun --export=PASSWORD={SECRET} --ntasks=1",
    "JSON": f'{{"api_key": "{SECRET}"}}',
    "a header": f"Authorization: Bearer {SECRET}",
    "a token of the hub": f"hf_{SECRET}",
}
PLAIN = (  # what looks a little like one
    "q_proj,v_proj", r".*\.layers\.(0|1)\..*", "hf_internal_testing_tiny_random", "organisation/task-classification2024",
    "no pad token: give --tokens 10", "token_loss=1.5", "s3://bucket/runs", "abfs://box@account.dfs.core.windows.net/runs",
    "file:///mnt/share", "https://host/rows.jsonl?part=1", "the password is asked for", "Password: {answer}",
)  # fmt: skip


def test_a_secret_that_a_message_quotes_is_left_out() -> None:
    for text in FORMS.values():
        assert SECRET not in str(RunError(f"could not read {text}"))
        assert SECRET not in get_first_line(OSError(f"can't connect\nto {text}".replace("\n", " ")))
        assert SECRET not in describe_error(OSError(f"refused: {text}"))


def test_what_is_no_secret_is_shown() -> None:
    for text in PLAIN:
        assert redact_secrets(text) == text
        assert format_one_line(text) == text


def iterate_text_settings() -> Iterator[str]:
    """Yield the settings that accept text."""
    for name, info in SelectSettings.model_fields.items():
        if "str" in str(info.annotation) and "Literal" not in str(info.annotation):
            yield name


def test_a_setting_that_holds_a_secret_is_refused() -> None:
    """Settings are in the journal, the report, the card and the trackers."""
    for name in list(iterate_text_settings()):
        for form in ["an address", "an option", "a token of the hub"]:
            with pytest.raises(SettingsError) as caught:
                SelectSettings(**{name: FORMS[form]})
            assert SECRET not in str(caught.value)


READ_ONE = ["decide", "inspect", "status", "report", "plan", "export"]


def test_an_address_with_a_secret_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in [name for name in READ_ONE if name in COMMANDS]:
        for form in ["an address", "an address as a path", "a query", "a token of the hub"]:
            monkeypatch.chdir(tmp_path)
            status, out, err = run([command, FORMS[form]], capsys)
            assert status != 0
            assert SECRET not in out + err


@pytest.mark.parametrize("argument", ["model", "data", "--out"])
def test_a_selection_with_a_secret_in_a_name_is_refused(
    argument: str, model_folder: Path, completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"model": str(model_folder), "data": str(completion_file), "--out": str(tmp_path / "run")}
    arguments[argument] = FORMS["a query"]
    if argument == "--out":
        arguments["data"] = "nowhere.jsonl"
    status, out, err = run(["select", arguments["model"], arguments["data"], "--out", arguments["--out"]], capsys)
    assert status == 2
    assert SECRET not in out + err
    assert not (tmp_path / "run").exists()


def test_a_secret_in_a_trainer_s_error_reaches_no_file_and_no_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let a user's callback, tracker and trainer fail with a secret in their messages."""

    def train(task: Any) -> dict[str, float]:
        if task.rank == 4:
            raise ConnectionError(f"no answer from {FORMS['an address']}; {FORMS['JSON']}")
        return {"loss": 2 + 1 / float(task.rank)}

    def unreachable(*_: object) -> None:
        raise OSError(f"401 for {FORMS['a query']}")

    monkeypatch.setattr(trackers, "_write_mlflow", unreachable)
    monkeypatch.setattr(trackers, "_list_client_errors", lambda _: (OSError,))
    monkeypatch.setattr("rightrank.runs.trackers.find_spec", lambda _: True)
    out = tmp_path / "run"
    ranks = {"ranks": (1, 4, 16), "learning_rates": (1e-3,)}
    select_rank_with(train, out, **ranks, metric="loss", callbacks=[trackers.Trackers(["mlflow"])])
    printed = "".join(capfd.readouterr())
    written = {
        path.name: path.read_text(encoding="utf-8", errors="replace") for path in out.rglob("*") if path.is_file()
    }
    assert "ConnectionError" in written["journal.jsonl"]
    assert "report.html" in written
    assert not [name for name, text in {**written, "printed": printed}.items() if SECRET in text]


def test_a_cluster_is_joined_only_where_it_is_asked_for() -> None:
    assert SelectSettings().ray is None


def test_each_threat_has_tests_that_exist() -> None:
    """Check each named test."""
    section = (ROOT / "SECURITY.md").read_text(encoding="utf-8").split("## Threats")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| **")]
    assert len(rows) >= 6
    every = {
        name: path
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    for row in rows:
        named = re.findall(r"`(?:cluster/\w+\.py::)?(test_\w+)`", row.split("|")[-2])
        assert named, f"{row}: no test"
        assert not [name for name in named if name not in every], row
