"""transformers' `Trainer` with a `RankSelectionCallback`.

python examples/transformers_trainer.py --model path/to/model --data data.jsonl     (rows of prompt and completion)
"""

from __future__ import annotations

from common import options, rows_of, tokenised
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from rightrank import TrialResult, TrialTask, select_rank_with
from rightrank.interop.transformers import RankSelectionCallback, causal_item_losses, padded_batches

arguments = options()
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
rows = tokenised(tokenizer, rows_of(arguments.data))
held_out, training = rows[: arguments.held_out], rows[arguments.held_out :]


def train(task: TrialTask) -> TrialResult:
    base = AutoModelForCausalLM.from_pretrained(arguments.model)
    config = LoraConfig(
        r=task.rank, lora_alpha=int(task.lora_alpha), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    batches = padded_batches(held_out, tokenizer.pad_token_id, 16)
    callback = RankSelectionCallback(task=task, score_items=lambda trained: causal_item_losses(trained, batches))
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
    Trainer(
        model, settings, data_collator=collator, train_dataset=training, eval_dataset=held_out, callbacks=[callback]
    ).train()
    model.save_pretrained(task.folder)
    return callback.result()


if __name__ == "__main__":
    selected = select_rank_with(
        train, arguments.out, ranks=(1, 4, 16), learning_rates=(1e-3, 3e-3), max_steps=arguments.steps
    )
    print(selected.decision.sentence)
