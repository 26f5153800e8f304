"""A full fine-tune as an adapter: the linear modules are represented, and the error is that of the whole difference."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rightrank.cli import main
from rightrank.probe import checkpoint_spectra, extract
from tests.probe.adapters import deltas, load_base, load_strictly, logits, make_base

pytestmark = pytest.mark.trains


def fine_tuned(base: Path, folder: Path, rank: int, noise: float, norm_too: bool = False) -> Path:
    """Planted updates of that rank in every matrix of a layer."""
    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, value in tensors.items():
        if value.dim() == 2 and any(part in name for part in ("proj", "c_attn", "c_fc")):
            u, v = (torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q for size in value.shape)
            value += u @ v.T + noise * torch.randn(value.shape, generator=generator)
        if norm_too and name == "model.norm.weight":
            value += 0.1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def answer_of(capsys: pytest.CaptureFixture[str], *arguments: Any, status: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["extract", *(str(argument) for argument in arguments), "--json"])
    captured = capsys.readouterr()
    assert stop.value.code == status, captured.err
    return dict(json.loads(captured.out)) if status == 0 else {"error": captured.err}


@pytest.mark.parametrize("kind", ["plain", "conv1d"])
def test_an_update_of_low_rank_is_extracted_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    base = make_base(tmp_path / "base", kind)
    tuned = fine_tuned(base, tmp_path / "tuned", 3, noise=0)
    answer = answer_of(capsys, base, tuned, tmp_path / "out", "--energy", 0.9999)
    assert answer["rank"] == 3
    assert answer["relative_delta_error"] < 1e-5
    ours, theirs = logits(load_strictly(base, tmp_path / "out")), logits(load_base(tuned))
    assert not torch.allclose(theirs, logits(load_base(base)), atol=0.05)
    assert torch.allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize("exact_side", [1024, 8], ids=["exact", "sketched"])
@pytest.mark.parametrize("rule", [["--rank", 2], ["--energy", 0.6], ["--noise"]], ids=["rank", "energy", "noise"])
def test_the_reported_error_is_of_the_whole_difference(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    exact_side: int,
    rule: list[Any],
) -> None:
    for module in (checkpoint_spectra, extract):
        monkeypatch.setattr(module, "EXACT_SIDE", exact_side)
    base = make_base(tmp_path / "base")
    tuned = fine_tuned(base, tmp_path / "tuned", 3, noise=0.02, norm_too=True)
    answer = answer_of(capsys, base, tuned, tmp_path / "out", "--max-rank", 8, *rule)
    found = deltas(load_strictly(base, tmp_path / "out"))
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    truth = {name: (after[f"{name}.weight"].double() - before[f"{name}.weight"].double()) for name in found}
    error = math.hypot(*(float((found[name] - truth[name]).norm()) for name in found))
    whole = math.hypot(*(float(value.norm()) for value in truth.values()))
    assert answer["relative_delta_error"] == pytest.approx(error / whole, abs=1e-4)
    assert any("model.norm.weight" in note for note in answer["notes"])
    if rule == ["--noise"]:
        assert answer["rank"] == 3


def test_extraction_measured_on_data(
    model_folder: Path, completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = fine_tuned(model_folder, tmp_path / "tuned", 2, noise=0)
    sets = ["--set", "seq_len=32", "--set", "eval_items=12"]
    answer = answer_of(
        capsys, model_folder, tuned, tmp_path / "out", "--data", completion_file, "--max-rank", 8, "--margin", 5, *sets
    )
    assert answer["answer"]["rank"] == answer["rank"]
    load_strictly(model_folder, tmp_path / "out")


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path / "base")
    tuned = fine_tuned(base, tmp_path / "tuned", 2, noise=0)
    for arguments, word in (
        ([base, tuned, tmp_path / "out"], "exactly one of"),
        ([base, tuned, tmp_path / "out", "--rank", 500], "--max-rank"),
        ([base, tuned, tmp_path / "out", "--energy", 2], "up to 1"),
        ([base, base, tmp_path / "out", "--rank", 2], "no linear module differs"),
        ([base, tmp_path / "none", tmp_path / "out", "--rank", 2], "no such folder"),
        ([base, tuned, base, "--rank", 2], "exists already"),
    ):
        error = answer_of(capsys, *arguments, status=2)["error"]
        assert word in error
        assert not (tmp_path / "out").exists()
