"""Names that users of other trainers give to settings, and the settings that they mean."""

from __future__ import annotations

HABITS = {
    **dict.fromkeys(("lr", "learning_rate"), "learning_rates"),
    **dict.fromkeys(("rank", "r", "lora_r", "lora_rank"), "ranks"),
    **dict.fromkeys(("seed",), "seeds"),
    **dict.fromkeys(("epochs", "num_epochs"), "num_train_epochs"),
    **dict.fromkeys(("steps", "max_iters"), "max_steps"),
    **dict.fromkeys(("alpha",), "lora_alpha"),
    **dict.fromkeys(("dropout",), "lora_dropout"),
    **dict.fromkeys(("layers",), "layers_to_transform"),
    **dict.fromkeys(("targets", "lora_target_modules"), "target_modules"),
    **dict.fromkeys(("max_length", "max_seq_length", "cutoff_len"), "seq_len"),
    **dict.fromkeys(("per_device_train_batch_size", "train_batch_size"), "batch_size"),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype"), "dtype"),
    **dict.fromkeys(("gpus", "num_workers"), "workers"),
    **dict.fromkeys(("time", "time_budget", "budget"), "budget_hours"),
    **dict.fromkeys(("memory",), "memory_bytes"),
}
