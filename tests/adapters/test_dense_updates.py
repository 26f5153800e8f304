"""A resized adapter of any layers, scales and sizes is the best dense approximation of every matrix, and says how far it is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.numpy import load_file, save_file

from rightrank.adapters.adapter_files import open_adapter
from rightrank.adapters.resize import cap_ranks, resize_adapter, write_uniform_adapter
from rightrank.schema.trials import Floats
from tests.examples import limit_examples

EXPERTS = "layers.0.mlp.experts"
SHAPES = {
    "layers.0.q_proj": (7, 9),
    "layers.1.q_proj": (8, 6),
    "q_proj": (6, 12),
    "conv": (6, 12),
    EXPERTS: (5, 8),
}  # rows, columns
PREFIX = "base_model.model."


def write_adapter(folder: Path, seed: int, size: float) -> Path:
    """Write an adapter with any of the layers, whose ranks and alphas differ, and some of whose updates are zero."""
    draw = np.random.default_rng(seed)
    names = draw.permutation(sorted(SHAPES))[: draw.integers(1, 6)].tolist()
    ranks = {name: int(draw.integers(1, 7)) for name in names}
    tensors: dict[str, Floats] = {}
    for name in names:
        (rows, columns), experts = SHAPES[name], 3 if name == EXPERTS else 1
        a, b = (
            draw.standard_normal((ranks[name] * experts, columns)),
            draw.standard_normal((rows, ranks[name] * experts)),
        )
        kernel = (columns // 4, 2, 2) if name == "conv" else (columns,)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.reshape(-1, *kernel) * size
        tensors[f"{PREFIX}{name}.lora_B.weight"] = (
            b.reshape(*b.shape, *[1] * (len(kernel) - 1)) * size * (draw.random() < 0.9)
        )
    addresses = {name: "^" + name.replace(EXPERTS, f"{EXPERTS}.w1") for name in names}
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": bool(draw.integers(2)), "target_parameters": [f"{EXPERTS}.w1"],
        "rank_pattern": {addresses[name]: rank for name, rank in ranks.items()},
        "alpha_pattern": {addresses[name]: float(draw.choice([4, 9])) for name in names},
    }  # fmt: skip
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def compute_updates(folder: Path) -> dict[str, Floats]:
    """Compute each dense update with the scale that PEFT's patterns give it."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    updates: dict[str, Floats] = {}
    for name, (rows, columns) in SHAPES.items():
        if (key := f"{PREFIX}{name}.lora_A.weight") not in tensors:
            continue
        address, experts = (f"{EXPERTS}.w1", 3) if name == EXPERTS else (name, 1)
        a, b = tensors[key].reshape(-1, columns), tensors[key.replace("_A", "_B")].reshape(rows, -1)
        rank = len(a) // experts
        assert rank == config["rank_pattern"].get(get_pattern_key(config["rank_pattern"], address), config["r"])
        alpha = config["alpha_pattern"].get(get_pattern_key(config["alpha_pattern"], address), config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        products = np.einsum("ore,erk->eok", b.reshape(rows, rank, experts), a.reshape(experts, rank, columns))
        updates |= {
            address if experts == 1 else f"{address}.{expert}": scale * product
            for expert, product in enumerate(products)
        }
    return updates


@limit_examples(60)
@given(st.integers(0, 10_000), st.integers(1, 8), st.sampled_from([1.0, 1e-3, 1e-6]), st.booleans())
def test_every_matrix_is_the_best_of_its_rank_and_its_error_is_stated(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rank: int, size: float, is_uniform: bool
) -> None:
    root = tmp_path_factory.mktemp("adapter")
    adapter = open_adapter(write_adapter(root / "large", seed, size))
    ranks = {module.name: rank for module in adapter.modules} if is_uniform else cap_ranks(adapter, rank)
    resized = resize_adapter(adapter, root / "small", ranks)
    old, new = compute_updates(root / "large"), compute_updates(root / "small")
    assert old.keys() == new.keys() == {module.name for module in resized.modules}
    dropped = norms = 0.0
    for module in resized.modules:
        values = np.linalg.svd(old[module.name], compute_uv=False)
        norm, discarded = (float(np.linalg.norm(values[start:])) for start in (0, module.rank))
        assert module.rank == ranks[module.name]
        assert np.linalg.norm(new[module.name] - old[module.name]) == pytest.approx(discarded, abs=1e-6 * norm)
        assert module.relative_delta_error == pytest.approx(discarded / norm if norm else 0.0, abs=1e-6)
        dropped, norms = dropped + discarded**2, norms + norm**2
    assert resized.relative_delta_error == pytest.approx(math.sqrt(dropped / norms) if norms else 0.0, abs=1e-6)
    write_uniform_adapter(adapter, root / "uniform")
    assert {module.rank for module in open_adapter(root / "uniform").modules} == {adapter.rank}
    for name, update in compute_updates(root / "uniform").items():
        assert np.allclose(update, old[name], rtol=1e-9, atol=0)
    for path, parameters in (("large", resized.parameters_before), ("small", resized.parameters_after)):
        tensors = load_file(root / path / "adapter_model.safetensors")
        assert parameters == sum(value.size for value in tensors.values())
    assert {value.dtype for value in tensors.values()} == {np.dtype(np.float64)}
