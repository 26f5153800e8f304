"""Select a rank with the `Trainer` of transformers.

python examples/transformers_trainer.py --model path/to/model --data data.jsonl     (rows of prompt and completion)
"""

from __future__ import annotations

from common import build_batches, parse_options, read_rows, tokenize_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from rightrank import EvalPoint, TrialResult, TrialTask, select_rank_with
from rightrank.trainers.custom_trainer import causal_example_losses

arguments = parse_options()
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
rows = tokenize_rows(tokenizer, read_rows(arguments.data))
held_out, training = rows[: arguments.held_out], rows[arguments.held_out :]


def train(task: TrialTask) -> TrialResult:
    base = AutoModelForCausalLM.from_pretrained(arguments.model)
    config = LoraConfig(
        r=task.rank, lora_alpha=int(task.lora_alpha), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    settings = TrainingArguments(
        output_dir=str(task.folder / "trainer"),
        learning_rate=task.learning_rate,
        max_steps=task.steps,
        seed=task.seed,
        eval_strategy="steps",
        eval_steps=max(1, task.steps // 2),
        logging_steps=max(1, task.steps // 4),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    collator = DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(model, settings, data_collator=collator, train_dataset=training, eval_dataset=held_out)
    trainer.train()
    model.save_pretrained(task.folder)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    points = [EvalPoint(step=look["step"], value=look["eval_loss"]) for look in evaluations]
    return causal_example_losses(model, build_batches(tokenizer, held_out, 16)).model_copy(update={"points": points})


if __name__ == "__main__":
    selected = select_rank_with(
        train, arguments.out, ranks=(1, 4, 16), learning_rates=(1e-3, 3e-3), max_steps=arguments.steps
    )
    print(selected.decision.sentence)
