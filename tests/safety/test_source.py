"""Test the package's syntax trees for what its code must never do."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "rightrank"
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "multiprocessing"}
# Between the driver and the workers that it started itself, and never from a file.
MAY_PICKLE = {"plugins/cluster/processes.py", "plugins/cluster/worker.py"}
FORBIDDEN_CALLS = {
    "torch.load", "torch.hub.load", "np.load", "numpy.load", "pickle.load", "pickle.loads", "yaml.unsafe_load",
    "yaml.full_load", "os.system", "os.popen", "eval", "exec", "compile", "__import__", "tempfile.mktemp",
    "tarfile.open", "zipfile.ZipFile", "gzip.open", "shutil.unpack_archive", "datasets.load_dataset",
}  # fmt: skip
SECRET_NAMES = ("_TOKEN", "SECRET", "PASSWORD", "API_KEY", "CREDENTIAL")


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


@pytest.mark.parametrize("address", ["0.0.0.0", "[::]"])
def test_nothing_listens_on_every_interface(address: str) -> None:
    assert not [name for name in SOURCE.rglob("*.py") if address in name.read_text(encoding="utf-8")]


def test_no_secret_is_asked_of_the_environment() -> None:
    names = [
        (name, node.value)
        for name, tree in iterate_modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isupper()
        if any(word in node.value for word in SECRET_NAMES)
    ]
    assert not names
