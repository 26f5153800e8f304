"""An adapter whose modules differ in rank, as servers load it: their rules, on the files that an export writes.

vLLM (`peft_helper.py`, `lora_model.py` and `base_linear.py` of vllm/lora, read at 0306474e): every module has the scale of `lora_alpha` and `r`
of the configuration, whatever `rank_pattern` and `alpha_pattern` say; factors of any rank up to `--max-lora-rank` are copied into slots of zeros.
SGLang (`mem_pool.py` of sglang/srt/lora, read at 00639c4d): the same scale, and an assertion that every A has `r` rows and every B `r` columns.
"""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest
import torch
from benchmarks.consumers.check import require_one_rank

from rightrank.adapters.adapter_reader import open_adapter
from rightrank.adapters.resize import resize_adapter
from rightrank.decision.adapter import Provenance
from rightrank.exports.exports import write_export
from rightrank.exports.recipe import Recipe, _select_adapter_fields
from rightrank.schema.settings import SelectSettings
from tests.adapters.adapters import compute_deltas, load_strictly, load_tensors, make_adapter, make_base

SLOT = 8  # of vLLM, for ranks from 2 to 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def make_patterned_adapter(base: Path, folder: Path, kind: str) -> Path:
    """Make an adapter that was truncated to ranks from 1 to 4."""
    top = open_adapter(make_adapter(base, folder / "top", kind))
    resize_adapter(top, folder / "adapter", {module.name: 1 + index % 4 for index, module in enumerate(top.modules)})
    return folder / "adapter"


def make_recipe(base: Path, adapter: Path) -> Recipe:
    making = Provenance(rank=3, trained_rank=8, learning_rate=1e-3, steps=4, checkpoint_step=None, truncation="SVD")
    fields = _select_adapter_fields(json.loads((adapter / "adapter_config.json").read_text()))
    return Recipe(
        model=str(base), data="data.jsonl", form="text", adapter=adapter, module_names=(), learning_rate=1e-3,
        max_steps=4, warmup_steps=0, seed=0, settings=SelectSettings(), provenance=making, trained_alpha=16.0, **fields,
    )  # fmt: skip


def load_as_vllm(folder: Path, max_rank: int) -> dict[str, torch.Tensor]:
    """ΔW of each module by vLLM's rule."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_tensors(folder)
    assert config["r"] <= max_rank, "LoRA rank is greater than max_lora_rank"
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    updates: dict[str, torch.Tensor] = {}
    for key, a in tensors.items():
        if "lora_A" in key:
            b = tensors[key.replace("lora_A", "lora_B")]
            slot_a, slot_b = torch.zeros(max_rank, a.shape[1]).double(), torch.zeros(b.shape[0], max_rank).double()
            slot_a[: a.shape[0]], slot_b[:, : b.shape[1]] = a, b * scale
            updates[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = slot_b @ slot_a
    return updates


def load_as_sglang(folder: Path) -> dict[str, torch.Tensor]:
    """ΔW of each module by SGLang's rule."""
    r = json.loads((folder / "adapter_config.json").read_text())["r"]
    for key, tensor in load_tensors(folder).items():
        assert tensor.shape["lora_A" not in key] == r, f"LoRA buffer does not match the shape of {key}"
    return load_as_vllm(folder, r)


def assert_equal(updates: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert updates.keys() == expected.keys()
    for name, update in updates.items():
        assert torch.allclose(update, expected[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("kind", ["plain", "rslora", "alpha_pattern", "rank_pattern"])
def test_vllm_scales_the_folder_as_peft_does(base: Path, tmp_path: Path, kind: str) -> None:
    adapter = make_patterned_adapter(base, tmp_path, kind)
    assert_equal(load_as_vllm(adapter, SLOT), compute_deltas(load_strictly(base, adapter)))


@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize("kind", ["plain", "rslora", "bfloat16"])
def test_an_export_for_a_server_has_one_rank_and_the_same_values(
    base: Path, tmp_path: Path, kind: str, server: str
) -> None:
    adapter = make_patterned_adapter(base, tmp_path, kind)
    with pytest.raises(AssertionError, match="does not match the shape"):
        load_as_sglang(adapter)
    exported = write_export(server, make_recipe(base, adapter), tmp_path / "exports")
    words = shlex.split((tmp_path / "exports" / f"{server}.sh").read_text(), comments=True)
    option = {"vllm": "--lora-modules", "sglang": "--lora-paths"}[server]
    folder = Path(words[words.index(option) + 1].partition("=")[2])
    assert folder == (tmp_path / "exports" / "adapter").resolve()
    assert words[words.index("--max-lora-rank") + 1] == {"vllm": str(SLOT), "sglang": "4"}[server]
    with pytest.raises(AssertionError, match="modules differ in rank"):
        require_one_rank(adapter)
    require_one_rank(folder)
    expected = load_as_vllm(adapter, SLOT)
    assert_equal(load_as_sglang(folder), expected)
    assert_equal(load_as_vllm(folder, SLOT), expected)
    assert_equal(compute_deltas(load_strictly(base, folder)), compute_deltas(load_strictly(base, adapter)))
    assert any("rank 3 (modules from 1 to 4)" in note and "padded with zeros" in note for note in exported.notes)
    adapter_tensors, exported_tensors = load_tensors(adapter), load_tensors(folder)  # no value has changed
    for key, tensor in adapter_tensors.items():
        rows, columns = tensor.shape
        assert torch.equal(exported_tensors[key][:rows, :columns], tensor)


def test_alphas_that_differ_are_folded_for_a_server(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", "alpha_pattern")
    write_export("vllm", make_recipe(base, adapter), tmp_path / "exports")
    assert_equal(load_as_vllm(tmp_path / "exports" / "adapter", SLOT), compute_deltas(load_strictly(base, adapter)))


def test_an_adapter_of_one_rank_is_served_as_it_is(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    exported = write_export("sglang", make_recipe(base, adapter), tmp_path / "exports")
    assert exported.files == ["sglang.sh"]
    assert f"rightrank={adapter.resolve()}" in (tmp_path / "exports" / "sglang.sh").read_text()
