"""`compare`: two adapters on the same examples."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rightrank import compare, select_rank
from rightrank.cli import main
from rightrank.data.splits import load_data
from rightrank.schema.errors import DataError, ModelError
from rightrank.schema.events import Listener
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, Trial
from rightrank.training.loop import TrialFolders
from tests.adapters.adapters import edit_config
from tests.helpers import make_runtime, run_trial
from tests.tiny import build_small_settings, write_jsonl

SETTINGS = {"seq_len": 32, "device": "cpu"}
OPTIONS = ["--set", "seq_len=32", "--set", "device=cpu"]


@pytest.fixture(scope="module")
def trained(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train an adapter that learned something."""
    root = tmp_path_factory.mktemp("compared")
    runtime = make_runtime(model_folder, completion_file, build_small_settings(max_steps=60), root / "cache")
    arm = Arm(rank=4, learning_rate=1e-2, lora_alpha=32.0, seed=0, steps=60)
    run_trial(runtime, Trial(trial_id="t", arm=arm), None, TrialFolders(root / "c", root / "adapter"), Listener())
    return root / "adapter"


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["compare", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out + captured.err


def test_an_adapter_is_not_worse_than_itself(trained: Path, model_folder: Path, completion_file: Path) -> None:
    comparison = compare(
        trained, trained, model=str(model_folder), data=completion_file, settings=SelectSettings(**SETTINGS)
    )
    assert (comparison.verdict, comparison.difference, comparison.difference_high) == ("not_worse", 0.0, 0.0)
    assert comparison.sentence.startswith(f"B ({trained}) against A ({trained})")  # two folders of one name
    assert comparison.examples == len({line for line in completion_file.read_text().splitlines() if line})


def test_rows_that_a_run_trained_on_are_left_out(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    settings = build_small_settings(max_steps=2, goal="adapter")
    run = select_rank(str(model_folder), completion_file, tmp_path / "run", settings=settings).run
    train = [example.example_id for example in load_data(completion_file, settings).examples["train"]]
    rows = len({line for line in completion_file.read_text().splitlines() if line})
    arguments: dict[str, Any] = {"model": str(model_folder), "settings": SelectSettings(**SETTINGS)}
    comparison = compare("base", run / "adapter", data=completion_file, **arguments)
    assert (comparison.trained_on, comparison.examples) == (len(train), rows - len(train))
    assert f"({len(train)} more are training examples of A or B)" in comparison.sentence
    all_rows = [json.loads(line) for line in completion_file.read_text().splitlines()]
    training_examples = load_data(completion_file, settings).examples["train"]
    only = write_jsonl(
        tmp_path / "seen.jsonl",
        [row for row in all_rows if row in [dict(training_example.content) for training_example in training_examples]],
    )
    with pytest.raises(DataError, match="are among the training examples of the adapters"):
        compare("base", run / "adapter", data=only, **arguments)


def test_exit_status_and_json(
    trained: Path, model_folder: Path, completion_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", model_folder, "--data", completion_file, "--margin", "0.05", *OPTIONS]
    code, out = run(capsys, trained, "base", *common, "--json")
    answer = json.loads(out)
    assert code == 3
    assert answer["verdict"] == "worse"
    assert answer["difference_low"] > 0.05
    assert {"difference", "difference_high", "examples"} <= answer.keys()
    code, out = run(capsys, "base", trained, *common)
    assert code == 0
    assert "not worse" in out
    assert out.count("\n") == 1
    tight = abs(answer["difference"])  # a margin at the very difference: the bounds lie on both sides of it
    code, out = run(capsys, trained, "base", *common, "--margin", tight, "--json")
    assert code == 4
    undecided = json.loads(out)
    assert undecided["verdict"] == "cannot_tell"
    assert undecided["difference_low"] < tight < undecided["difference_high"]


def test_a_whole_model_can_be_a_side(model_folder: Path, completion_file: Path) -> None:
    settings = SelectSettings(**SETTINGS)
    comparison = compare(model_folder, "base", model=str(model_folder), data=completion_file, settings=settings)
    assert comparison.difference == pytest.approx(0.0, abs=1e-6)


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "only pickled weights"),
        (lambda folder: (folder / WEIGHTS).unlink(), "there is no adapter_model.safetensors"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 40), "not a readable safetensors file"),
        (lambda folder: (folder / CONFIG).write_text("{"), "not readable as JSON"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "one JSON object"),
        (lambda folder: edit_config(folder, r=3), "PEFT cannot attach it"),
        (lambda folder: edit_config(folder, r="x"), "PEFT cannot attach it"),
        (lambda folder: edit_config(folder, init_lora_weights="OLoRA"), "'OLoRA', which changes the base model"),
        (lambda folder: edit_config(folder, peft_type="NONE"), "PEFT has no peft_type 'NONE'"),
    ],
)
def test_a_damaged_side_is_one_line(
    damage: Callable[[Path], object],
    words: str,
    trained: Path,
    model_folder: Path,
    completion_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged = Path(shutil.copytree(trained, tmp_path / "side"))
    damage(damaged)
    code, out = run(capsys, "base", damaged, "--model", model_folder, "--data", completion_file, *OPTIONS)
    assert words in out
    assert code == 2
    assert out.splitlines()[-1].startswith("rightrank: ")


def test_losses_per_token_of_two_tokenizers_are_not_compared(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(model_folder, tmp_path / "other"))
    merged = json.loads((changed / "tokenizer.json").read_text())
    merged["model"]["merges"] = merged["model"]["merges"][:20]
    (changed / "tokenizer.json").write_text(json.dumps(merged))
    with pytest.raises(ModelError, match="different tokenizers") as caught:
        compare(
            model_folder, changed, model=str(model_folder), data=completion_file, settings=SelectSettings(**SETTINGS)
        )
    assert "\n" not in str(caught.value)
