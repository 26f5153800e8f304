"""Shared by the examples: options, rows of text, tokenized rows, and batches of them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import DataCollatorForSeq2Seq


def options(needs_data: bool = True) -> argparse.Namespace:
    """`--model`, `--data`, `--out`, and sizes small enough for a laptop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=needs_data, help="model folder or hub name")
    parser.add_argument("--data", type=Path, required=needs_data, help="JSONL file")
    parser.add_argument("--out", default="run", help="run folder")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--held-out", type=int, default=100)
    return parser.parse_args()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def tokenised(tokenizer: Any, rows: list[dict[str, Any]], max_length: int = 128) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of prompt and completion, with the loss on the completion only."""
    made = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids, labels = (prompt + completion)[:max_length], ([-100] * len(prompt) + completion)[:max_length]
        if labels[-1] != -100:
            made.append({"input_ids": ids, "labels": labels})
    return made


def batches_of(tokenizer: Any, rows: list[dict[str, list[int]]], size: int) -> list[Any]:
    """The rows in their order, `size` in a batch, padded with labels of -100."""
    collate = DataCollatorForSeq2Seq(tokenizer)
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]
