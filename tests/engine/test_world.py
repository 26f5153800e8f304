"""One arm on two processes (gloo, on a CPU) is the arm on one: data shared out, and the base sharded too."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from rightrank.engine.together import run_trial
from rightrank.engine.train import TrialFolders, Watcher
from rightrank.engine.world import require_shares
from rightrank.errors import SettingsError
from rightrank.records import Arm, Trial, TrialFinished
from rightrank.settings import SelectSettings
from tests.helpers import make_bench
from tests.tiny import small_settings

ARM = Arm(rank=4, learning_rate=1e-2, lora_alpha=32.0, seed=3, steps=6)


def settings() -> SelectSettings:
    return small_settings(max_steps=6, batch_size=5)  # does not divide by two


def train(model: Path, data: Path, folder: Path) -> TrialFinished:
    bench = make_bench(model, data, settings(), folder / "cache")
    outcome = run_trial(
        bench, Trial(trial_id="t", arm=ARM), None, TrialFolders(folder / "c", folder / "adapter"), Watcher()
    )
    assert isinstance(outcome, TrialFinished)
    return outcome


def process(number: int, port: int, model: Path, data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    try:
        outcome = train(model, data, folder / str(number))
        with pytest.raises(SettingsError, match="batch_size 1 can't be shared by 2 processes"):
            require_shares(1)
        (folder / f"{number}.json").write_text(outcome.model_dump_json())
    finally:
        dist.destroy_process_group()


def test_two_processes_equal_one(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(process, args=(port, model_folder, completion_file, tmp_path), nprocs=2)
    one = train(model_folder, completion_file, tmp_path / "one")
    for number in range(2):
        other = TrialFinished.model_validate(json.loads((tmp_path / f"{number}.json").read_text()))
        assert other.train_losses == pytest.approx(one.train_losses, rel=1e-5)
        assert other.item_losses == pytest.approx(one.item_losses, rel=1e-4)
        assert other.item_tokens == one.item_tokens
        assert other.train_tokens == one.train_tokens
    assert (tmp_path / "0" / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "1" / "adapter").exists()
