"""Test `SmallestAdapter` with two processes (gloo on a CPU): DDP and FSDP2."""

from __future__ import annotations

import json
import os
import socket
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rightrank import SmallestAdapter
from rightrank.trainers.measurement import InMemoryAdapter

pytestmark = pytest.mark.trains
STRATEGIES = ("ddp", "fsdp2")


def run_process(number: int, port: int, model: Path, rows: list[Any], out: Path) -> None:
    """Run each strategy in its own folder. A forked process would inherit accelerate's state from other tests."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    for strategy in STRATEGIES:
        train(strategy, number, model, rows, out / strategy)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # all is written; the threads of a process group now and then abort an interpreter that ends


def train(strategy: str, number: int, model: Path, rows: list[Any], out: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=12, learning_rate=1e-2, per_device_train_batch_size=4, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, ddp_backend="gloo",
    )  # fmt: skip
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peft_model: Any = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model), padding=True)
    trainer = Trainer(peft_model, arguments, collator, rows[:140], rows[140:])  # type: ignore[arg-type]
    callback = SmallestAdapter(trainer, margin=0.1)
    trainer.add_callback(callback)
    if strategy == "ddp":
        trainer.train()
    else:
        train_sharded(peft_model, arguments, DataLoader(rows[:140], 4, collate_fn=collator), callback)  # type: ignore[arg-type]
    assert callback.result is not None
    weights = {name: parameter for name, parameter in peft_model.named_parameters() if "lora_" in name}
    assert any(isinstance(parameter, DTensor) for parameter in weights.values()) == (strategy == "fsdp2")
    full_parameters = {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        for name, parameter in weights.items()
    }
    assert all(parameter.grad is None for parameter in weights.values())
    (out / f"{number}.json").write_text(callback.result.answer.model_dump_json())
    if number == 0:
        torch.save({name: parameter.detach().cpu() for name, parameter in full_parameters.items()}, out / "after.pt")


def train_sharded(model: Any, arguments: TrainingArguments, loader: Any, callback: SmallestAdapter) -> None:
    """Train with a model that is sharded by FSDP2 as accelerate does it, because accelerate does not do so on a CPU."""
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    state, control = TrainerState(is_world_process_zero=torch.distributed.get_rank() == 0), TrainerControl()
    kwargs = {"model": model, "train_dataloader": loader, "eval_dataloader": None}
    callback.on_train_begin(arguments, state, control, **kwargs)
    for batch in islice(loader, 12):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
    callback.on_train_end(arguments, state, control, **kwargs)


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def read_rows(model_folder: Path, completion_file: Path) -> list[Any]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = []
    for line in completion_file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


@pytest.fixture(scope="module")
def trained(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a training for each strategy."""
    out = tmp_path_factory.mktemp("processes")
    rows = read_rows(model_folder, completion_file)
    multiprocessing.start_processes(
        run_process, args=(find_free_port(), model_folder, rows, out), nprocs=2, start_method="fork"
    )
    return out


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_give_one_answer(strategy: str, trained: Path, model_folder: Path, completion_file: Path) -> None:
    """Require that both processes have the same answer for the saved adapter, and that the factors are unchanged."""
    rows, out = read_rows(model_folder, completion_file), trained / strategy
    answers = [json.loads((out / f"{number}.json").read_text()) for number in range(2)]
    notes = [answer.pop("notes") for answer in answers]  # the last has the process's own time and memory
    assert answers[0] == answers[1]
    assert notes[0][:-1] == notes[1][:-1]
    batches = [{key: torch.tensor([value]) for key, value in row.items()} for row in rows[140:]]
    values = []
    trained_parameters = torch.load(out / "after.pt", weights_only=True)
    for is_trained in (True, False):
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        if is_trained:
            model: Any = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
            factors = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
            assert trained_parameters.keys() == factors.keys()
            model.load_state_dict(trained_parameters, strict=False)
        else:
            model = PeftModel.from_pretrained(base, out / "rightrank" / "adapter")
        values.append(InMemoryAdapter(model.eval(), batches).score().loss)
    assert values[0] == pytest.approx(answers[0]["candidates"][0]["value"], abs=1e-4)
    assert values[1] - values[0] == pytest.approx(answers[0]["difference"], abs=1e-4)
    assert answers[0]["rank"] < 16
