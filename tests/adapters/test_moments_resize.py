"""An adapter truncated by moments, with a rank for each module, as PEFT loads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rightrank.adapters.rewrite import RankChoice, write_resized
from rightrank.models.adapter_files import AdapterFolder, open_adapter
from rightrank.models.truncation import Moments, components, ranks_within
from tests.adapters.adapters import deltas, load_strictly, make_adapter, make_base

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def random_moments(adapter: AdapterFolder) -> dict[str, Moments]:
    """Of unlike scale from module to module, so that some are worth more rank than others."""
    generator = np.random.default_rng(0)
    found: dict[str, Moments] = {}
    for number, module in enumerate(adapter.modules):
        pair = [generator.standard_normal((40, module.rank)) * 2.0 ** (number % 5) for _ in range(2)]
        found[module.name] = Moments(*(rows.T @ rows / len(rows) for rows in pair))
    return found


@pytest.mark.parametrize("kind", ["plain", "rslora"])
@pytest.mark.parametrize("max_rank", [2, 6])
def test_peft_loads_the_pattern_and_gives_the_truncation(base: Path, tmp_path: Path, kind: str, max_rank: int) -> None:
    adapter = open_adapter(make_adapter(base, tmp_path / "adapter", kind))
    moments = random_moments(adapter)
    parts = {m.name: components(*adapter.factors(m), m.scaling, moments[m.name]) for m in adapter.modules}
    costs = [module.rows + module.columns for module in adapter.modules]
    ranks = ranks_within([found.costs for found in parts.values()], costs, 2 * sum(costs), max_rank)
    chosen = dict(zip(parts, ranks, strict=True))
    resized = write_resized(adapter, tmp_path / "small", RankChoice(chosen, "test"), moments)
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert config["r"] == max(ranks) <= max_rank
    assert (len(set(ranks)) > 1) == (max_rank > 2) == bool(config["rank_pattern"])
    assert resized.parameters_after <= 2 * sum(costs)
    loaded = deltas(load_strictly(base, tmp_path / "small"))
    for module in adapter.modules:
        b, a = parts[module.name].leading(chosen[module.name])
        assert torch.allclose(loaded[module.name].double(), torch.from_numpy(module.scaling * b @ a), atol=1e-5)
    held = sum(p.numel() for name, p in load_strictly(base, tmp_path / "small").named_parameters() if "lora_" in name)
    assert held == resized.parameters_after
