"""`fleet`: one rank for all adapters, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from rightrank.plugins.fleet.common_rank import _folder_names
from tests.adapters.adapters import edit_config, load_base, make_adapter, make_base
from tests.commands import run
from tests.tiny import make_tokenizer, write_completions

SMALL = ["--set", "seq_len=32", "--set", "eval_items=12", "--set", "max_steps=4", "--set", "device=cpu"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_base(tmp_path_factory.mktemp("fleet") / "base")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_completions(tmp_path_factory.mktemp("data") / "rows.jsonl", 40)


def logits(base: Path, adapter: Path) -> torch.Tensor:
    model: Any = PeftModel.from_pretrained(load_base(base), str(adapter)).eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(12)[None]).logits
    return found


@pytest.mark.trains
def test_a_fleet_gets_one_rank_and_every_adapter_its_folder(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = [
        make_adapter(base, tmp_path / "wide", rank=8),
        make_adapter(base, tmp_path / "low", "rslora", rank=2),
        make_adapter(base, tmp_path / "single", rank=1),
    ]
    given = ["fleet", *map(str, adapters), "--model", str(base), "--data", str(data), "--margin", "50", *SMALL]
    status, out, err = run([*given, "--out", str(tmp_path / "out"), "--json"], capsys)
    assert status == 0, err
    found = json.loads(out)
    assert found["rank"] == 1
    assert [one["rank_before"] for one in found["adapters"]] == [8, 2, 1]
    assert [[c["rank"] for c in one["candidates"]] for one in found["adapters"]] == [[8, 4, 2, 1], [2, 1], [1]]
    for one in found["adapters"]:
        assert json.loads((Path(one["out"]) / "adapter_config.json").read_text())["r"] == 1
        assert logits(base, Path(one["out"])).isfinite().all()
    assert (found["max_lora_rank"], found["saved_share"]) == (1, 7 / 8)


def test_the_adapters_of_several_runs_are_called_as_their_runs() -> None:
    places = ["first/adapter", "second/adapter", "tasks/third"]
    assert _folder_names([Path(place) for place in places]) == ["first", "second", "third"]
    assert _folder_names([Path("x/a"), Path("y/a")]) == ["x-a", "y-a"]


@pytest.mark.trains
def test_a_margin_of_nothing_keeps_every_rank(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = [make_adapter(base, tmp_path / "a", rank=4), make_adapter(base, tmp_path / "b", rank=2)]
    given = [
        "fleet",
        *map(str, adapters),
        "--model",
        str(base),
        "--data",
        str(data),
        "--data",
        str(data),
        "--margin",
        "1e-9",
        *SMALL,
    ]
    status, text, err = run([*given, "--out", str(tmp_path / "out")], capsys)
    assert status == 0, err
    assert "The 2 adapters need rank 4: a would lose more than the margin below it." in text
    for adapter in adapters:
        assert torch.allclose(logits(base, adapter), logits(base, tmp_path / "out" / adapter.name), atol=1e-4)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("one", "1 adapter given: a fleet has two or more"),
        ("name", "it was trained on 'someone/another-model', not on"),
        ("shape", "it is an adapter of another base"),
        ("nothing", "no module in common with the others"),
        ("data", "3 data files for 2 adapters"),
        ("same", "two adapters are in folders named"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    case: str, message: str, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = [make_adapter(base, tmp_path / "a", rank=4), make_adapter(base, tmp_path / "b", rank=2)]
    files = [data]
    if case == "one":
        adapters = adapters[:1]
    elif case == "name":
        edit_config(adapters[1], base_model_name_or_path="someone/another-model")
    elif case == "shape":
        other = make_base(tmp_path / "gpt2", "conv1d")
        adapters = [
            make_adapter(other, tmp_path / "x", "conv1d"),
            make_adapter(other, tmp_path / "y", "conv1d", rank=4),
        ]
        for adapter in adapters:
            edit_config(adapter, base_model_name_or_path=str(base))
    elif case == "nothing":
        adapters[1] = make_adapter(base, tmp_path / "c", target_modules=["up_proj"])
    elif case == "data":
        files = [data] * 3
    elif case == "same":
        adapters[1] = adapters[0]
    given = ["fleet", *map(str, adapters), "--model", str(base), "--out", str(tmp_path / "out"), *SMALL]
    capsys.readouterr()  # what making the adapters printed
    status, out, err = run([*given, *(word for file in files for word in ("--data", str(file)))], capsys)
    assert (status, out) == (2, ""), err
    assert message in err
    assert len([line for line in err.splitlines() if "Loading weights" not in line]) == 1
    assert not (tmp_path / "out").exists()
