"""Helpers of the examples: command-line options, rows of text, tokenized rows, and batches."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import DataCollatorForSeq2Seq


def parse_options(needs_data: bool = True) -> argparse.Namespace:
    """Parse `--model`, `--data`, `--out`, and sizes that are small enough for a laptop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=needs_data, help="model folder or hub name")
    parser.add_argument("--data", type=Path, required=needs_data, help="JSONL file")
    parser.add_argument("--out", default="run", help="run folder")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--held-out", type=int, default=100)
    return parser.parse_args()


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def tokenize_rows(tokenizer: Any, rows: list[dict[str, Any]], max_length: int = 128) -> list[dict[str, list[int]]]:
    """Return `input_ids` and `labels` of prompt and completion, with the loss only on the completion."""
    tokenized = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids, labels = (prompt + completion)[:max_length], ([-100] * len(prompt) + completion)[:max_length]
        if labels[-1] != -100:
            tokenized.append({"input_ids": ids, "labels": labels})
    return tokenized


def build_batches(tokenizer: Any, rows: list[dict[str, list[int]]], size: int) -> list[Any]:
    """Split the rows, in order, into batches of `size` examples, padded with labels of -100."""
    collate = DataCollatorForSeq2Seq(tokenizer)
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]
