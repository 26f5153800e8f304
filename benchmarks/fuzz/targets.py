"""Fuzz targets: every reader of a user's file, with valid files to start from."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.fuzz import seeds
from benchmarks.tiny import make_tokenizer
from rightrank.api.adapters import inspect
from rightrank.api.folders import status
from rightrank.api.runs import decide
from rightrank.bases.safetensors_files import find_shards, open_tensors
from rightrank.cli.options import gather_settings
from rightrank.data.rows import FILE_TYPES
from rightrank.data.splits import load_data
from rightrank.evaluation.tokens import encode_splits
from rightrank.report.answer import build_answers, format_decision
from rightrank.report.html import render_report
from rightrank.runs.folder import RunFolder, seal
from rightrank.schema.errors import InputError
from rightrank.schema.settings import PlanSettings, SelectSettings

PART = b"\n--part--\n"  # between the files of one input


@dataclass(frozen=True, slots=True)
class Target:
    """A reader, and inputs that it reads well."""

    read: Callable[[bytes, Path], None]
    seeds: Callable[[], list[bytes]]


@functools.cache
def _make_tokenizer() -> Any:
    return make_tokenizer()


def _get_file_type(data: bytes) -> tuple[str, bytes]:
    """Return the file type that the first byte selects, and the remaining bytes."""
    return FILE_TYPES[data[0] % len(FILE_TYPES)] if data else FILE_TYPES[0], data[1:]


def _split_sections(data: bytes, count: int) -> list[bytes]:
    sections = data.split(PART, count - 1)
    return sections + [b""] * (count - len(sections))


def read_data(data: bytes, folder: Path) -> None:
    """Read rows, split them, and tokenize them."""
    suffix, body = _get_file_type(data)
    path = folder / f"data{suffix}"
    path.write_bytes(body)
    settings = SelectSettings(batch_size=1, test_fraction=0.3, validation_fraction=0.3, seq_len=64)
    splits = load_data(path, settings)
    encode_splits(splits, SimpleNamespace(tokenizer=_make_tokenizer()), settings)  # type: ignore[arg-type]


def read_results(data: bytes, folder: Path) -> None:
    suffix, body = _get_file_type(data)
    path = folder / f"results{suffix}"
    path.write_bytes(body)
    _decide(path)


def read_imported(data: bytes, folder: Path) -> None:
    """Read a folder of transformers' Trainer, with a valid one of another rank next to it, because a single rank is not compared."""
    trainings = {"a-r8": data, "b-r16": make_imported_seeds()[0].replace(b"8", b"16")}
    for training, content in trainings.items():
        (folder / training / "checkpoint-5").mkdir(parents=True)
        file_names = ("checkpoint-5/trainer_state.json", "adapter_config.json")
        for name, body in zip(file_names, _split_sections(content, 2), strict=True):
            (folder / training / name).write_bytes(body)
    return _decide(folder)


def _decide(path: Path) -> None:
    decided = decide(path)
    decided.decision.model_dump_json()
    format_decision(decided.decision, decided.input_notes, 80).encode()


def read_settings(data: bytes, folder: Path) -> None:
    """Read a configuration file, and the same text as assignments on the command line."""
    text = data.decode("utf-8", "replace")
    for line in text.splitlines()[:5]:
        _ignore_refusal(lambda line=line: SelectSettings(**gather_settings(None, (line.replace(": ", "="),), {})))  # type: ignore[misc]
        _ignore_refusal(lambda line=line: SelectSettings(memory_bytes=line))  # type: ignore[misc]
    path = folder / "config.yaml"
    path.write_bytes(data)
    values = gather_settings(path, (), {})
    _ignore_refusal(lambda: PlanSettings(**values))
    SelectSettings(**values).model_dump(mode="json")


def _ignore_refusal(read: Callable[[], object]) -> None:
    with suppress(InputError):
        read()


def read_adapter(data: bytes, folder: Path) -> None:
    """Read adapter_config.json, then the header and the data of the weights.

    The header's length is correct unless the first byte says otherwise.
    """
    config, header, body = _split_sections(data[1:], 3)
    header_length = len(header) if data[:1] != b"\xff" else int.from_bytes(body[:8].ljust(8, b"\xff"), "little")
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(header_length.to_bytes(8, "little") + header + body)
    inspect(folder).model_dump_json()


def read_weights(data: bytes, folder: Path) -> None:
    """Read a model's shard index and one shard."""
    index, header, body = _split_sections(data, 3)
    (folder / "model.safetensors.index.json").write_bytes(index)
    (folder / "model-1.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + body)
    for shard in find_shards(folder):
        open_tensors(shard)


def read_model(data: bytes, folder: Path) -> None:
    """Plan a model from its configuration."""
    from rightrank.planning import plan

    (folder / "config.json").write_bytes(data)
    plan(str(folder), settings=PlanSettings(ranks=(2,), batch_size=1, seq_len=16)).model_dump_json()


def read_journal(data: bytes, folder: Path) -> None:
    """Read a run folder's status, decision, figures and report."""
    from matplotlib.figure import Figure as Canvas

    from rightrank.decision.run_answers import decide_if_possible
    from rightrank.report.answer import find_last_decision
    from rightrank.report.html import build_figures
    from rightrank.schema.events import read_records

    (folder / "journal.jsonl").write_bytes(_seal_journal(data))
    status(folder).build_document()
    _ignore_refusal(lambda: _decide(folder))
    journal = RunFolder.open_existing(folder).journal.read()
    records = read_records(journal, str(folder))
    decided = find_last_decision(journal)
    decision = decide_if_possible(records) if decided is None else decided.decision
    render_report(records, build_answers(records, decision)).encode()
    for figure in build_figures(records, decision):
        figure.plot(Canvas().subplots())


def _seal_journal(data: bytes) -> bytes:
    """Recompute each line's checksum, so that damage gets past it. After a first byte of 0, the remaining bytes stay unchanged."""
    if data[:1] == b"\x00":
        return data[1:]
    return b"\n".join(seal(line) if line.endswith(b"}") else line for line in data.split(b"\n"))


def make_journal_seeds() -> list[bytes]:
    open_lines = seeds.make_journals()
    return [*open_lines, b"\x00" + _seal_journal(open_lines[0])]


def _prefix_type(suffix: str, body: bytes) -> bytes:
    return bytes([FILE_TYPES.index(suffix)]) + body


def make_data_seeds() -> list[bytes]:
    return [_prefix_type(suffix, body) for suffix, body in seeds.make_data_files()]


def make_result_seeds() -> list[bytes]:
    return [_prefix_type(suffix, body) for suffix, body in seeds.make_result_files()]


@functools.cache
def make_imported_seeds() -> list[bytes]:
    trainer = {
        "global_step": 5,
        "log_history": [
            {"step": 2, "loss": 2.0, "learning_rate": 1e-4},
            {"step": 5, "eval_loss": 1.5, "eval_runtime": 1.0},
        ],
    }
    return [json.dumps(trainer).encode() + PART + b'{"r": 8, "lora_alpha": 16}']


def make_settings_seeds() -> list[bytes]:
    return [
        b"ranks: [1, 4, 16]\nlearning_rates: [1e-4, 3e-4]\nstrategy: grid\nmargin: 0.01\n",
        b"memory_bytes: 24GiB\ntarget-modules: [q_proj, v_proj]\nlora_alpha: 32\nseeds: [0, 1]\n",
        b"layers_to_transform: [0, 1]\ndtype: bfloat16\n",
        b"24GiB\n",
        b"a: &a [1, 2]\nranks: *a\n",
        b'{"ranks": [1, 4], "rank_pattern": {"q_proj": 4}, "max_steps": 10}\n',
    ]


def make_adapter_seeds() -> list[bytes]:
    return [b"\x00" + PART.join(sections) for sections in seeds.make_adapters()] + [
        b"\xff" + PART.join(seeds.make_adapters()[0])
    ]


def make_weight_seeds() -> list[bytes]:
    _, header, body = seeds.make_adapters()[0]
    names = [name for name in json.loads(header) if name != "__metadata__"]
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}).encode()
    return [PART.join((index, header, body))]


TARGETS: dict[str, Target] = {
    "data": Target(read_data, make_data_seeds),
    "results": Target(read_results, make_result_seeds),
    "imported": Target(read_imported, make_imported_seeds),
    "settings": Target(read_settings, make_settings_seeds),
    "adapter": Target(read_adapter, make_adapter_seeds),
    "weights": Target(read_weights, make_weight_seeds),
    "model": Target(read_model, seeds.make_model_configs),
    "journal": Target(read_journal, make_journal_seeds),
}
