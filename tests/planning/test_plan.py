"""Test `rightrank plan` from the outside: the table, what fits, and one-line errors for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import rightrank
from rightrank.cli import main
from tests.planning import CONFIGS
from tests.tiny import write_adapter

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


def test_a_smaller_budget_never_allows_a_larger_rank(config_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits, statuses = [], []
    for memory in ("24GiB", "560MiB", "540MiB", "1MiB"):
        arguments = ("--ranks", "2,16,32", "--memory", memory, *QUICK, "--json")
        status, out, _ = run_command(capsys, str(config_folder), *arguments)
        limits.append(json.loads(out)["max_rank"] or 0)
        statuses.append(status)
    assert limits == sorted(limits, reverse=True)
    assert (limits[0], limits[-1], statuses[0], statuses[-1]) == (32, 0, 0, 1)


def test_the_plan_names_the_two_learning_rates_to_begin_with(
    config_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run_command(capsys, str(config_folder), *QUICK, "--json")
    assert json.loads(out)["learning_rates"] == [1e-3, 3e-3]  # of a small model
    _, out, _ = run_command(capsys, str(config_folder), *QUICK)
    assert "learning rates to begin with: 0.001 and 0.003" in out


def test_a_path_is_planned_as_its_text_is(config_folder: Path) -> None:
    values = {"ranks": (2,), "batch_size": 2, "seq_len": 32}
    assert rightrank.plan(config_folder, **values) == rightrank.plan(str(config_folder), **values)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ("--memory", "many"),
            "memory_bytes: got 'many'; could not parse value and unit from byte string; give a size with its unit, such as 24GiB",
        ),
        (
            ("--memory", "24"),
            "memory_bytes: got '24'; input should be greater than or equal to 1048576; give a size with its unit, such as 24GiB",
        ),
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


def test_an_adapter_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = run_command(capsys, str(write_adapter(tmp_path / "adapter")))
    assert status == 2
    assert error.endswith("adapter: this is an adapter; give the base model that it was trained on\n")


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
