"""PEFT's public case again: an adapter of rank 64 truncated to 48, 32, 16 and 8 and measured on GSM8K, by singular values, one run each.

python -m benchmarks.in_training.gsm8k --base meta-llama/Llama-3.2-3B --adapter ADAPTER --train train.jsonl --test test.jsonl --out gsm8k.json

Every rank is truncated twice, by singular values and by K-FAC over training rows, and every question is answered by every adapter, so that
the differences are paired over the questions: an interval in place of one run. Rows have `query` and `response` (training, as MetaMathQA
has them) and `question` and `answer` (test, as GSM8K has them, the number after ####). For a GPU; not run on one yet.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import machine
from rightrank.adapters.compare import finished_trial
from rightrank.adapters.live import LiveAdapter, as_it_came, gather, put_in_place
from rightrank.adapters.resize import capped, write_resized
from rightrank.decision.adapter import Criterion, adapter_answer
from rightrank.models.adapter_files import open_adapter
from rightrank.schema.trials import TrialFinished
from rightrank.train.evaluation import Scores

TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
MOMENT_TOKENS = 16_384


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", type=Path, required=True, help="of rank 64, trained by PEFT's method comparison")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", default="48,32,16,8")
    parser.add_argument("--margin", type=float, default=0.01)
    parser.add_argument("--questions", type=int, default=1319)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=300)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(given.base, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(given.base, dtype=getattr(torch, given.dtype)).to(device)
    model: Any = PeftModel.from_pretrained(base, given.adapter).eval()
    tests = _rows(given.test)[: given.questions]
    found = {how: _walk(model, tokenizer, given, tests, how) for how in ("svd", "kfac")}
    found["machine"] = machine() | {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    given.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def _walk(model: Any, tokenizer: Any, given: argparse.Namespace, tests: Sequence[dict[str, str]], how: str) -> Any:
    """Every rank's accuracy and its paired 95% bounds against rank 64; no rank is left out where one fails."""
    adapter = open_adapter(given.adapter)
    train = _batches(tokenizer, _rows(given.train)) if how == "kfac" else []
    live = LiveAdapter(model, [], train, moment_tokens=MOMENT_TOKENS)
    top = f"r{adapter.rank}"
    trials: list[TrialFinished] = []
    with as_it_came(model, "default"), tempfile.TemporaryDirectory() as working:
        moments = gather(live).moments
        for rank in (adapter.rank, *map(int, given.ranks.split(","))):
            folder = Path(working) / f"r{rank}"
            if rank < adapter.rank:
                write_resized(adapter, folder, capped(adapter, rank, moments), moments)
                put_in_place(model, "default", open_adapter(folder))
            right = _right(model, tokenizer, given, tests)
            scores = Scores([0.0] * len(right), [1] * len(right), {"accuracy": right})
            parent = top if rank < adapter.rank else None
            trials.append(finished_trial(f"r{rank}", rank, scores, "accuracy", truncate_from=parent))
    answer = adapter_answer(trials, Criterion("accuracy", higher_is_better=True, margin=given.margin))
    assert answer is not None
    return {
        "sentence": answer.sentence,
        "candidates": [
            {"rank": one.rank, "accuracy": one.value, "worse_by": one.difference, "low": one.difference_low, "high": one.difference_high}
            for one in answer.candidates
        ],
    }  # fmt: skip


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _batches(tokenizer: Any, rows: Sequence[dict[str, str]]) -> list[dict[str, torch.Tensor]]:
    """Training rows one by one, until there are tokens enough; labels on the response alone."""
    found, tokens = [], 0
    for row in rows:
        prompt = TEMPLATE.format(query=row["query"])
        begin, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(f"{prompt} {row['response']}")["input_ids"][:768]
        labels = [-100] * min(begin, len(ids)) + ids[begin:]
        found.append({"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])})
        tokens += len(ids)
        if tokens >= MOMENT_TOKENS:
            break
    return found


@torch.no_grad()
def _right(model: Any, tokenizer: Any, given: argparse.Namespace, tests: Sequence[dict[str, str]]) -> list[float]:
    """1.0 for each question whose last number is the answer's, by greedy decoding."""
    right = []
    for start in range(0, len(tests), given.batch_size):
        rows = tests[start : start + given.batch_size]
        prompts = tokenizer(
            [TEMPLATE.format(query=row["question"]) for row in rows], padding=True, return_tensors="pt"
        ).to(model.device)
        prompts.pop("token_type_ids", None)
        written = model.generate(
            **prompts, max_new_tokens=given.new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        texts = tokenizer.batch_decode(written[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        right += [
            float(_last_number(text) == _last_number(row["answer"])) for text, row in zip(texts, rows, strict=True)
        ]
    return right


def _last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


if __name__ == "__main__":
    main()
