"""Write small valid files, with which fuzzing starts."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from rightrank import TrialResult, TrialTask, select_rank_with


def make_data_files() -> list[tuple[str, bytes]]:
    """`(file type, content)` of every form and type."""
    text = [{"text": f"the cat sat on mat {n}"} for n in range(24)]
    pairs = [{"prompt": f"say {n} : ", "completion": f"{n} it is"} for n in range(24)]
    talks = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}"}]}
        for n in range(24)
    ]
    labels = [{"text": f"a cat {n}", "label": n % 2, "group": n} for n in range(24)]
    jsonl = [(".jsonl", _encode_jsonl(rows)) for rows in (text, pairs, talks, labels)]
    return [
        *jsonl,
        (".json", json.dumps(pairs).encode()),
        (".csv", _encode_csv(labels, ",")),
        (".tsv", _encode_csv(pairs, "\t")),
        (".parquet", _encode_parquet(text)),
    ]


def make_result_files() -> list[tuple[str, bytes]]:
    rows = [
        {"rank": rank, "eval_loss": 2 + 0.3 / rank + seed / 500, "lr": 1e-3, "seed": seed, "train_loss": 1.9}
        for rank in (1, 4, 16)
        for seed in (0, 1)
    ]
    items = [
        {"rank": rank, "eval_loss": 2 + 0.2 / (rank + 1) + item / 10, "item": f"i{item}", "tokens": 3 + item}
        for rank in (0, 2, 8)
        for item in range(4)
    ]
    stated_deviations = [{"r": rank, "accuracy": 70 + rank / 4, "std": 0.5, "n_seeds": 3} for rank in (2, 8, 32)]
    nested = [
        {"config": {"lora": {"r": rank}}, "summary": {"eval/loss": 2 + 1 / rank}, "_step": rank} for rank in (2, 4)
    ]
    ppl = [{"rank": rank, "ppl": 9 + 1 / rank, "step": step} for rank in (1, 2, 4, 8) for step in (10, 20, 30)]
    return [
        (".csv", _encode_csv(rows, ",")),
        (".csv", _encode_csv(stated_deviations, ",")),
        (".tsv", _encode_csv(items, "\t")),
        (".jsonl", _encode_jsonl(rows)),
        (".jsonl", _encode_jsonl(nested)),
        (".json", json.dumps(items).encode()),
        (".json", json.dumps(ppl).encode()),
        (".parquet", _encode_parquet(rows)),
    ]


def make_adapters() -> list[tuple[bytes, bytes, bytes]]:
    """`(adapter_config.json, safetensors header, data)`: plain, and with what PEFT can add."""
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "b"}
    patterned = plain | {
        "use_rslora": True,
        "use_dora": True,
        "rank_pattern": {"layers.1.q_proj": 1},
        "alpha_pattern": {"^a.*q_proj": 8.0},
        "init_lora_weights": "pissa",
        "bias": "lora_only",
        "modules_to_save": ["lm_head"],
    }
    prefix = "base_model.model.layers"
    shapes = {f"{prefix}.0.q_proj.lora_A.weight": [2, 4], f"{prefix}.0.q_proj.lora_B.weight": [3, 2]}
    more = shapes | {
        f"{prefix}.1.q_proj.lora_A.weight": [1, 4],
        f"{prefix}.1.q_proj.lora_B.weight": [3, 1],
        f"{prefix}.1.q_proj.lora_magnitude_vector": [3],
        f"{prefix}.1.q_proj.lora_B.bias": [3],
        "base_model.model.lm_head.weight": [2, 2],
    }
    return [
        (json.dumps(config).encode(), *_encode_safetensors(tensor_shapes))
        for config, tensor_shapes in ((plain, shapes), (patterned, more))
    ]


def _encode_safetensors(shapes: dict[str, list[int]]) -> tuple[bytes, bytes]:
    import numpy as np
    from safetensors.numpy import save

    generator = np.random.default_rng(0)
    content = save({name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})
    length = int.from_bytes(content[:8], "little")
    return content[8 : 8 + length], content[8 + length :]


def make_model_configs() -> list[bytes]:
    small: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    gpt2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return [
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **small}).encode(),
        json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **gpt2}).encode(),
        json.dumps(
            {"model_type": "qwen2", "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, **small}
        ).encode(),
    ]


@functools.cache
def make_journals() -> list[bytes]:
    """Journals of runs of a made-up trainer, few examples so that lines stay short: two that ended and one that did not."""
    written = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (ranks, rates, seeds) in enumerate(
            [((1, 4, 16), (1e-3, 3e-3), (0,)), ((2, 8), (1e-3,), (0, 1)), ((1, 2, 4), (1e-3,), (0,))]
        ):
            out = Path(folder) / str(number)
            select_rank_with(
                _train, out, ranks=ranks, learning_rates=rates, seeds=seeds, metric="loss", strategy="grid"
            )
            lines = (out / "journal.jsonl").read_bytes().splitlines(keepends=True)
            written.append(b"".join(lines if number != 1 else lines[:-1]))
    return written


def _train(task: TrialTask) -> TrialResult:
    """Return a loss that falls with rank; rank 8 diverges with its second seed."""
    loss = 3 + 0.2 / (1 + task.rank) + task.learning_rate
    if (task.rank, task.seed) == (8, 1):
        loss = math.nan
    return TrialResult(metrics={"loss": loss}, example_scores=[loss - 0.5, loss, loss + 0.5], example_weights=[3, 5, 3])


def _encode_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _encode_csv(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _encode_parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()
