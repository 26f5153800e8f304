"""Bad input gives one clear line and exit status 2, and the output folder is complete or absent."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rightrank.cli import main
from tests.adapters.adapters import edit_config, load_tensors, make_adapter, make_base, write_tensors

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("bad")
    base = make_base(root / "base")
    return base, make_adapter(base, root / "adapter")


@pytest.fixture
def base(original: tuple[Path, Path]) -> Path:
    return original[0]


@pytest.fixture
def adapter(original: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(original[1], tmp_path / "adapter"))


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, captured.out, captured.err


def run_refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("rightrank: ")
    assert err.count("\n") == 1
    return err


def drop_tensor(folder: Path, ending: str) -> None:
    tensors = load_tensors(folder)
    write_tensors(folder, {key: value for key, value in tensors.items() if not key.endswith(ending)})


def write_nan(folder: Path) -> None:
    tensors = load_tensors(folder)
    next(iter(tensors.values()))[0, 0] = torch.nan
    write_tensors(folder, tensors)


def rename_to_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


DAMAGE: dict[str, tuple[Any, str]] = {
    "gone": (shutil.rmtree, "no such folder"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "not an adapter"),
    "config is no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not readable as JSON"),
    "config is a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "one JSON object"),
    "another method": (lambda f: edit_config(f, peft_type="IA3"), "only 'LORA'"),
    "rank of no number": (lambda f: edit_config(f, r="8"), "whole number"),
    "foreign option": (lambda f: edit_config(f, use_qalora=True), "use_qalora"),
    "pickled": (rename_to_pickle, "safe_serialization=True"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "damaged weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 40), "not a readable"),
    "no factors": (lambda f: save_file({"x": torch.zeros(1)}, f / "adapter_model.safetensors"), "no LoRA factors"),
    "a tensor is missing": (lambda f: drop_tensor(f, "layers.1.mlp.down_proj.lora_B.weight"), "no lora_B"),
    "rank denied": (lambda f: edit_config(f, r=4), "rank 8 in the weights and 4"),
    "pattern denied": (lambda f: edit_config(f, rank_pattern={"q_proj": 2}), "and 2 in"),
    "NaN": (write_nan, "NaN"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_adapter(capsys: pytest.CaptureFixture[str], adapter: Path, tmp_path: Path, name: str) -> None:
    damage, word = DAMAGE[name]
    damage(adapter)
    assert word in run_refused(capsys, "inspect", adapter, "--json")
    assert word in run_refused(capsys, "resize", adapter, tmp_path / "out", "--rank", 2, "--json")
    assert [path.name for path in tmp_path.iterdir() if path.name != "adapter"] == []


@pytest.mark.parametrize(
    "changes",
    [
        *({"lora_alpha": value} for value in (0, math.nan, math.inf, True, "16", None, 1e300)),
        *({"r": value} for value in (0, -1, 2.5, True, None, 10**30)),
        *({"rank_pattern": value} for value in ([], {"q_proj": 0}, {"q_proj": "8"}, {"q_proj": None})),
        *({"alpha_pattern": value} for value in ("x", {"q_proj": math.nan}, {"q_proj": True}, {"q_proj": None})),
        *({"target_modules": value} for value in ("(", [5], [])),
        *({name: 5} for name in ("bias", "exclude_modules", "layers_to_transform", "init_lora_weights", "eva_config")),
    ],
    ids=str,
)
def test_a_configuration_ends_in_an_adapter_or_in_one_line(
    capsys: pytest.CaptureFixture[str], adapter: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    edit_config(adapter, **changes)
    status, _, error = run(capsys, "resize", adapter, tmp_path / "out", "--rank", 3)
    assert (status, error.count("\n")) in ((0, 0), (2, 1))
    assert (tmp_path / "out").exists() == (status == 0)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "exactly one of"),
        (["--rank", 2, "--data", "none.jsonl"], "exactly one of"),
        (["--rank", 0], "from 1"),
        (["--rank", 64], "can have"),
        (["--rank", 2, "--margin", 0.1], "only with data"),
        (["--data", "none.jsonl"], "no such file"),
    ],
)
def test_bad_rules(
    capsys: pytest.CaptureFixture[str], adapter: Path, tmp_path: Path, arguments: list[Any], word: str
) -> None:
    assert word in run_refused(capsys, "resize", adapter, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_an_out_that_exists_is_left_alone(capsys: pytest.CaptureFixture[str], adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    assert "already exists" in run_refused(capsys, "resize", adapter, tmp_path / "out", "--rank", 2)
    assert (tmp_path / "out" / "mine").read_text() == "kept"
