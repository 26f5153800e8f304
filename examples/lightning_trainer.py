"""Select a rank with PyTorch Lightning: a module around a PEFT model, trained by `lightning.Trainer`.

python examples/lightning_trainer.py --model path/to/model --data data.jsonl     (rows of prompt and completion)
"""

from __future__ import annotations

import lightning
import torch
from common import build_batches, parse_options, read_rows, tokenize_rows
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from rightrank import TrialResult, TrialTask, select_rank_with
from rightrank.trainers.custom_trainer import causal_example_losses

arguments = parse_options()
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
rows = tokenize_rows(tokenizer, read_rows(arguments.data))
held_out, training = rows[: arguments.held_out], rows[arguments.held_out :]


class LoraModule(lightning.LightningModule):
    """The adapted model, its loss and its optimizer."""

    def __init__(self, model: PeftModel, learning_rate: float) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)


def train(task: TrialTask) -> TrialResult:
    lightning.seed_everything(task.seed, verbose=False)
    base = AutoModelForCausalLM.from_pretrained(arguments.model)
    config = LoraConfig(
        r=task.rank, lora_alpha=int(task.lora_alpha), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    module = LoraModule(get_peft_model(base, config), task.learning_rate)
    order = torch.Generator().manual_seed(task.seed)  # the same batches for every rank
    batches = DataLoader(
        training, batch_size=8, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer), generator=order
    )
    trainer = lightning.Trainer(
        max_steps=task.steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches)
    module.model.save_pretrained(task.folder)
    return causal_example_losses(module.model, build_batches(tokenizer, held_out, 16))


if __name__ == "__main__":
    selected = select_rank_with(
        train, arguments.out, ranks=(1, 4, 16), learning_rates=(1e-3, 3e-3), max_steps=arguments.steps
    )
    print(selected.decision.sentence)
