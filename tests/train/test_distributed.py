"""One arm on two processes (gloo, on a CPU) is the arm on one: data shared out, and the base sharded too."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from rightrank.schema.errors import SettingsError
from rightrank.schema.events import Listener
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.train.distributed import require_shares
from rightrank.train.loop import run_trial
from rightrank.train.trial import TrialFolders
from tests.helpers import make_runtime
from tests.tiny import small_settings, write_pairs

ARM = Arm(rank=4, learning_rate=1e-2, lora_alpha=32.0, seed=3, steps=6)


def settings(**changes: Any) -> SelectSettings:
    return small_settings(max_steps=6, batch_size=5, eval_batch_size=4, **changes)  # nothing divides by two


def train(model: Path, data: Path, folder: Path, **changes: Any) -> TrialFinished:
    runtime = make_runtime(model, data, settings(**changes), folder / "cache")
    if settings(**changes).shard_base:
        held = sum(parameter.to_local().numel() for parameter in runtime.model.model.layers.parameters())
        assert 2 * held == sum(parameter.numel() for parameter in runtime.model.model.layers.parameters())
    outcome = run_trial(
        runtime, Trial(trial_id="t", arm=ARM), None, TrialFolders(folder / "c", folder / "adapter"), Listener()
    )
    assert isinstance(outcome, TrialFinished)
    return outcome


VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"shard_base": True},
    {"shard_base": True, "gradient_checkpointing": True},
)


def process(number: int, port: int, model: Path, data: Path, pairs: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    try:
        for variant, changes in enumerate(VARIANTS):
            outcome = train(model, data, folder / f"{variant}.{number}", **changes)
            (folder / f"{variant}.{number}.json").write_text(outcome.model_dump_json())
        outcome = train(model, pairs, folder / f"pairs.{number}", shard_base=True)
        (folder / f"pairs.{number}.json").write_text(outcome.model_dump_json())
        with pytest.raises(SettingsError, match="batch_size 1 can't be shared by 2 processes"):
            require_shares(1)
    finally:
        dist.destroy_process_group()


def test_two_processes_equal_one(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    multiprocessing.spawn(process, args=(port, model_folder, completion_file, pairs, tmp_path), nprocs=2)
    texts = train(model_folder, completion_file, tmp_path / "one")
    both = train(model_folder, pairs, tmp_path / "one pairs")
    for file in (f"{variant}.{number}" for variant in (*range(len(VARIANTS)), "pairs") for number in range(2)):
        one = both if file.startswith("pairs") else texts
        other = TrialFinished.model_validate(json.loads((tmp_path / f"{file}.json").read_text()))
        assert other.train_losses == pytest.approx(one.train_losses, rel=1e-5), file
        assert other.item_losses == pytest.approx(one.item_losses, rel=1e-4), file
        assert other.item_tokens == one.item_tokens
        assert other.item_metrics.keys() == one.item_metrics.keys()
        assert other.train_tokens == one.train_tokens
    assert (tmp_path / "1.0" / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "1.1" / "adapter").exists()


def test_one_process_computes_every_example(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="shard_base needs more than one process"):
        make_runtime(model_folder, completion_file, settings(shard_base=True), tmp_path)
