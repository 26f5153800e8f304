"""Test invalid input on the command line: one clear line, exit status 2 (or 1 after the start), and no lost results."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.commands import build_select_arguments, run

pytestmark = pytest.mark.trains

SETTINGS: list[tuple[list[str], str]] = [
    (["--ranks", "0,4"], r"rank 0 is not allowed: ranks are integers from 1"),
    (["--ranks", "-2"], r"rank -2 is not allowed"),
    (["--ranks", "4.5"], r"ranks: got '4\.5'; input should be a valid integer"),
    (["--ranks", "four"], r"ranks: got 'four'"),
    (["--ranks", ""], r"ranks: got \[\]; give at least one value, each of them once"),
    (["--ranks", "4,4"], r"ranks: got \[4, 4\]; give at least one value, each of them once"),
    (["--ranks", "4,64"], r"rank 64 is above the \d+ that model\.layers\.0\.self_attn\.\w+_proj"),
    (["--learning-rates", "0"], r"learning rate 0 is not allowed"),
    (["--learning-rates", "-1e-4"], r"learning rate -0\.0001 is not allowed"),
    (["--learning-rates", "nan"], r"learning_rates: got 'nan'"),
    (["--seeds", "-1"], r"seed -1 is not allowed"),
    (["--margin", "0"], r"margin: got '0'; give a share of the gain such as 1%"),
    (["--max-steps", "0"], r"max_steps: got '0'"),
    (["--batch-size", "0"], r"batch_size: got '0'"),
    (
        ["--batch-size", "100000"],
        r"examples for the train split, at least 100000 needed.*; give more rows that differ, a smaller --batch-size, or",
    ),
    (["--lora-alpha", "-1"], r"lora_alpha: got '-1'; input should be greater than 0"),
    (["--set", "dtype=int3"], r"dtype: got 'int3'; input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
    (["--device", "tpu9"], r"device 'tpu9' is unknown"),
    (["--device", "cuda:7"], r"device 'cuda:7' does not exist; this machine has cpu"),
    (["--strategy", "gird"], r"unknown strategy 'gird' \(did you mean 'grid'\?\)"),
    (["--strategy", "upward", "--goal", "adapter"], r"strategy 'upward' starts at the smallest rank"),
    (["--metric", "accuracy"], r"metric 'accuracy' needs `text` and `label`"),
    (["--target-modules", "q_proj,v_prj"], r"no module is named 'v_prj'; the model's linear modules are: .*v_proj"),
    (["--target-modules", "all-linear,q_proj"], r"'all-linear' beside other names"),
    (["--set", "layers_to_transform=7"], r"layers_to_transform: got 7; the model's layers are 0 to 2"),
    (["--set", "lora_dropout"], r"give NAME=VALUE"),
    (["--set", "lora_dropout=2"], r"lora_dropout: got '2'; input should be less than 1"),
    (["--set", "num_train_epochs=1"], r"max_steps and num_train_epochs were both given"),
    (["--set", f"num_evaluations={'9' * 400}"], r"num_evaluations: got 9+…; integers are at most 2\*\*53"),
    (["--ranks", f"4,{10**30}"], r"ranks: got 10+; integers are at most 2\*\*53"),
    (["--config", "missing.yaml"], r"missing\.yaml: can't read it"),
    (["--no-such-option"], r"No such option"),
    (["--device", "gpu"], r"device 'gpu' is unknown; give auto, cpu, cuda, cuda:1 or mps$"),
    (["--ranks", "4,x"], r"ranks: got 'x'; input should be a valid integer$"),
]


def require_refusal(status: int, out: str, err: str, message: str) -> None:
    import re

    lines = [line for line in err.splitlines() if line.startswith("rightrank:")]
    assert status == 2, err
    assert out == ""
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert re.search(message, lines[0]), lines[0]


@pytest.mark.parametrize(("options", "message"), SETTINGS, ids=[" ".join(case[0]) for case in SETTINGS])
def test_settings(
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    out = tmp_path / "run"
    require_refusal(*run(build_select_arguments(model_folder, completion_file, out, *options), capsys), message)
    assert not (out / "journal.jsonl").exists()


def copy_broken_model(model_folder: Path, target: Path, *missing: str) -> Path:
    shutil.copytree(model_folder, target)
    for pattern in missing:
        for path in target.glob(pattern):
            path.unlink()
    return target


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["*.safetensors"], r"no weights \(\*\.safetensors\) in the folder"),
        (["config.json"], r"no config\.json in the folder"),
        (["tokenizer*", "special_tokens_map.json", "chat_template*"], r"no usable tokenizer"),
    ],
    ids=["weights", "config", "tokenizer"],
)
def test_model_folders(
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    missing: list[str],
    message: str,
) -> None:
    model = copy_broken_model(model_folder, tmp_path / "model", *missing)
    require_refusal(*run(build_select_arguments(model, completion_file, tmp_path / "run"), capsys), message)


def test_unknown_architecture(
    model_folder: Path, completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy_broken_model(model_folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    require_refusal(
        *run(build_select_arguments(model, completion_file, tmp_path / "run"), capsys),
        r"transformers does not know this model",
    )


@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c", "model.bin"])
def test_missing_models(completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    if name == "model.bin":
        name = str(tmp_path / name)
        Path(name).write_bytes(b"x")
    require_refusal(
        *run(build_select_arguments(Path(name), completion_file, tmp_path / "run"), capsys),
        r"no such folder|must end in \.gguf",
    )


def test_out_is_a_file(
    model_folder: Path, completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    require_refusal(
        *run(build_select_arguments(model_folder, completion_file, tmp_path / "file"), capsys),
        "this is a file, not a folder",
    )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/proc/mounts").exists(), reason="mounting a small disk needs root on Linux"
)
def test_a_full_disk_is_reported_and_the_run_resumes(
    model_folder: Path, completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(small)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        status, _, err = run(build_select_arguments(model_folder, completion_file, small / "run"), capsys)
        assert status == 1, err
        assert err.count("rightrank:") == 1
        assert "run the same command again" in err
        assert "Traceback" not in err
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        assert run(build_select_arguments(model_folder, completion_file, small / "run"), capsys)[0] == 0
    finally:
        gc.collect()  # mapped files are closed when their arrays are deleted
        subprocess.run(["umount", str(small)], check=True)
