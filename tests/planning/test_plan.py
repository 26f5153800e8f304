"""Test `rightrank plan` from the outside: the table, what fits, and one-line errors for bad input."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from rightrank.cli import main
from tests.planning import CONFIGS

pytestmark = pytest.mark.trains

QUICK = ("--batch-size", "2", "--seq-len", "32", "--target-modules", "q_proj,v_proj")


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that contains only config.json."""
    folder = tmp_path_factory.mktemp("plan") / "llama"
    config = CONFIGS["llama"]()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return folder


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    captured = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, captured.out, captured.err


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    status, out, _ = run_command(capsys, *arguments, "--json")
    assert status in (0, 1)
    answer: dict[str, Any] = json.loads(out)
    return answer


def test_changes_fit_when_followed(config_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing fits: exit 1, and changes with which the smallest rank does."""
    step = {"batch_size": 32, "seq_len": 128, "target_modules": "q_proj,v_proj"}
    memory = ("--memory", "565MiB", "--ranks", "2,4")
    status, out, _ = run_command(capsys, str(config_folder), *memory, *assignments(step), "--json")
    answer = json.loads(out)
    assert status == 1
    assert answer["max_rank"] is None
    assert all(row["fits"] is False for row in answer["ranks"])
    assert answer["changes"]
    again = plan_json(capsys, str(config_folder), *memory, *assignments(step | answer["changes"]))
    assert (again["max_rank"] or 0) >= 2
    status, out, _ = run_command(capsys, str(config_folder), *memory, *assignments(step))
    assert "; rank 2: it fits with " in out
    advice = shlex.split(out.partition("it fits with ")[2].splitlines()[0])
    assert plan_json(capsys, str(config_folder), *memory, *assignments(step), *advice)["max_rank"] >= 2


def assignments(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def test_a_smaller_budget_never_allows_a_larger_rank(config_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = []
    for memory in ("24GiB", "560MiB", "540MiB", "1MiB"):
        answer = plan_json(capsys, str(config_folder), "--ranks", "2,16,32", "--memory", memory, *QUICK)
        limits.append(answer["max_rank"] or 0)
    assert limits == sorted(limits, reverse=True)
    assert limits[0] == 32
    assert limits[-1] == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--memory", "24"), "is not a size"),
        (("--memory", "many"), "is not a size"),
        (("--memory", "0GiB"), "is not a size"),
        (("--batch-size", "0"), "batch_size"),
        (("--ranks", "0"), "rank 0 is not allowed"),
        (("--ranks", "two"), "ranks"),
        (("--ranks", "33"), "above the 32 that model.layers.0.self_attn.v_proj"),
        (("--target-modules", "q_proj,nothing"), "no module is named 'nothing'"),
        (("--seq-len", "257"), "larger than the model's 256 positions"),
        (("--set", "dtype=int3"), "dtype"),
        (("--load-in-4bit", "--set", "load_in_8bit=true"), "give one of them"),
        (("--set", "paddin=true"), "did you mean 'padding'"),
        (("--set", "layers_to_transform=9"), "layers_to_transform: got 9"),
        (("--set", "adapters_per_pass=2", "--set", "use_dora=true"), "leave out use_dora"),
        (("--set", "num_labels=3", "--set", "loss=chunked"), "give loss 'full'"),
    ],
)
def test_bad_input_is_one_line(
    config_folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    status, out, error = run_command(capsys, str(config_folder), *QUICK, *arguments)
    assert status == 2
    assert out == ""
    assert expected in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no config.json"),
        ('{"model_type": "no_such_model"}', "transformers does not know this model"),
        ("{", "not readable as JSON"),
        ('{"model_type": "t5"}', "an encoder-decoder"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}', "transformers does not know this model"),
    ],
)
def test_bad_models_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, expected: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    status, _, error = run_command(capsys, str(tmp_path))
    assert status == 2
    assert expected in error
    assert len(error.strip().splitlines()) == 1
