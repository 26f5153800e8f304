"""`resize`: by moments with a rank for each module; `--data` by the rule of `select`; what it says, and what it keeps beside the factors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rightrank import resize
from rightrank.adapters.adapter_files import AdapterFolder, open_adapter
from rightrank.adapters.rank_math import find_server_rank
from rightrank.adapters.resize import cap_ranks, choose_uniform_rank, resize_adapter
from rightrank.adapters.truncation import Moments, allocate_ranks, decompose_update
from rightrank.cli import main
from rightrank.data.splits import load_data
from rightrank.evaluation.attached_adapters import attach_adapter
from rightrank.runs.resize_by_data import build_adapter_evaluator, load_evaluation_data
from rightrank.schema.errors import DataError, SettingsError
from rightrank.schema.events import Listener
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, Trial
from rightrank.training.loop import TrialFolders
from rightrank.training.moments import gather_unseen_moments
from tests.adapters.adapters import (
    compute_deltas,
    load_strictly,
    load_tensors,
    make_adapter,
    make_base,
)
from tests.examples import limit_examples
from tests.helpers import make_runtime, run_trial
from tests.tiny import build_small_settings

pytestmark = pytest.mark.trains


SETTINGS = ["--set", "seq_len=32", "--set", "max_eval_examples=12", "--set", "batch_size=4"]


@pytest.fixture(scope="module")
def trained(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train an adapter of rank 8 that learned something, in few directions."""
    root = tmp_path_factory.mktemp("trained")
    runtime = make_runtime(model_folder, completion_file, build_small_settings(max_steps=150), root / "cache")
    arm = Arm(rank=8, learning_rate=1e-2, lora_alpha=32.0, seed=0, steps=150)
    run_trial(runtime, Trial(trial_id="t", arm=arm), None, TrialFolders(root / "c", root / "adapter"), Listener())
    return root / "adapter"


def run_resize(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["resize", *(str(argument) for argument in arguments), "--json"])
    captured = capsys.readouterr()
    assert stop.value.code == 0, captured.err
    answer: dict[str, Any] = json.loads(captured.out)
    return answer


def test_the_rank_is_the_smallest_truncation_that_holds_against_the_adapter(
    trained: Path, completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    resized = run_resize(capsys, trained, out, "--data", completion_file, "--margin", 0.05, *SETTINGS)
    answer = resized["answer"]
    assert (resized["rank"], answer["trained_rank"], answer["reference_id"]) == (answer["rank"], 8, "r8")
    by_rank = {entry["rank"]: entry["value"] for entry in answer["candidates"]}
    assert answer["gain"]["mean"] > 0.1  # it had learned
    for candidate in answer["candidates"]:
        assert candidate["difference"] == pytest.approx(by_rank[candidate["rank"]] - by_rank[8], abs=1e-6)
        assert candidate["is_within_margin"] == (candidate["difference_high"] < 0.05)
    assert all(
        candidate_record["is_within_margin"]
        for candidate_record in answer["candidates"]
        if candidate_record["rank"] >= answer["rank"]
    )
    assert open_adapter(out).config["r"] == answer["rank"]


def test_the_written_adapter_is_truncated_by_k_fac(trained: Path, completion_file: Path, tmp_path: Path) -> None:
    """Compare the folder with the truncation by the gathered moments, and not by the plain SVD."""
    settings = SelectSettings(seq_len=32, max_eval_examples=12, batch_size=4, margin=10.0, device="cpu")
    resized = resize(
        trained, tmp_path / "small", data=completion_file, settings=settings, ranks=(2,), train=completion_file
    )
    assert any("K-FAC over" in note for note in resized.notes)
    adapter = open_adapter(trained)
    splits = load_data(completion_file, settings)
    evaluator = build_adapter_evaluator(adapter, None, splits, settings, tmp_path / "cache")
    steps = settings.count_training_steps(len(evaluator.data.splits["train"]))
    with attach_adapter(evaluator, trained) as peft_model:
        moments = gather_unseen_moments(evaluator, settings, peft_model, 0, steps).moments
    chosen = cap_ranks(adapter, 2, moments)
    assert resized.rank == 2 < max(chosen.values()) <= 8
    assert resized.parameters_after <= 2 * sum(module.rows + module.columns for module in adapter.modules)
    resize_adapter(adapter, tmp_path / "kfac", chosen, moments)
    resize_adapter(adapter, tmp_path / "svd", chosen)
    small, kfac, svd = (load_tensors(tmp_path / name) for name in ("small", "kfac", "svd"))
    assert all(torch.equal(small[key], kfac[key]) for key in small)
    assert any(not torch.allclose(small[key], svd[key], atol=1e-4) for key in small)


def test_the_reported_value_is_that_of_the_written_folder(
    model_folder: Path, trained: Path, completion_file: Path, tmp_path: Path
) -> None:
    """Loaded anew through PEFT, the written adapter gives the held-out loss that decided."""
    settings = SelectSettings(seq_len=32, max_eval_examples=12, margin=0.05)
    resized = resize(trained, tmp_path / "small", data=completion_file, settings=settings, train=completion_file)
    adapter = open_adapter(tmp_path / "small")
    splits, _, _ = load_evaluation_data(adapter, completion_file, completion_file, settings)
    evaluator = build_adapter_evaluator(adapter, None, splits, settings, tmp_path / "cache")
    base_loss = evaluator.evaluate("validation").loss
    with attach_adapter(evaluator, tmp_path / "small"):
        loss = evaluator.evaluate("validation").loss
    by_rank = {entry.rank: entry.value for entry in resized.answer.candidates}
    assert loss == pytest.approx(by_rank[resized.rank or 0], rel=1e-5)
    assert evaluator.evaluate("validation").loss == base_loss
    assert base_loss == pytest.approx(by_rank[8] + resized.answer.gain.mean, rel=1e-6)
    load_strictly(model_folder, tmp_path / "small")


def test_training_examples_are_left_out_of_the_scores(trained: Path, completion_file: Path, tmp_path: Path) -> None:
    lines = completion_file.read_text(encoding="utf-8").splitlines()
    train = tmp_path / "train.jsonl"
    train.write_text("\n".join(lines[:150]) + "\n", encoding="utf-8")
    adapter, settings = open_adapter(trained), SelectSettings(seq_len=32)
    splits, _, note = load_evaluation_data(adapter, completion_file, train, settings)
    texts = {json.dumps(dict(example.content)) for example in splits.examples["validation"]}
    assert texts == {json.dumps(json.loads(line)) for line in lines[150:]} - {
        json.dumps(json.loads(line)) for line in lines[:150]
    }
    assert "training examples of the adapter are left out" in note
    with pytest.raises(DataError, match="are among the training examples of the adapters"):
        load_evaluation_data(
            adapter,
            train,
            completion_file,
            SelectSettings(seq_len=32, test_fraction=0.0, columns="prompt=prompt"),
        )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plain_adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> AdapterFolder:
    return open_adapter(make_adapter(base, tmp_path_factory.mktemp("plain") / "adapter"))


def draw_moments(adapter: AdapterFolder) -> dict[str, Moments]:
    """Draw moments of different scales, so that some modules should get a higher rank than others."""
    generator = np.random.default_rng(0)
    moments: dict[str, Moments] = {}
    for number, module in enumerate(adapter.modules):
        pair = [generator.standard_normal((40, module.rank)) * 2.0 ** (number % 5) for _ in range(2)]
        moments[module.name] = Moments(*(rows.T @ rows / len(rows) for rows in pair))
    return moments


def has_equal_scales(base: Path, folder: Path) -> bool:
    """Return whether PEFT scales every module as a server does: by `lora_alpha` and `r` of the configuration alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    model = load_strictly(base, folder)
    scales = [module.scaling["default"] for module in model.modules() if hasattr(module, "get_delta_weight")]
    return scales == pytest.approx([scale] * len(scales), rel=1e-12)


@limit_examples(30)
@given(st.integers(1, 12), st.booleans(), st.booleans())
def test_capped_ranks_share_out_the_parameters_of_a_uniform_rank(
    plain_adapter: AdapterFolder, rank: int, has_moments: bool, has_all_moments: bool
) -> None:
    modules, moments = plain_adapter.modules, draw_moments(plain_adapter) if has_moments else {}
    if not has_all_moments:
        moments.pop(modules[-1].name, None)
    chosen, reserved = cap_ranks(plain_adapter, rank, moments), find_server_rank(rank)
    sizes = {module.name: module.rows + module.columns for module in modules}
    if has_moments and has_all_moments and rank < min(reserved, plain_adapter.rank):
        assert all(1 <= module_rank <= reserved for module_rank in chosen.values())
        assert len(set(chosen.values())) > 1
        spare = rank * sum(sizes.values()) - sum(module_rank * sizes[name] for name, module_rank in chosen.items())
        limits = {module.name: min(reserved, module.rank) for module in modules}
        assert 0 <= spare < min(sizes[name] for name in sizes if chosen[name] < limits[name])
    else:
        assert chosen == {module.name: min(rank, module.rank) for module in modules}


@given(st.integers(-1, 40))
def test_one_rank_for_all_modules_is_allowed_up_to_that_of_the_smallest_matrix(
    plain_adapter: AdapterFolder, rank: int
) -> None:
    limit = min(max(module.rank, min(module.rows, module.columns)) for module in plain_adapter.modules)
    if 1 <= rank <= limit:
        assert choose_uniform_rank(plain_adapter, rank) == {module.name: rank for module in plain_adapter.modules}
    else:
        with pytest.raises(SettingsError, match=f"--rank {rank} is"):
            choose_uniform_rank(plain_adapter, rank)


@pytest.mark.parametrize("kind", ["plain", "rslora"])
@pytest.mark.parametrize("max_rank", [2, 6])
def test_peft_loads_the_pattern_and_gives_the_truncation(base: Path, tmp_path: Path, kind: str, max_rank: int) -> None:
    adapter = open_adapter(make_adapter(base, tmp_path / "adapter", kind))
    moments = draw_moments(adapter)
    updates = {m.name: decompose_update(*adapter.load_factors(m), m.scaling, moments[m.name]) for m in adapter.modules}
    costs = [module.rows + module.columns for module in adapter.modules]
    ranks = allocate_ranks([update.costs for update in updates.values()], costs, 2 * sum(costs), max_rank)
    chosen = dict(zip(updates, ranks, strict=True))
    resized = resize_adapter(adapter, tmp_path / "small", chosen, moments)
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert config["r"] == 2 <= max(ranks) <= max_rank
    alpha = adapter.config["lora_alpha"] * (math.sqrt(2) if kind == "rslora" else 1)
    assert (config["lora_alpha"], config["use_rslora"]) == (pytest.approx(alpha), False)
    assert (len(set(ranks)) > 1) == (max_rank > 2) == bool(config["rank_pattern"]) == bool(config["alpha_pattern"])
    assert has_equal_scales(base, tmp_path / "small")
    assert resized.parameters_after <= 2 * sum(costs)
    loaded = compute_deltas(load_strictly(base, tmp_path / "small"))
    for module in adapter.modules:
        module_update, rank = updates[module.name], chosen[module.name]
        b, a = module_update.b[:, :rank], module_update.a[:rank]
        assert torch.allclose(loaded[module.name].double(), torch.from_numpy(module.scaling * b @ a), atol=1e-5)
    num_parameters = sum(
        p.numel() for name, p in load_strictly(base, tmp_path / "small").named_parameters() if "lora_" in name
    )
    assert num_parameters == resized.parameters_after
