"""Kinds of adapters on the command line: select, plan, inspect, export, and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import commands
from tests.adapters.kind_checks import CASES, Suite, Trained, make_model
from tests.tiny import make_tokenizer, write_completions

pytestmark = pytest.mark.trains
Run = Callable[..., tuple[int, str, str]]
FAST = (
    "--goal", "adapter", "--ranks", "1,4", "--learning-rates", "1e-2", "--max-steps", "2", "--batch-size", "4",
    "--seq-len", "32", "--max-eval-examples", "8", "--margin", "5", "--device", "cpu",
)  # fmt: skip
EXPERTS = "target_parameters=mlp.experts.gate_up_proj,mlp.experts.down_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Llama and a Mixtral, with data."""
    models = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    for name in ("llama", "mixtral"):
        make_model(name, len(tokenizer)).save_pretrained(models / name)
        tokenizer.save_pretrained(models / name)
    write_completions(models / "data.jsonl", 80)
    return models


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: commands.run(list(arguments), capsys)


def select(run: Run, folder: Path, model: str, out: Path, *more: str) -> tuple[int, str, str]:
    return run("select", str(folder / model), str(folder / "data.jsonl"), "--out", str(out), *FAST, *more)


def test_experts_are_selected_with_their_own_ranks(run: Run, folder: Path, tmp_path: Path) -> None:
    more = ("--set", "target_modules=q_proj", "--set", EXPERTS, "--json")
    status, out, err = select(run, folder, "mixtral", tmp_path / "run", *more)
    assert status == 0, err
    adapter = Path(json.loads(out)["adapter"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    status, out, _ = run("inspect", str(adapter), "--json")
    modules = {module["name"]: module for module in json.loads(out)["modules"]}
    assert modules["model.layers.0.mlp.experts.gate_up_proj.3"]["kind"] == "expert"
    status, out, err = run(
        "plan", str(folder / "mixtral"), "--ranks", "4,8", "--target-modules", "q_proj", "--seq-len", "32",
        "--set", "dtype=float32", "--set", EXPERTS, "--json",
    )  # fmt: skip
    assert status == 0, err
    four, eight = (row["trainable_parameters"] for row in json.loads(out)["ranks"])
    experts = 4 * 2 * 4 * ((32 + 96) + (48 + 32))  # rank 4 in each of two layers' four experts
    assert (four, eight) == (2 * 4 * 64 + experts, 2 * 8 * 64 + 2 * experts)


@pytest.mark.parametrize("use_dora", ["false", "true"])
def test_a_slot_of_a_server_is_named_for_plain_lora_only(use_dora: str, run: Run, folder: Path, tmp_path: Path) -> None:
    more = ("--ranks", "6", "--margin", "1e-9", "--set", f"use_dora={use_dora}")
    status, out, err = select(run, folder, "llama", tmp_path / "run", *more)
    assert status == 0, err
    assert ("same slot as rank 8 on vLLM" in out) is (use_dora == "false")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train an adapter on the experts of a Mixtral."""
    return Suite.of(CASES["experts (Mixtral)"], tmp_path_factory.mktemp("experts")).trained


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")  # PEFT's remark that it can't be merged
@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("mixtral", ("target_parameters=mlp.experts.up",), "target_parameters: no parameter is named 'mlp.experts.up'"),
        ("llama", ("target_parameters=experts.w1",), "the model's expert parameters are: none"),
        ("mixtral", ("use_dora=true", EXPERTS), "does not work with use_dora=True"),
        ("mixtral", ("lora_dropout=0.1", EXPERTS), "does not work with lora_dropout != 0"),
        ("llama", ("use_dora=true", 'peft_options={"lora_bias": true}'), "lora_bias=True is not supported for DoRA"),
        ("llama", ("kasa_config=1",), "unknown setting 'kasa_config'"),
        ("llama", ('peft_options={"lora_bias": true}',), "goal 'adapter' needs adapters that can be truncated"),
    ],
)  # fmt: skip
def test_what_a_kind_refuses_is_one_line(
    run: Run, model: str, settings: tuple[str, ...], message: str, folder: Path, tmp_path: Path
) -> None:
    options = [word for setting_text in settings for word in ("--set", setting_text)]
    status, _, err = select(run, folder, model, tmp_path / "run", "--target-modules", "q_proj", *options)
    assert status == 2, err
    last = err.strip().splitlines()[-1]
    assert message in last
    assert "Traceback" not in err
