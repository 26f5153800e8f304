"""`inspect` of adapters with known updates, and the mathematics of spectra against dense decompositions and known laws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rightrank.adapters import spectra
from rightrank.api.adapters import inspect
from rightrank.cli import main
from tests.adapters.adapters import load_tensors, make_adapter, make_base, write_tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.mark.trains
def test_untrained_modules_are_reported(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    tensors = load_tensors(adapter)
    key = next(key for key in tensors if "lora_B" in key)
    tensors[key].zero_()
    write_tensors(adapter, tensors)
    inspection = inspect(adapter)
    name = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
    assert inspection.summary.untrained == [name]
    untrained = next(module for module in inspection.modules if module.name == name)
    assert (untrained.stable_rank, untrained.noise_rank, untrained.energy_rank["0.99"]) == (0, 0, 0)


@pytest.mark.trains
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


def test_the_hard_threshold_is_gavish_and_donohos() -> None:
    """Their paper's constant for square matrices: 2.858 times the median."""
    beside_the_median = [np.concatenate([[factor], np.ones(98)]) for factor in (2.853, 2.863)]
    assert [spectra.compute_hard_threshold_rank(s) for s in beside_the_median] == [0, 1]


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_a_planted_rank_is_found_in_noise(rank: int) -> None:
    generator = np.random.default_rng(rank)
    u, v = (np.linalg.qr(generator.standard_normal((60, 8)))[0][:, :rank] for _ in range(2))
    noisy = 5 * np.sqrt(60) * u @ v.T + generator.standard_normal((60, 60))
    assert spectra.compute_hard_threshold_rank(np.linalg.svd(noisy, compute_uv=False)) == rank
