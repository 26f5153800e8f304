"""`SmallestAdapter` where two processes (gloo, on a CPU) share a training: under DDP, FSDP2, and ZeRO-3 where DeepSpeed is installed."""

from __future__ import annotations

import json
import os
import socket
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
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
from rightrank.adapters.batch_scores import HeldOutBatches
from rightrank.interop.end_run import measure_again

pytestmark = pytest.mark.trains
WAYS = ("ddp", "fsdp2")


def process(number: int, port: int, model: Path, rows: list[Any], out: Path) -> None:
    """Each way in a folder of its own. Forked, the process has what the tests before have left of accelerate's state."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    for way in WAYS:
        train(way, number, model, rows, out / way)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # all is written; the threads of a process group now and then abort an interpreter that ends


def train(way: str, number: int, model: Path, rows: list[Any], out: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=12, learning_rate=1e-2, per_device_train_batch_size=4, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, ddp_backend="gloo",
    )  # fmt: skip
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peft_model: Any = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model), padding=True)
    callback = SmallestAdapter(rows[140:], margin=0.1)
    if way == "ddp":
        Trainer(peft_model, arguments, collator, rows[:140], callbacks=[callback]).train()  # type: ignore[arg-type]
    else:
        train_sharded(peft_model, arguments, DataLoader(rows[:140], 4, collate_fn=collator), callback)  # type: ignore[arg-type]
    assert callback.result is not None
    weights = {name: one for name, one in peft_model.named_parameters() if "lora_" in name}
    assert any(isinstance(one, DTensor) for one in weights.values()) == (way == "fsdp2")
    whole = {name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in weights.items()}
    assert all(one.grad is None for one in weights.values())
    (out / f"{number}.json").write_text(callback.result.answer.model_dump_json())
    if number == 0:
        torch.save({name: one.detach().cpu() for name, one in whole.items()}, out / "after.pt")


def train_sharded(model: Any, arguments: TrainingArguments, loader: Any, callback: SmallestAdapter) -> None:
    """As accelerate shards a model by FSDP2, which it does not on a CPU."""
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    state, control = TrainerState(is_world_process_zero=torch.distributed.get_rank() == 0), TrainerControl()
    given = {"model": model, "train_dataloader": loader, "eval_dataloader": None}
    callback.on_train_begin(arguments, state, control, **given)
    for batch in islice(loader, 12):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step += 1
    callback.on_train_end(arguments, state, control, **given)


def zero3(number: int, port: int, model: Path, rows: list[Any], out: Path) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}
    torch.set_num_threads(1)
    deepspeed = import_module("deepspeed")
    deepspeed.init_distributed(dist_backend="gloo")
    config = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
    }
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=12, learning_rate=1e-2, per_device_train_batch_size=4, save_strategy="no", report_to=[],
        disable_tqdm=True, dataloader_pin_memory=False, deepspeed=config,
    )  # fmt: skip
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)  # each process holds a part of it
    peft_model: Any = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model), padding=True)
    trainer = Trainer(peft_model, arguments, collator, rows[:140], callbacks=[SmallestAdapter(rows[140:], margin=0.1)])  # type: ignore[arg-type]
    trainer.train()
    weights = {name: one for name, one in peft_model.named_parameters() if "lora_" in name}
    assert all(one.numel() == 0 for one in weights.values())
    with deepspeed.zero.GatheredParameters(list(weights.values())):
        after = {name.replace(".default.", "."): one.detach().clone() for name, one in weights.items()}
    if number == 0:
        torch.save(after, out / "after.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # DeepSpeed's
def test_zero3_is_kept_for_a_fresh_process(
    model_folder: Path, completion_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its empty parameters are gathered; the adapter that is kept is the trained one, and a fresh process measures it."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    multiprocessing.spawn(
        zero3, args=(free_port(), model_folder, rows_of(model_folder, completion_file), tmp_path), nprocs=2
    )
    (trained,) = (tmp_path / "rightrank" / "trials").iterdir()
    kept = load_file(trained / "adapter_model.safetensors")
    after = torch.load(tmp_path / "after.pt", weights_only=True)
    assert kept.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in kept.items())
    assert any(value.abs().max() > 0 for name, value in kept.items() if "lora_B" in name)
    assert "has rank" in measure_again(tmp_path / "rightrank")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def rows_of(model_folder: Path, completion_file: Path) -> list[Any]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = []
    for line in completion_file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


@pytest.fixture(scope="module")
def trained(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each way."""
    out = tmp_path_factory.mktemp("processes")
    rows = rows_of(model_folder, completion_file)
    multiprocessing.start_processes(process, args=(free_port(), model_folder, rows, out), nprocs=2, start_method="fork")
    return out


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_give_one_answer(way: str, trained: Path, model_folder: Path, completion_file: Path) -> None:
    """Both have the same answer; it is that of the adapter that was saved; and the factors are those that were trained."""
    rows, out = rows_of(model_folder, completion_file), trained / way
    answers = [json.loads((out / f"{number}.json").read_text()) for number in range(2)]
    notes = [answer.pop("notes") for answer in answers]  # the last has the process's own time and memory
    assert answers[0] == answers[1]
    assert notes[0][:-1] == notes[1][:-1]
    batches = [{key: torch.tensor([value]) for key, value in row.items()} for row in rows[140:]]
    values = {}
    trained_id = f"trials/{answers[0]['trained_id']}"
    for name in (trained_id, "adapter"):
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        loaded: Any = PeftModel.from_pretrained(base, out / "rightrank" / name).eval()
        values[name] = HeldOutBatches(loaded, batches).scores().loss
        if name == trained_id:
            after = torch.load(out / "after.pt", weights_only=True)
            assert after.keys() == {one for one, _ in loaded.named_parameters() if "lora_" in one}
            assert all(torch.equal(value, after[one]) for one, value in loaded.named_parameters() if one in after)
    assert values["adapter"] - values[trained_id] == pytest.approx(answers[0]["difference"], abs=1e-4)
    assert answers[0]["rank"] < 16
