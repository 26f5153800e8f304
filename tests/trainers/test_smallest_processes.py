"""Test `SmallestAdapter` with two processes (gloo on a CPU)."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from rightrank import SmallestAdapter
from rightrank.schema.errors import ModelError
from rightrank.trainers.in_memory import find_trained_adapter
from rightrank.trainers.measurement import InMemoryAdapter

pytestmark = pytest.mark.trains


def run_process(number: int, port: int, model: Path, rows: list[Any], out: Path) -> None:
    """Train, and find that a sharded model is refused. A forked process would inherit accelerate's state from other tests."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    peft_model = train(number, model, rows, out)
    fully_shard(peft_model)
    with pytest.raises(ModelError, match=r"with FSDP .* no process holds complete factors"):
        find_trained_adapter(peft_model)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # all is written; the threads of a process group now and then abort an interpreter that ends


def train(number: int, model: Path, rows: list[Any], out: Path) -> Any:
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
    trainer.train()
    assert callback.result is not None
    weights = {name: parameter for name, parameter in peft_model.named_parameters() if "lora_" in name}
    assert all(parameter.grad is None for parameter in weights.values())
    (out / f"{number}.json").write_text(callback.result.answer.model_dump_json())
    if number == 0:
        torch.save({name: parameter.detach().cpu() for name, parameter in weights.items()}, out / "after.pt")
    return peft_model


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
    """Return the folder of a training."""
    out = tmp_path_factory.mktemp("processes")
    rows = read_rows(model_folder, completion_file)
    multiprocessing.start_processes(
        run_process, args=(find_free_port(), model_folder, rows, out), nprocs=2, start_method="fork"
    )
    return out


def test_two_processes_give_one_answer(trained: Path, model_folder: Path, completion_file: Path) -> None:
    """Require that both processes have the same answer for the saved adapter, and that the factors are unchanged."""
    rows, out = read_rows(model_folder, completion_file), trained
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
