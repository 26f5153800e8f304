"""`resize`: what it says of an adapter without a gain, of a base that is not here, and of what it keeps beside the factors."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from rightrank import resize
from rightrank.decision.adapter import SEARCH
from rightrank.models.adapter_reader import open_adapter
from rightrank.schema.settings import SelectSettings
from tests.adapters.adapters import (
    edit_config,
    make_adapter,
    make_base,
    rewrite,
    tensors_of,
)
from tests.commands import COMMANDS, run
from tests.tiny import make_tokenizer, write_completions

pytestmark = pytest.mark.trains

SMALL = ["--set", "seq_len=32", "--set", "device=cpu"]
SETTINGS = {"seq_len": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_base(tmp_path_factory.mktemp("bases") / "base")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_completions(tmp_path_factory.mktemp("data") / "rows.jsonl", 30)


def test_an_adapter_that_learned_nothing_has_no_gain(base: Path, data: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", rank=4)
    rewrite(adapter, {key: value * ("lora_B" not in key) for key, value in tensors_of(adapter).items()})
    found = resize(adapter, tmp_path / "out", data=data, ranks=(1,), settings=SelectSettings(**SETTINGS))
    assert found.answer is not None
    assert found.no_gain
    values = {one.rank: one.value for one in found.held_out}
    assert found.answer.sentence.startswith(
        f"No gain: the base alone has {values[0]:.4f} and the adapter {values[4]:.4f}"
    )
    changed = make_adapter(base, tmp_path / "changed", rank=4)
    found = resize(changed, tmp_path / "out2", data=data, ranks=(1,), margin=1e-6, settings=SelectSettings(**SETTINGS))
    assert not found.no_gain


def test_advice_is_a_command_that_select_takes(base: Path, data: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", rank=4)
    found = resize(adapter, tmp_path / "out", data=data, margin=1e-9, settings=SelectSettings(**SETTINGS))
    assert found.answer is not None
    notes = [note for note in found.answer.notes if "direct training" in note]
    assert notes
    assert SEARCH not in notes[0]
    words = shlex.split(notes[0].partition("(")[2].partition(")")[0])
    assert words[:2] == ["rightrank", "select"]
    known = {option for parameter in COMMANDS["select"].params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
    assert words[words.index("--ranks") + 1] == "1,2,4"


def test_a_base_that_is_not_found_from_here_is_one_line(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", rank=4)
    edit_config(adapter, base_model_name_or_path="models/base")
    capsys.readouterr()
    status, out, err = run(["resize", str(adapter), str(tmp_path / "out"), "--data", str(data), *SMALL], capsys)
    assert (status, out) == (2, "")
    assert f"names the base 'models/base', which is not found from {Path.cwd()}; give it with --base MODEL" in err
    given = ["--data", str(data), "--margin", "9", "--base", str(base), "--json", *SMALL]
    assert (
        run(["resize", str(adapter), str(tmp_path / "out"), *given], capsys)[0] == 0
    )  # the last part is that of the name


def test_a_rank_that_is_shared_out_is_said_with_the_range_of_the_modules(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", rank=8)
    capsys.readouterr()
    given = ["--data", str(data), "--ranks", "2", "--margin", "9", *SMALL]
    assert run(["resize", str(adapter), str(tmp_path / "out"), *given], capsys)[0] == 0
    status, out, _ = run(["resize", str(adapter), str(tmp_path / "again"), *given], capsys)
    ranks = [module.rank for module in open_adapter(tmp_path / "out").modules]
    words = f"rank 2 (modules from {min(ranks)} to {max(ranks)})"
    assert status == 0
    assert min(ranks) < max(ranks)
    assert out.startswith(f"{tmp_path / 'again'}: {words} (by data")
    assert f"note: {words}: the parameters of rank 2 are shared out" in out
    resize(adapter, tmp_path / "uniform", rank=2)
    assert open_adapter(tmp_path / "uniform").rank_text == "2"


def test_what_lies_beside_the_factors_is_counted_and_kept(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", "modules_to_save", rank=4)
    make_tokenizer().save_pretrained(adapter)
    found = resize(adapter, tmp_path / "out", rank=2)
    whole = open_adapter(adapter).other_keys
    count = sum(tensors_of(adapter)[key].numel() for key in whole)
    assert f"kept as they are: {len(whole)} tensors trained whole, {count:,} parameters" in found.notes
    assert set(whole) <= set(tensors_of(tmp_path / "out"))
    for file in adapter.glob("*token*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_folder_of_named_adapters_names_them(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_adapter(base, tmp_path / "all" / "default", rank=4)
    capsys.readouterr()
    assert run(["resize", str(tmp_path / "all"), str(tmp_path / "only"), "--rank", "2"], capsys)[0] == 0
    status, _, err = run(["inspect", str(tmp_path / "all")], capsys)
    assert status == 2
    assert f"give {tmp_path / 'all' / 'default'}, the adapter in it" in err
    make_adapter(base, tmp_path / "all" / "second", rank=4)
    capsys.readouterr()
    status, _, err = run(["inspect", str(tmp_path / "all")], capsys)
    assert status == 2
    assert f"give one of the adapters in it: {tmp_path / 'all' / 'default'}, {tmp_path / 'all' / 'second'}" in err
    given = ["resize", str(tmp_path / "all" / "second"), str(tmp_path / "out"), "--rank", "2", "--json"]
    status, out, _ = run(given, capsys)
    assert (status, json.loads(out)["rank"]) == (0, 2)
