"""`rightrank plan` from the outside: the table, what fits, bad input in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rightrank.cli import main
from rightrank.schema.settings import make_settings, parse_bytes
from rightrank.search.strategies import make_strategy
from tests.plugins.plan import CONFIGS

pytestmark = pytest.mark.trains

QUICK = ("--batch-size", "2", "--seq-len", "32", "--target-modules", "q_proj,v_proj")


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but config.json."""
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


def test_json_holds_what_the_contract_names(config_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = plan_json(capsys, str(config_folder), "--ranks", "2,8", "--memory", "24GiB", *QUICK)
    assert answer["max_rank"] == 8
    assert [row["rank"] for row in answer["ranks"]] == [2, 8]
    for row in answer["ranks"]:
        assert row["fits"] is True
        assert row["trainable_parameters"] == row["rank"] * 6 * ((64 + 64) + (64 + 32))
        assert row["peak_reserved_bytes"] >= row["peak_bytes"] == sum(row["components"].values())
        assert row["adapter_bytes"] > 4 * row["trainable_parameters"]
    assert answer["sources"]["peak_bytes"] == "traced"
    assert {price["axis"].split()[0] for price in answer["prices"]} == {
        "rank",
        "batch_size",
        "seq_len",
        "target_modules",
    }


def test_text_names_peak_and_budget(config_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run_command(capsys, str(config_folder), "--ranks", "4", "--memory", "24GiB", *QUICK)
    assert status == 0
    assert "largest requested rank that fits in 24.00 GiB: 4" in out
    assert "at its peak" in out


def test_cheapest_changes_fit_when_followed(config_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing fits: exit 1, a list of changes; with those changes it fits."""
    memory = ("--memory", "565MiB", "--batch-size", "32", "--seq-len", "128", "--target-modules", "q_proj,v_proj")
    status, out, _ = run_command(capsys, str(config_folder), "--ranks", "2,4", *memory, "--json")
    answer = json.loads(out)
    assert status == 1
    assert answer["max_rank"] is None
    assert all(row["fits"] is False for row in answer["ranks"])
    assert answer["changes"]
    assert answer["changes"][-1]["fits"]
    followed = [f"{change['setting']}={change['value']}" for change in answer["changes"]]
    named = [part for pair in followed for part in ("--set", pair)]
    kept = [*memory] if "batch_size" not in out.split('"changes"')[1].split('"limits"')[0] else ["--memory", "565MiB"]
    arguments = [*kept, *([] if kept == [*memory] else ["--seq-len", "128", "--target-modules", "q_proj,v_proj"])]
    again = plan_json(capsys, str(config_folder), "--ranks", "2", *arguments, *named)
    assert again["max_rank"] == 2


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
        (("--memory", "0GiB"), "is zero"),
        (("--batch-size", "0"), "batch_size"),
        (("--ranks", "0"), "rank 0 is not allowed"),
        (("--ranks", "two"), "ranks"),
        (("--ranks", "33"), "above the 32 that model.layers.0.self_attn.v_proj"),
        (("--target-modules", "q_proj,nothing"), "no module is named 'nothing'"),
        (("--seq-len", "257"), "above the model's 256 positions"),
        (("--dtype", "int3"), "dtype"),
        (("--load-in-4bit", "--load-in-8bit"), "give one of them"),
        (("--set", "rank_patern=x"), "did you mean 'rank_pattern'"),
        (("--layers-to-transform", "9"), "layers_to_transform: got 9"),
        (("--strategy", "brackt", "--max-steps", "9"), "did you mean 'bracket'"),
        (("--strategy", "bracket"), "give max_steps"),
        (("--ranks", "4", "--strategy", "bracket", "--max-steps", "9"), "a comparison needs two or more"),
        (("--adapters-per-pass", "2", "--use-dora"), "leave out use_dora"),
        (("--set", "num_labels=3", "--loss", "chunked"), "give loss 'full'"),
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
        ('{"model_type": "no_such_model"}', "transformers knows no such model"),
        ("{", "not readable as JSON"),
        ('{"model_type": "t5"}', "an encoder-decoder"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}', "transformers knows no such model"),
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


def test_sizes() -> None:
    assert parse_bytes("24GiB") == 24 * 2**30
    assert parse_bytes(" 1.5 GB ") == 1_500_000_000
    assert parse_bytes("80gib") == 80 * 2**30


def test_a_selection_is_its_strategy_s_trainings_and_evaluations(
    config_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (str(config_folder), "--ranks", "2,4,8", "--max-steps", "50", *QUICK, "--strategy")
    grid, bracket = (plan_json(capsys, *arguments, name)["selection"] for name in ("grid", "bracket"))
    flops = [row["flops"] for row in grid["ranks"]]
    evaluation = grid["evaluation_flops"]
    strategy = make_strategy(make_settings({"strategy": "grid", "ranks": (2, 4, 8)}), 50)
    truncated = strategy.expected_arms() - 1 - 9, strategy.max_arms() - 1 - 9  # evaluated and not trained
    assert 0 < truncated[0] <= truncated[1]
    assert grid["expected"]["flops"] == pytest.approx(3 * sum(flops) + (4 + truncated[0]) * evaluation)
    most = 9 * flops[-1] + (4 + truncated[1]) * evaluation  # truncations evaluated at the largest rank take more
    assert most < grid["most"]["flops"] < most + 0.05 * truncated[1] * evaluation
    cost = make_strategy(make_settings({"strategy": "bracket", "ranks": (2, 4, 8)}), 50).cost()
    assert (bracket["expected"]["trainings"], bracket["most"]["trainings"]) == (cost.expected, cost.maximum)
    assert bracket["expected"]["trainings"] < min(bracket["most"]["trainings"], grid["expected"]["trainings"])
    assert flops[0] > 50 * plan_json(capsys, *arguments, "grid")["ranks"][0]["flops_per_step"]  # evaluations are in it


def test_frozen_blocks_are_counted_once(config_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (str(config_folder), "--ranks", "2,4", *QUICK, "--strategy", "grid", "--max-steps", "50")
    whole = plan_json(capsys, *arguments)["selection"]
    tail = plan_json(capsys, *arguments, "--layers-to-transform", "4,5")["selection"]
    assert whole["prefix_flops"] == 0 < tail["prefix_flops"]
    assert tail["ranks"][0]["flops"] < whole["ranks"][0]["flops"] / 2


def test_text_shows_time_and_error(config_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--ranks", "2,4", *QUICK, "--strategy", "bracket", "--max-steps", "50")
    status, out, _ = run_command(capsys, str(config_folder), *options)
    assert status == 0
    assert "selection by bracket: about" in out
    assert "at most" in out
    assert "`rightrank select MODEL DATA --dry-run` measures its time on this device" in out
    assert "±5%: assumed: not measured on a GPU" in out


def test_a_plan_shows_both_loops(config_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The column `in select` is the plan of the same step with the settings of `select`."""
    step = [str(config_folder), "--ranks", "1,4", "--seq-len", "20", "--batch-size", "4"]
    both = plan_json(capsys, *step)["ranks"]
    loop = ["--loss", "chunked", "--optim", "adamw_fused", "--set", "packed=true"]
    alone = plan_json(capsys, *step, *loop)["ranks"]
    assert [row["select_peak_bytes"] for row in both] == [row["peak_bytes"] for row in alone]
    assert [row["select_needed_bytes"] for row in both] == [row["needed_bytes"] for row in alone]
    assert all(row["select_peak_bytes"] < row["peak_bytes"] for row in both)
