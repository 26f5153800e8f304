"""What is fuzzed: each way in which a file of somebody else's is read, with files that are right to begin from."""

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
from rightrank.adapters.spectra import open_weights
from rightrank.api.adapters import inspect
from rightrank.api.runs import decide, status
from rightrank.cli.options import gather
from rightrank.data.rows import FILE_TYPES
from rightrank.data.splits import load_data
from rightrank.decision.records import answers_of
from rightrank.report.html import render_report
from rightrank.report.terminal import decision_text
from rightrank.runs.folder import RunFolder
from rightrank.runs.journal import seal
from rightrank.schema.errors import InputError
from rightrank.schema.plan_settings import PlanSettings
from rightrank.schema.settings import SelectSettings
from rightrank.train.tokens import encode

PART = b"\n--part--\n"  # between the files of one input


@dataclass(frozen=True, slots=True)
class Target:
    """A reader, and inputs that it reads well."""

    read: Callable[[bytes, Path], None]
    seeds: Callable[[], list[bytes]]


@functools.cache
def _tokenizer() -> Any:
    return make_tokenizer()


def _file_type(data: bytes) -> tuple[str, bytes]:
    """The first byte names the type."""
    return FILE_TYPES[data[0] % len(FILE_TYPES)] if data else FILE_TYPES[0], data[1:]


def _parts(data: bytes, count: int) -> list[bytes]:
    parts = data.split(PART, count - 1)
    return parts + [b""] * (count - len(parts))


def read_data(data: bytes, folder: Path) -> None:
    """Rows, their split, and their tokens."""
    suffix, body = _file_type(data)
    path = folder / f"data{suffix}"
    path.write_bytes(body)
    settings = SelectSettings(batch_size=1, test_fraction=0.3, validation_fraction=0.3, seq_len=64)
    splits = load_data(path, settings)
    encode(splits, SimpleNamespace(tokenizer=_tokenizer()), settings)  # type: ignore[arg-type]


def read_results(data: bytes, folder: Path) -> None:
    suffix, body = _file_type(data)
    path = folder / f"results{suffix}"
    path.write_bytes(body)
    _decide(path)


def read_imported(data: bytes, folder: Path) -> None:
    """A folder of transformers' Trainer, with a right one of another rank beside it: one rank alone is not compared."""
    trainings = {"a-r8": data, "b-r16": imported_seeds()[0].replace(b"8", b"16")}
    for training, content in trainings.items():
        (folder / training / "checkpoint-5").mkdir(parents=True)
        places = ("checkpoint-5/trainer_state.json", "adapter_config.json")
        for name, body in zip(places, _parts(content, 2), strict=True):
            (folder / training / name).write_bytes(body)
    return _decide(folder)


def _decide(path: Path) -> None:
    decided = decide(path)
    decided.decision.model_dump_json()
    decision_text(decided.decision, decided.understood, 80).encode()


def read_settings(data: bytes, folder: Path) -> None:
    """A configuration file, and the same text as assignments on the command line."""
    text = data.decode("utf-8", "replace")
    for line in text.splitlines()[:5]:
        _refusable(lambda line=line: SelectSettings(**gather(None, (line.replace(": ", "="),), {})))  # type: ignore[misc]
        _refusable(lambda line=line: SelectSettings(memory_bytes=line))  # type: ignore[misc]
    path = folder / "config.yaml"
    path.write_bytes(data)
    values = gather(path, (), {})
    _refusable(lambda: PlanSettings(**values))
    SelectSettings(**values).model_dump(mode="json")


def _refusable(read: Callable[[], object]) -> None:
    with suppress(InputError):
        read()


def read_adapter(data: bytes, folder: Path) -> None:
    """adapter_config.json, then the header and the data of the weights. The header's length is correct unless the
    first byte says otherwise."""
    config, header, body = _parts(data[1:], 3)
    told = len(header) if data[:1] != b"\xff" else int.from_bytes(body[:8].ljust(8, b"\xff"), "little")
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(told.to_bytes(8, "little") + header + body)
    inspect(folder).model_dump_json()


def read_weights(data: bytes, folder: Path) -> None:
    """A model's shard index and one shard."""
    index, header, body = _parts(data, 3)
    (folder / "model.safetensors.index.json").write_bytes(index)
    (folder / "model-1.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + body)
    weights = open_weights(folder)
    for name in list(weights.files)[:3]:
        weights.tensor(name)


def read_model(data: bytes, folder: Path) -> None:
    """A model's configuration, planned for."""
    from rightrank.plugins.plan import plan

    (folder / "config.json").write_bytes(data)
    plan(str(folder), settings=PlanSettings(ranks=(2,), batch_size=1, seq_len=16)).model_dump_json()


def read_journal(data: bytes, folder: Path) -> None:
    """A run folder: where it stands, its decision, its report."""
    from rightrank.decision.records import decision_so_far, records_of
    from rightrank.report.status import last_decided

    (folder / "journal.jsonl").write_bytes(_journal(data))
    status(folder).model_dump_json()
    _refusable(lambda: _decide(folder))
    journal = RunFolder.existing(folder).journal.read()
    records = records_of(journal, str(folder))
    decided = last_decided(journal)
    decision = decision_so_far(records) if decided is None else decided.decision
    render_report(records, answers_of(records, decision)).encode()


def _journal(data: bytes) -> bytes:
    """Damage below the checksums: each line is sealed anew. After a first byte of 0 the rest stays as it is."""
    if data[:1] == b"\x00":
        return data[1:]
    return b"\n".join(seal(line) if line.endswith(b"}") else line for line in data.split(b"\n"))


def journal_seeds() -> list[bytes]:
    open_lines = seeds.journals()
    return [*open_lines, b"\x00" + _journal(open_lines[0])]


def _typed(suffix: str, body: bytes) -> bytes:
    return bytes([FILE_TYPES.index(suffix)]) + body


def data_seeds() -> list[bytes]:
    return [_typed(suffix, body) for suffix, body in seeds.data_files()]


def result_seeds() -> list[bytes]:
    return [_typed(suffix, body) for suffix, body in seeds.result_files()]


@functools.cache
def imported_seeds() -> list[bytes]:
    trainer = {
        "global_step": 5,
        "log_history": [
            {"step": 2, "loss": 2.0, "learning_rate": 1e-4},
            {"step": 5, "eval_loss": 1.5, "eval_runtime": 1.0},
        ],
    }
    return [json.dumps(trainer).encode() + PART + b'{"r": 8, "lora_alpha": 16}']


def settings_seeds() -> list[bytes]:
    return [
        b"ranks: [1, 4, 16]\nlearning_rates: [1e-4, 3e-4]\nstrategy: grid\nmargin: 0.01\n",
        b"memory_bytes: 24GiB\ntarget-modules: [q_proj, v_proj]\nlora_alpha: 32\nseeds: [0, 1]\n",
        b"layers_to_transform: [0, 1]\ndtype: bfloat16\n",
        b"24GiB\n",
        b"a: &a [1, 2]\nranks: *a\n",
        b'{"ranks": [1, 4], "rank_pattern": {"q_proj": 4}, "max_steps": 10}\n',
    ]


def adapter_seeds() -> list[bytes]:
    return [b"\x00" + PART.join(parts) for parts in seeds.adapters()] + [b"\xff" + PART.join(seeds.adapters()[0])]


def weight_seeds() -> list[bytes]:
    _, header, body = seeds.adapters()[0]
    names = [name for name in json.loads(header) if name != "__metadata__"]
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}).encode()
    return [PART.join((index, header, body))]


TARGETS: dict[str, Target] = {
    "data": Target(read_data, data_seeds),
    "results": Target(read_results, result_seeds),
    "imported": Target(read_imported, imported_seeds),
    "settings": Target(read_settings, settings_seeds),
    "adapter": Target(read_adapter, adapter_seeds),
    "weights": Target(read_weights, weight_seeds),
    "model": Target(read_model, seeds.model_configs),
    "journal": Target(read_journal, journal_seeds),
}
