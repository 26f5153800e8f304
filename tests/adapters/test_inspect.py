"""`inspect` of adapters and checkpoints with known updates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rightrank.api.adapters import inspect
from rightrank.cli import main
from tests.adapters.adapters import compute_deltas, load_strictly, load_tensors, make_adapter, make_base, write_tensors

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.mark.parametrize("kind", ["plain", "rslora", "rank_pattern", "alpha_pattern", "dora", "bfloat16"])
def test_values_are_those_of_pefts_own_delta(base: Path, tmp_path: Path, kind: str) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", kind)
    theirs = compute_deltas(load_strictly(base, adapter))
    inspection = inspect(adapter)
    assert {module.name for module in inspection.modules} == theirs.keys()
    for module in inspection.modules:
        dense = torch.linalg.svdvals(theirs[module.name])[: module.rank].numpy()
        ours = np.array(module.singular_values)
        count = min(len(dense), len(ours))
        assert np.allclose(ours[:count], dense[:count], rtol=1e-4, atol=1e-5 * dense[0])
        assert ("dora" in module.flags) == (kind == "dora")


def test_untrained_and_dead_modules_and_useless_patterns_are_reported(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", rank_pattern={"no_such_module": 4})
    tensors = load_tensors(adapter)
    keys = [key for key in tensors if "lora_B" in key]
    tensors[keys[0]].zero_()
    tensors[keys[1]] *= 1e-6
    write_tensors(adapter, tensors)
    inspection = inspect(adapter)
    names = [key.removeprefix("base_model.model.").removesuffix(".lora_B.weight") for key in keys[:2]]
    assert inspection.summary.untrained == names[:1]
    assert inspection.summary.dead == names[1:]
    untrained = next(module for module in inspection.modules if module.name == names[0])
    assert (untrained.stable_rank, untrained.noise_rank, untrained.energy_rank["0.99"]) == (0, 0, 0)
    assert "no_such_module" in inspection.summary.notes[0]


def test_modules_to_save_are_listed(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", "modules_to_save")
    names = inspect(adapter).summary.modules_to_save
    assert "model.norm.weight" in names
    assert all(name.endswith("norm.weight") for name in names)


def write_fine_tuned(base: Path, folder: Path, rank: int) -> Path:
    """Save the base model plus noise and an update of a given rank in every q_proj, and one changed norm."""
    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, value in tensors.items():
        if "q_proj" in name:
            u, v = (torch.linalg.qr(torch.randn(32, rank, generator=generator)).Q for _ in range(2))
            value += 2 * u @ v.T + 0.01 * torch.randn(value.shape, generator=generator)
    tensors["model.norm.weight"] += 0.1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_full_fine_tune_shows_the_rank_that_was_planted(base: Path, tmp_path: Path) -> None:
    inspection = inspect(base=base, finetuned=write_fine_tuned(base, tmp_path / "tuned", 3))
    assert [module.noise_rank for module in inspection.modules] == [3, 3, 3]
    assert all(module.energy_rank["0.95"] == 3 for module in inspection.modules)
    assert inspection.summary.not_matrices == ["model.norm.weight"]
    assert inspection.summary.unchanged > 0


def test_a_sketch_agrees_with_the_exact_values(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rightrank.adapters import spectra

    tuned = write_fine_tuned(base, tmp_path / "tuned", 3)
    exact = spectra.inspect_checkpoints(base, tuned).modules
    monkeypatch.setattr(spectra, "EXACT_SIDE", 16)
    sketched = spectra.inspect_checkpoints(base, tuned, sketch_rank=6).modules
    for exact_module, sketched_module in zip(exact, sketched, strict=True):
        assert "partial_spectrum" in sketched_module.flags
        assert sketched_module.singular_values[:3] == pytest.approx(exact_module.singular_values[:3], rel=1e-3)
        assert sketched_module.frobenius_norm == pytest.approx(exact_module.frobenius_norm, rel=1e-5)
        assert (sketched_module.noise_rank, sketched_module.energy_rank["0.9"], sketched_module.effective_rank) == (
            3,
            3,
            None,
        )


def test_json_is_one_object_with_the_promised_keys(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", "embedding")
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(adapter), "--json"])
    assert stop.value.code == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    promised = {
        *("name", "shape", "rank", "scaling", "singular_values", "stable_rank", "effective_rank"),
        *("energy_rank", "noise_rank", "spectral_norm", "flags"),
    }
    assert all(promised <= module.keys() for module in answer["modules"])
    assert set(answer["modules"][0]["energy_rank"]) == {"0.9", "0.95", "0.99"}
    assert "held-out data decide" in answer["summary"]["sentence"]


def test_the_table_for_a_person(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    with pytest.raises(SystemExit):
        main(["inspect", str(adapter)])
    out = capsys.readouterr().out
    assert "0.self_attn.q_proj" in out
    assert "held-out data decide" in out
