"""Test the files for servers: adapters of runs and of folders, alone and together, as servers load them by their own rules.

vLLM (`peft_helper.py`, `lora_model.py` and `base_linear.py` of vllm/lora, read at 0306474e): every module has the scale of `lora_alpha` and `r`
of the configuration, whatever `rank_pattern` and `alpha_pattern` say; factors of any rank up to `--max-lora-rank` are copied into slots of zeros.
SGLang (`mem_pool.py` of sglang/srt/lora, read at 00639c4d): an assertion that every A has `r` rows and every B `r` columns, and `lora_alpha` over
`r`, whatever `use_rslora` says (issue 40835). llama.cpp (`convert_lora_to_gguf.py`): `lora_alpha` over the rank of each module's own factors.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rightrank import export
from rightrank.adapters.adapter_files import open_adapter
from rightrank.adapters.resize import resize_adapter
from rightrank.exports.servers import SERVERS
from rightrank.schema.errors import ModelError, RightrankError, RunFolderError, SettingsError
from tests.adapters.adapters import (
    compute_deltas,
    edit_config,
    load_strictly,
    load_tensors,
    make_adapter,
    make_base,
    write_mlx,
)

SLOT = 8  # of vLLM, for ranks from 2 to 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(small_run, tmp_path / "home")
    return tmp_path / "home" / "run"


def make_patterned_adapter(base: Path, folder: Path, kind: str) -> Path:
    """Make an adapter that was truncated to ranks from 1 to 4."""
    top = open_adapter(make_adapter(base, folder / "top", kind))
    resize_adapter(top, folder / "adapter", {module.name: 1 + index % 4 for index, module in enumerate(top.modules)})
    return folder / "adapter"


def read_script(folder: Path, server: str = "vllm") -> dict[str, str]:
    """Return the value of each option of a script, and the served folders by name."""
    subprocess.run(["sh", "-n", str(folder / f"{server}.sh")], check=True)
    words = shlex.split((folder / f"{server}.sh").read_text(), comments=True)
    served = [
        word.partition("=") for word in words[words.index({"vllm": "--lora-modules"}.get(server, "--lora-paths")) :]
    ]
    options = {word: words[index + 1] for index, word in enumerate(words[:-1]) if word.startswith("--")}
    return options | {name: folder for name, equals, folder in served if equals} | {"base": words[3]}


def load_as_vllm(folder: Path, max_rank: int) -> dict[str, torch.Tensor]:
    """ΔW of each module by vLLM's rule."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] <= max_rank, "LoRA rank is greater than max_lora_rank"
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    return load_into_slots(folder, lambda rank: scale, max_rank)


def load_into_slots(
    folder: Path, get_scale: Callable[[int], float], num_rows: int | None = None
) -> dict[str, torch.Tensor]:
    """ΔW of each module, with a scale for the rank of its factors, from slots with `num_rows` rows."""
    tensors = load_tensors(folder)
    updates: dict[str, torch.Tensor] = {}
    for key, a in tensors.items():
        if "lora_A" in key:
            b, rows = tensors[key.replace("lora_A", "lora_B")], num_rows or len(a)
            slot_a, slot_b = torch.zeros(rows, a.shape[1]).double(), torch.zeros(b.shape[0], rows).double()
            slot_a[: a.shape[0]], slot_b[:, : b.shape[1]] = a, b * get_scale(len(a))
            updates[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = slot_b @ slot_a
    return updates


def load_as_sglang(folder: Path) -> dict[str, torch.Tensor]:
    """ΔW of each module by SGLang's rule."""
    config = json.loads((folder / "adapter_config.json").read_text())
    r = config["r"]
    for key, tensor in load_tensors(folder).items():
        assert tensor.shape["lora_A" not in key] == r, f"LoRA buffer does not match the shape of {key}"
    return load_into_slots(folder, lambda rank: config["lora_alpha"] / r, r)


def load_as_llama_cpp(folder: Path) -> dict[str, torch.Tensor]:
    """ΔW of each module by the rule of llama.cpp."""
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    return load_into_slots(folder, lambda rank: alpha / rank)


def assert_equal(updates: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert updates.keys() == expected.keys()
    for name, update in updates.items():
        assert torch.allclose(update, expected[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("kind", ["plain", "rslora", "alpha_pattern", "rank_pattern"])
def test_vllm_scales_a_resized_adapter_as_peft_does(base: Path, tmp_path: Path, kind: str) -> None:
    adapter = make_patterned_adapter(base, tmp_path, kind)
    assert_equal(load_as_vllm(adapter, SLOT), compute_deltas(load_strictly(base, adapter)))


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("kind", ["plain", "rslora", "rank_pattern", "alpha_pattern"])
def test_every_server_gives_an_exported_adapter_the_update_of_peft(
    base: Path, tmp_path: Path, kind: str, server: str
) -> None:
    """As it was trained elsewhere: with rsLoRA, with ranks and alphas of its own for some modules, or with neither."""
    adapter = make_adapter(base, tmp_path / "adapter", kind)
    script = read_script(export(adapter, server, tmp_path / "exports").folder, server)
    folder, max_rank = Path(script["adapter"]), int(script["--max-lora-rank"])
    assert (folder == adapter.resolve()) == (kind == "plain")  # what every server reads alike is served where it lies
    expected = compute_deltas(load_strictly(base, adapter))
    for updates in (load_as_vllm(folder, max_rank), load_as_sglang(folder), load_as_llama_cpp(folder)):
        assert_equal(updates, expected)


@pytest.mark.parametrize("kind", ["plain", "rslora", "rank_pattern", "alpha_pattern"])
def test_every_server_gives_a_resized_adapter_the_update_of_peft(base: Path, tmp_path: Path, kind: str) -> None:
    top = open_adapter(make_adapter(base, tmp_path / "top", kind))
    resize_adapter(top, tmp_path / "adapter", {module.name: 2 for module in top.modules})
    expected = compute_deltas(load_strictly(base, tmp_path / "adapter"))
    for load in (load_as_sglang, load_as_llama_cpp, lambda folder: load_as_vllm(folder, SLOT)):
        assert_equal(load(tmp_path / "adapter"), expected)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("kind", ["plain", "rslora", "bfloat16"])
def test_an_adapter_with_patterns_is_written_with_one_rank_and_the_same_values(
    base: Path, tmp_path: Path, kind: str, server: str
) -> None:
    adapter = make_patterned_adapter(base, tmp_path, kind)
    with pytest.raises(AssertionError, match="does not match the shape"):
        load_as_sglang(adapter)
    exported = export(adapter, server, tmp_path / "exports")
    script = read_script(exported.folder, server)
    folder = Path(script["adapter"])
    assert folder == (tmp_path / "exports" / "adapter").resolve()
    assert script["--max-lora-rank"] == {"vllm": str(SLOT), "sglang": "4"}[server]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    expected = load_as_vllm(adapter, SLOT)
    assert_equal(load_as_sglang(folder), expected)
    assert_equal(load_as_vllm(folder, SLOT), expected)
    assert_equal(compute_deltas(load_strictly(base, folder)), compute_deltas(load_strictly(base, adapter)))
    assert any("differ in rank (1 to 4)" in note and "padded with zeros" in note for note in exported.notes)
    adapter_tensors, exported_tensors = load_tensors(adapter), load_tensors(folder)  # no value has changed
    for key, tensor in adapter_tensors.items():
        rows, columns = tensor.shape
        assert torch.equal(exported_tensors[key][:rows, :columns], tensor)


def test_several_adapters_get_one_command_with_the_rank_that_all_need(base: Path, tmp_path: Path) -> None:
    folders = [make_adapter(base, tmp_path / name / "adapter", rank=rank) for name, rank in (("a", 2), ("b c", 12))]
    folders.append(make_patterned_adapter(base, tmp_path / "third", "plain").rename(tmp_path / "third" / "small"))
    exported = export(folders, "vllm", tmp_path / "out")
    script = read_script(exported.folder)
    assert script["--max-lora-rank"] == "16"
    assert script["a-adapter"] == str(folders[0])
    assert script["b-c-adapter"] == str(folders[1])
    assert script["small"] == str(tmp_path / "out" / "small")
    assert exported.files == ["small", "vllm.sh"]
    assert "--max-lora-rank 16 is for b-c-adapter (rank 12); without it, 8 would do" in exported.notes
    sglang = read_script(export(folders[:2], "sglang", tmp_path / "sglang").folder, "sglang")
    assert (sglang["--max-lora-rank"], sglang["b-c-adapter"]) == ("12", str(folders[1]))
    edit_config(folders[1], base_model_name_or_path="org/other")
    with pytest.raises(SettingsError, match="a server has one base model"):
        export(folders, "vllm", tmp_path / "other")
    assert read_script(export(folders, "vllm", tmp_path / "given", base="org/third").folder)["base"] == "org/third"
    with pytest.raises(SettingsError, match="two adapters would be served as 'a-adapter'"):
        export([folders[0], folders[0]], "vllm", tmp_path / "other")


@pytest.mark.parametrize(
    ("kind", "changes", "note"),
    [
        ("plain", {"task_type": "SEQ_CLS"}, "the task of adapter is SEQ_CLS"),
    ],
)
def test_what_a_server_does_not_load_is_a_note(
    base: Path, tmp_path: Path, kind: str, changes: dict[str, Any], note: str
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", kind)
    edit_config(adapter, **changes)
    assert any(note in text for text in export(adapter, "vllm", tmp_path / "out").notes)


def test_what_cannot_be_served_is_refused_in_one_line(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    pissa = shutil.copytree(adapter, tmp_path / "pissa")
    edit_config(pissa, init_lora_weights="pissa")
    nameless = shutil.copytree(adapter, tmp_path / "nameless")
    edit_config(nameless, base_model_name_or_path=None)
    mlx = write_mlx(tmp_path / "mlx", adapter, base)
    refusals: list[tuple[Any, str, dict[str, Any], type[RightrankError], str]] = [
        (pissa, "vllm", {}, ModelError, "init_lora_weights is 'pissa'"),
        (mlx, "sglang", {"base": "model"}, ModelError, "servers load adapter folders of PEFT"),
        (nameless, "vllm", {}, SettingsError, "names no base model; give --base MODEL"),
        (adapter, "vlm", {}, SettingsError, "did you mean 'vllm'.*allowed: vllm, sglang, merged"),
        (adapter, "vllm", {"kind": "f32"}, SettingsError, "work only with merged"),
        ([adapter, pissa], "merged", {}, SettingsError, "takes one adapter, and 2 were given"),
        (tmp_path, "vllm", {}, RunFolderError, r"no journal\.jsonl there"),
    ]
    for kind, changes in [
        ("dora", {}),
        ("lora_bias", {}),
        ("modules_to_save", {}),
        ("plain", {"target_parameters": ["experts.gate_up_proj"]}),
        ("plain", {"trainable_token_indices": [1]}),
    ]:
        richer = make_adapter(base, tmp_path / "-".join([kind, *changes]), kind)
        edit_config(richer, **changes)
        (option,) = changes or [{"dora": "use_dora"}.get(kind, kind)]
        message = f"this adapter has {option}; merge it: rightrank export {richer} --to merged --check DATA$"
        refusals += [(richer, server, {}, ModelError, message) for server in SERVERS]
    for source, target, options, error, message in refusals:
        with pytest.raises(error, match=message):
            export(source, target, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.trains
def test_a_run_is_exported_into_its_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base was given as a relative path, and the export runs in another folder."""
    monkeypatch.chdir(tmp_path)
    exported = export(run, "vllm")
    assert exported.folder == run / "exports" / "vllm"
    script = read_script(exported.folder)
    assert (script["run"], script["base"]) == (str(run / "adapter"), str((run.parent / "model").resolve()))
    with pytest.raises(RunFolderError, match="this path already exists"):
        export(run, "vllm")
    shutil.rmtree(run / "adapter")
    with pytest.raises(RunFolderError, match="no adapter yet"):
        export(run, "vllm")


@pytest.mark.trains
@pytest.mark.parametrize("path_name", ["file", "folder", "link", "run", ""])
def test_existing_paths_are_not_overwritten(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path_name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("folder").mkdir()
    Path("link").symlink_to("nowhere")
    names_before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(RunFolderError, match="this path already exists; give a new folder"):
        export(run, "vllm", run if path_name == "run" else Path(path_name))
    assert sorted(str(path) for path in tmp_path.rglob("*")) == names_before
    assert Path("file").read_text() == "mine"
