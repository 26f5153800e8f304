"""Select a rank with TRL's `SFTTrainer`.

python examples/trl_sft.py --model path/to/model --data data.jsonl     (rows of prompt and completion)
"""

from __future__ import annotations

from common import build_batches, parse_options, read_rows, tokenize_rows
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from rightrank import TrialResult, TrialTask, select_rank_with
from rightrank.trainers.custom_trainer import causal_example_losses

arguments = parse_options()
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
rows = read_rows(arguments.data)
held_out = tokenize_rows(tokenizer, rows[: arguments.held_out])
training = Dataset.from_list(rows[arguments.held_out :])


def train(task: TrialTask) -> TrialResult:
    settings = SFTConfig(
        output_dir=str(task.folder / "trainer"),
        learning_rate=task.learning_rate,
        max_steps=task.steps,
        seed=task.seed,
        max_length=128,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(arguments.model),
        args=settings,
        train_dataset=training,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=task.rank, lora_alpha=int(task.lora_alpha), target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trainer.model.save_pretrained(task.folder)
    return causal_example_losses(trainer.model, build_batches(tokenizer, held_out, 16))


if __name__ == "__main__":
    selected = select_rank_with(
        train, arguments.out, ranks=(1, 4, 16), learning_rates=(1e-3, 3e-3), max_steps=arguments.steps
    )
    print(selected.decision.sentence)
