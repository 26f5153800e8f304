"""A training by another program, its end by rightrank's door into it, and the check on unseen rows by plain PEFT.

python -m benchmarks.in_training.doors --door ms-swift --model FOLDER --data rows.jsonl --work FOLDER

Rows of prompt and completion. Each program trains as its users start it, at the same rank, on the same rows: LLaMA-Factory, ms-swift and axolotl
by their own entry points, Lightning and a loop of accelerate in this process, mlx-lm by its command and `rightrank resize`. It runs in an
environment that has the program. The check of mlx-lm is its own loss on its own test split, before and after.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.in_training.measure import LINEAR, cost_of, language_score, paired
from benchmarks.machine import machine

HERE = Path(__file__).parent
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--door", choices=tuple(DOORS), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--task", default="repetition", help="what the rows are, for the results")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--blocks", type=int, default=0, help="of the last blocks; 0: all (Lightning, accelerate, mlx-lm)"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--unseen", type=int, default=300)
    parser.add_argument("--margin", type=float, default=0.005)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=HERE / "doors.jsonl")
    given = parser.parse_args()
    given.work.mkdir(parents=True)
    rows = [json.loads(line) for line in given.data.read_text(encoding="utf-8").splitlines()]
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    random.Random(0).shuffle(rows)
    held_out, unseen, train = (
        rows[: given.held_out],
        rows[given.held_out : given.held_out + given.unseen],
        rows[given.held_out + given.unseen :],
    )
    package, door = DOORS[given.door]
    started = time.monotonic()
    found = door(train, held_out, unseen, given)
    document = {
        "trainer": f"{given.door} {version(package)}",
        "task": given.task,
        "data": given.data.stem,
        "data_sha256": sha256(given.data.read_bytes()).hexdigest(),
        "model": given.model.name,
        "trained_rank": given.rank,
        "blocks": given.blocks,
        "steps": given.steps,
        "batch_size": given.batch_size,
        "learning_rate": given.learning_rate,
        "seed": given.seed,
        "metric": "loss",
        "whole_seconds": round(time.monotonic() - started, 1),
    }
    with given.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(document | found | {"machine": machine()}) + "\n")
    print(json.dumps(document | found, indent=1))


def answered(folder: Path, unseen: Sequence[Row], given: argparse.Namespace) -> dict[str, Any]:
    """What the end wrote, and the loss of both adapters on unseen rows by plain PEFT."""
    document = json.loads((folder / "decision.json").read_text(encoding="utf-8"))
    score = language_score(given, unseen)
    answer = document["adapter_answer"]
    sides = [score(folder / name, unseen) for name in (f"trials/{answer['trained_id']}", "adapter")]
    return _answer(answer) | {
        "notes": answer["notes"],
        "cost": cost_of(folder),
        "unseen": paired(*sides),
    }


def _answer(answer: Row) -> dict[str, Any]:
    return {
        "margin": answer["margin"],
        "rank": answer["rank"],
        "difference": answer["difference"],
        "difference_high": answer["difference_high"],
        "candidates": {
            one["rank"]: [one["value"], one["difference"], one["difference_high"]] for one in answer["candidates"]
        },
    }


def _write(file: Path, rows: Sequence[Row]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def _messages(rows: Sequence[Row]) -> list[Row]:
    sides = [(("user", row["prompt"]), ("assistant", row["completion"])) for row in rows]
    return [{"messages": [{"role": role, "content": text} for role, text in pair]} for pair in sides]


def _run(command: Sequence[str], log: Path) -> None:
    with log.open("w", encoding="utf-8") as file:
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=True)


def by_llama_factory(train: Sequence[Row], held_out: Sequence[Row], unseen: Sequence[Row], given: Any) -> Row:
    from llamafactory.train.tuner import run_exp

    from rightrank import SmallestAdapter

    columns = {"columns": {"prompt": "prompt", "response": "completion"}}
    sets = {name: columns | {"file_name": f"{name}.jsonl"} for name in ("train", "held_out")}
    (given.work / "dataset_info.json").write_text(json.dumps(sets))
    _write(given.work / "train.jsonl", train)
    _write(given.work / "held_out.jsonl", held_out)
    arguments = {
        "model_name_or_path": str(given.model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": given.rank,
        "lora_alpha": 32,
        "lora_target": "all",
        "template": "empty",
        "dataset_dir": str(given.work),
        "dataset": "train",
        "eval_dataset": "held_out",
        "cutoff_len": given.length,
        "output_dir": str(given.work / "outputs"),
        "max_steps": given.steps,
        "learning_rate": given.learning_rate,
        "per_device_train_batch_size": given.batch_size,
        "save_strategy": "no",
        "report_to": "none",
        "seed": given.seed,
        "use_cpu": True,
    }
    run_exp(arguments, callbacks=[SmallestAdapter(margin=given.margin)])
    return answered(given.work / "outputs" / "rightrank", unseen, given)


def by_ms_swift(train: Sequence[Row], held_out: Sequence[Row], unseen: Sequence[Row], given: Any) -> Row:
    plugin = given.work / "plugin.py"
    plugin.write_text(
        "from swift.callbacks import callbacks_map\n\nfrom rightrank import SmallestAdapter\n\n"
        'callbacks_map["rightrank"] = lambda args, trainer: SmallestAdapter()\n'
    )
    command = [
        *("swift", "sft", "--model", str(given.model), "--model_type", "llama", "--template", "dummy"),
        *("--dataset", str(_write(given.work / "train.jsonl", _messages(train)))),
        *("--val_dataset", str(_write(given.work / "held_out.jsonl", _messages(held_out)))),
        *(
            "--tuner_type",
            "lora",
            "--lora_rank",
            str(given.rank),
            "--lora_alpha",
            "32",
            "--target_modules",
            "all-linear",
        ),
        *("--max_steps", str(given.steps), "--per_device_train_batch_size", str(given.batch_size)),
        *("--learning_rate", str(given.learning_rate), "--max_length", str(given.length), "--torch_dtype", "float32"),
        *("--output_dir", str(given.work / "outputs"), "--add_version", "false", "--seed", str(given.seed)),
        *("--save_strategy", "no", "--eval_strategy", "no", "--report_to", "none", "--use_cpu", "true"),
        *("--dataset_num_proc", "1", "--dataloader_num_workers", "0", "--gradient_checkpointing", "false"),
        *("--external_plugins", str(plugin), "--callbacks", "rightrank"),
    ]
    _run([str(Path(sys.executable).parent / "swift"), *command[1:]], given.work / "log.txt")
    return answered(given.work / "outputs" / "rightrank", unseen, given)


def by_axolotl(train: Sequence[Row], held_out: Sequence[Row], unseen: Sequence[Row], given: Any) -> Row:
    import yaml

    def texts(rows: Sequence[Row]) -> list[Row]:
        return [{"text": row["prompt"] + row["completion"]} for row in rows]

    sets = {
        name: [
            {"path": str(_write(given.work / f"{name}.jsonl", texts(rows))), "ds_type": "json", "type": "completion"}
        ]
        for name, rows in (("datasets", train), ("test_datasets", held_out))
    }
    config = {
        "base_model": str(given.model),
        "plugins": ["rightrank.interop.axolotl.SmallestAdapterPlugin"],
        "rightrank_margin": given.margin,
        "adapter": "lora",
        "lora_r": given.rank,
        "lora_alpha": 32,
        "lora_target_linear": True,
        "sequence_len": given.length,
        "output_dir": str(given.work / "outputs"),
        "dataset_prepared_path": str(given.work / "prepared"),
        "dataset_num_proc": 1,
        "max_steps": given.steps,
        "micro_batch_size": given.batch_size,
        "gradient_accumulation_steps": 1,
        "optimizer": "adamw_torch",
        "lr_scheduler": "linear",
        "learning_rate": given.learning_rate,
        "save_strategy": "no",
        "eval_strategy": "no",
        "bf16": False,
        "seed": given.seed,
        "sdp_attention": True,
        "lora_mlp_kernel": False,  # they run on a GPU only
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
    }
    (given.work / "config.yml").write_text(yaml.safe_dump(config | sets))
    _run([sys.executable, "-m", "axolotl.cli.train", str(given.work / "config.yml")], given.work / "log.txt")
    whole = [{"prompt": "", "completion": row["prompt"] + row["completion"]} for row in unseen]
    return answered(given.work / "outputs" / "rightrank", whole, given)


def _adapted(given: Any) -> tuple[Any, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(given.seed)
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    count = base.config.num_hidden_layers
    last = list(range(count - given.blocks, count)) if given.blocks else None
    targets = "all-linear" if last is None else LINEAR  # PEFT takes layers beside names alone
    config = LoraConfig(
        r=given.rank, lora_alpha=32, target_modules=targets, layers_to_transform=last, task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config), AutoTokenizer.from_pretrained(given.model)


def _loader(tokenizer: Any, rows: Sequence[Row], given: Any, shuffle: bool) -> Any:
    from torch.utils.data import DataLoader
    from transformers import DataCollatorForSeq2Seq

    encoded = []
    for row in rows:
        begin = len(tokenizer(row["prompt"])["input_ids"])
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"][: given.length]
        encoded.append({"input_ids": ids, "labels": [-100] * min(begin, len(ids)) + ids[begin:]})
    return DataLoader(
        encoded,  # type: ignore[arg-type]
        given.batch_size,
        shuffle,
        collate_fn=DataCollatorForSeq2Seq(tokenizer),
    )


def by_lightning(train: Sequence[Row], held_out: Sequence[Row], unseen: Sequence[Row], given: Any) -> Row:
    import lightning
    import torch

    from rightrank.interop.lightning import SmallestAdapter

    model, tokenizer = _adapted(given)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, _: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([one for one in self.parameters() if one.requires_grad], lr=given.learning_rate)

    callback = SmallestAdapter(_loader(tokenizer, held_out, given, False), margin=given.margin)
    trainer = lightning.Trainer(
        max_steps=given.steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[callback], default_root_dir=given.work / "outputs",
    )  # fmt: skip
    trainer.fit(Module(), _loader(tokenizer, train, given, True))
    return answered(given.work / "outputs" / "rightrank", unseen, given)


def by_accelerate(train: Sequence[Row], held_out: Sequence[Row], unseen: Sequence[Row], given: Any) -> Row:
    import torch
    from accelerate import Accelerator

    from rightrank.interop.smallest import keep_smallest

    model, tokenizer = _adapted(given)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=given.learning_rate)
    model, optimizer, batches = accelerator.prepare(model, optimizer, _loader(tokenizer, train, given, True))
    started, step = time.monotonic(), 0
    while step < given.steps:
        for batch in batches:
            if step < given.steps:
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
    keep_smallest(
        accelerator.unwrap_model(model), _loader(tokenizer, held_out, given, False), batches,
        out=given.work / "outputs" / "rightrank", margin=given.margin, seconds=time.monotonic() - started,
    )  # fmt: skip
    return answered(given.work / "outputs" / "rightrank", unseen, given)


def by_mlx(train: Sequence[Row], held_out: Sequence[Row], unseen: Sequence[Row], given: Any) -> Row:
    import yaml

    from rightrank import resize

    for name, rows in (("train", train), ("valid", held_out), ("test", unseen)):
        _write(
            given.work / f"{name}.jsonl", _messages(rows)
        )  # mlx-lm puts prompts and completions through a chat template too
    trained, small = given.work / "outputs", given.work / "small"
    config = {
        "model": str(given.model),
        "train": True,
        "data": str(given.work),
        "num_layers": given.blocks or -1,
        "batch_size": given.batch_size,
        "iters": given.steps,
        "val_batches": 1,
        "learning_rate": given.learning_rate,
        "adapter_path": str(trained),
        "max_seq_length": given.length,
        "mask_prompt": True,
        "seed": given.seed,
        "lora_parameters": {"rank": given.rank, "scale": 32 / given.rank, "dropout": 0.0},
    }
    (given.work / "config.yaml").write_text(yaml.safe_dump(config))
    program = [sys.executable, "-m", "mlx_lm", "lora"]
    started = time.monotonic()
    _run([*program, "-c", str(given.work / "config.yaml")], given.work / "log.txt")
    trained_seconds = time.monotonic() - started
    started = time.monotonic()
    resized = resize(
        trained, small, data=given.work / "valid.jsonl", train=given.work / "train.jsonl", margin=given.margin
    )
    seconds = time.monotonic() - started
    own = {}
    for name, folder in (("before", trained), ("after", small)):
        log = given.work / f"{name}.txt"
        test = ["--test", "--test-batches", "-1", "--mask-prompt", "--max-seq-length", str(given.length)]
        test += ["--model", str(given.model), "--data", str(given.work), "--batch-size", str(given.batch_size)]
        _run([*program, *test, "--adapter-path", str(folder)], log)
        own[name] = float(re.findall(r"Test loss ([\d.]+)", log.read_text(encoding="utf-8"))[-1])
    assert resized.answer is not None
    cost = {
        "seconds": round(seconds, 2),
        "training_seconds": round(trained_seconds, 2),
        "share": round(seconds / trained_seconds, 4),
        "examples": resized.scored_examples,
    }
    return _answer(resized.answer.model_dump(mode="json")) | {
        "notes": resized.notes,
        "cost": cost,
        "loss_of_the_program": own,
    }


DOORS: dict[str, tuple[str, Callable[[Sequence[Row], Sequence[Row], Sequence[Row], Any], Row]]] = {
    "LLaMA-Factory": ("llamafactory", by_llama_factory),
    "ms-swift": ("ms-swift", by_ms_swift),
    "axolotl": ("axolotl", by_axolotl),
    "Lightning": ("lightning", by_lightning),
    "accelerate": ("accelerate", by_accelerate),
    "mlx-lm": ("mlx-lm", by_mlx),
}


if __name__ == "__main__":
    main()
