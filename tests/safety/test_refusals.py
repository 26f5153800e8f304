"""Test malicious files: each is refused in one line, nothing in it is executed, and no file outside is touched."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import rightrank
from rightrank.adapters.adapter_files import ensure_peft_format
from rightrank.api.adapters import inspect
from rightrank.api.folders import status
from rightrank.api.runs import decide
from rightrank.bases.base_models import load_base
from rightrank.bases.safetensors_files import find_shards, open_tensors
from rightrank.data.files import read_config
from rightrank.data.splits import load_data
from rightrank.runs.folder import RunFolder
from rightrank.schema.errors import DataError, InputError, ModelError, ResultsError, RunFolderError, SettingsError
from rightrank.schema.settings import PlanSettings, SelectSettings
from rightrank.training.optimizer import load_checkpoint
from tests.report.runs import make_run
from tests.tiny import ON_CPU, build_small_settings, generate_sentences, write_jsonl

SECONDS = 5.0  # of the processor, so that a busy machine fails no test
MEMORY_BYTES = 2**30  # beyond what the process has when the block begins


class OutOfTimeError(BaseException):
    """Passes every `except Exception` on its way up."""


@contextmanager
def limit_resources() -> Iterator[None]:
    """Raise `OutOfTimeError` or `MemoryError` in a block that exceeds a limit."""
    address_space = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGPROF, _raise)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, address_space[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, address_space)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)


def _raise(_signal: int, _frame: Any) -> None:
    raise OutOfTimeError


class Bomb:
    """A pickle that leaves a mark where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def require_refused(
    read: Callable[[], object], message: str, kind: type[InputError] = InputError, longest: int = 1500
) -> None:
    """Require one visible line of reasonable length, within 5 seconds and 1 GiB."""
    with limit_resources(), pytest.raises(kind, match=message) as refusal:
        read()
    text = str(refusal.value)
    assert text.isprintable()
    assert len(text) <= longest


def write_adapter(folder: Path, config: dict[str, Any] | None = None, **tensors: list[int]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "base_model.model.q_proj.lora_"
    shapes = tensors or {f"{prefix}A.weight": [2, 4], f"{prefix}B.weight": [3, 2]}
    save_file(
        {name: np.ones(shape, np.float32) for name, shape in shapes.items()}, folder / "adapter_model.safetensors"
    )
    config_json = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | (config or {})
    (folder / "adapter_config.json").write_text(json.dumps(config_json))
    return folder


def write_run_folder(folder: Path) -> RunFolder:
    """Write the journal of a run that has not ended."""
    records = make_run((1, 4), (1e-3,))
    folder.mkdir(parents=True, exist_ok=True)
    run_folder = RunFolder(folder)
    for record in (records.started, *records.outcomes):
        run_folder.journal.append(record)
    return run_folder


# pickles


@pytest.mark.parametrize(
    "suffix", [".parquet", ".jsonl", ".json", ".csv", ".tsv", ".pkl", ".pt", ".bin", ".joblib", ".npy"]
)
def test_a_pickle_is_never_loaded_as_data_or_results(tmp_path: Path, suffix: str) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / f"data{suffix}"
    path.write_bytes(pickle.dumps(Bomb(mark)))
    require_refused(
        lambda: load_data(path, build_small_settings()),
        "not read|not UTF-8|not a readable|not JSON|not CSV|no known|are not",
        DataError,
    )
    require_refused(lambda: decide(path), str(path.name), ResultsError)
    assert not mark.exists()


def test_a_pickle_is_never_loaded_as_an_adapter_a_model_a_journal_or_a_checkpoint(
    tmp_path: Path, model_folder: Path
) -> None:
    mark = tmp_path / "mark"
    bomb = pickle.dumps(Bomb(mark))
    folder = write_adapter(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(bomb)
    require_refused(lambda: inspect(folder), "not a readable safetensors file", ModelError)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    require_refused(lambda: inspect(folder), "only pickled weights", ModelError)
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    (model / "model.safetensors").write_bytes(bomb)
    require_refused(lambda: load_base(str(model), ON_CPU, None), "can't load it", ModelError)
    require_refused(lambda: open_tensors(find_shards(model)[0]), "not a readable safetensors file", ModelError)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal.jsonl").write_bytes(bomb + b"\n")
    require_refused(lambda: status(tmp_path / "run"), "journal", RunFolderError)
    (tmp_path / "checkpoint.safetensors").write_bytes(bomb)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors") is None
    assert not mark.exists()


def test_pickled_weights_beside_other_safetensors_are_not_read(tmp_path: Path, model_folder: Path) -> None:
    """Check that pytorch_model.bin, which transformers would load, is refused if model.safetensors is missing."""
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    (model / "model.safetensors").rename(model / "other.safetensors")
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    require_refused(lambda: load_base(str(model), ON_CPU, None), "can't load it", ModelError)
    assert not (tmp_path / "mark").exists()


# sizes in headers, decompression bombs


@pytest.mark.parametrize(
    ("length", "header"),
    [
        (2**63, b"{}"),
        (2**40, b"{}"),
        (99_999_999, b"{}"),
        (None, b'{"a.lora_A.weight":{"dtype":"F32","shape":[1099511627776,1024],"data_offsets":[0,4503599627370496]}}'),
        (None, b'{"a.lora_A.weight":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}}'),
        (None, b'{"a.lora_A.weight":{"dtype":"F32","shape":[2,2],"data_offsets":[16,0]}}'),
        (None, b"[" * 100_000),
    ],
)
def test_safetensors_headers_that_lie(tmp_path: Path, length: int | None, header: bytes) -> None:
    folder = write_adapter(tmp_path / "adapter")
    size = (len(header) if length is None else length).to_bytes(8, "little")
    (folder / "adapter_model.safetensors").write_bytes(size + header + b"\0" * 16)
    require_refused(lambda: inspect(folder), "not a readable safetensors file", ModelError)
    (folder / "adapter_model.safetensors").rename(folder / "model.safetensors")
    require_refused(lambda: open_tensors(find_shards(folder)[0]), "not a readable safetensors file", ModelError)


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + previous] * 9)}]\n"
    for previous, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, r"aliases \(\*name\) are not read"),
        ("ranks: &r [*r]", r"aliases \(\*name\) are not read"),
        ("ranks: !!python/object/apply:os.mkdir [mark]", "could not determine a constructor"),
        ("ranks: !!python/name:os.system", "could not determine a constructor"),
        ("[" * 1200, "nested too deeply|not YAML"),
        ("seeds: 2001-99-99", "not YAML"),
        ("seeds: " + "9" * 5000, "not YAML"),
        ("# " + "x" * 200_000, "the limit is"),
        ("? [1, 2]\n: 3", "not YAML"),
        ("ranks: '" + "x" * 90_000 + "'", "ranks: got"),
        ("x" * 90_000 + ": 1", "not YAML"),
        ("? " + "x" * 90_000 + "\n: 1", "unknown setting"),
    ],
    ids=[
        "aliases",
        "an alias of itself",
        "apply",
        "name",
        "deep",
        "date",
        "digits",
        "large",
        "key",
        "value",
        "long key",
        "name of a setting",
    ],
)
def test_configs_that_are_more_than_plain_values(tmp_path: Path, text: str, message: str) -> None:

    path = tmp_path / "config.yaml"
    path.write_text(text)
    require_refused(lambda: SelectSettings(**read_config(path)), message, SettingsError)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "name", ["data.jsonl.gz", "data.zip", "data.npz", "data.xlsx", "data.tar", "data.arrow", "data"]
)
def test_archives_are_not_opened(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\x1f\x8b" + b"\0" * 64)
    require_refused(lambda: load_data(path, build_small_settings()), "are not supported; give", DataError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "more than any model has"),
        ({"hidden_size": 2**60}, "more than any model has"),
        ({"vocab_size": 10**12}, r"vocab_size is 1000000000000, more than any model has \(at most 4194304\)"),
        ({"vocab_size": 2**24}, "vocab_size is 16777216, more than any model has"),
        (
            {"model_type": "gemma3", "text_config": {}, "vision_config": {"num_hidden_layers": 10**9}},
            "num_hidden_layers is 1000000000, more than any model has",
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 10**9},
            "num_local_experts is 1000000000, more than any model has",
        ),
        ({"num_key_value_heads": 3}, "are not a multiple of"),
        ({"num_attention_heads": 0}, "cannot build|does not know this model|are not a multiple of"),
        ({"hidden_size": -8}, "cannot build|does not know this model"),
        ({"hidden_size": "x"}, "does not know this model"),
    ],
)
def test_model_configurations_without_end(
    tmp_path: Path, model_folder: Path, changes: dict[str, Any], message: str
) -> None:
    config = json.loads((model_folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = PlanSettings(ranks=(2,), batch_size=1, seq_len=16)
    require_refused(lambda: rightrank.plan(str(tmp_path), settings=settings), message, ModelError)


def test_a_head_of_labels_without_end() -> None:
    require_refused(lambda: PlanSettings(num_labels=10**12), "num_labels", SettingsError)


# names and links that lead elsewhere


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 5, None, ["x"], "model.bin"]
)
def test_shards_outside_the_folder(tmp_path: Path, model_folder: Path, name: object) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    save_file({"w": np.ones(1, np.float32)}, tmp_path / "other.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    require_refused(lambda: find_shards(model), "names the shard .*of the folder itself", ModelError)
    require_refused(lambda: load_base(str(model), ON_CPU, None), "names the shard", ModelError)


@pytest.mark.parametrize("trial_id", ["../../mark", "/etc/mark", "a/b", "", ".", "x" * 300, "a\0b", "é"])
def test_trial_ids_that_are_paths(tmp_path: Path, trial_id: str) -> None:
    folder = RunFolder(tmp_path)
    require_refused(lambda: folder.get_checkpoint_path(trial_id), "trial id .* is not allowed", RunFolderError)
    require_refused(lambda: folder.get_trial_folder(trial_id), "trial id .* is not allowed", RunFolderError)


def test_a_run_folder_may_itself_be_a_link_and_hold_links_inside(tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "elsewhere")
    (run.path / "last").symlink_to("figures")
    (tmp_path / "run").symlink_to(run.path)
    assert status(tmp_path / "run").state == "stopped"


# code that comes with a model


def write_foreign_model(model_folder: Path, target: Path, mark: Path) -> Path:
    """Write a model whose configuration names its own code, which leaves a mark when it runs."""
    shutil.copytree(model_folder, target)
    config = json.loads((target / "config.json").read_text())
    config |= {
        "model_type": "foreign",
        "auto_map": {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"},
    }
    (target / "config.json").write_text(json.dumps(config))
    (target / "foreign.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    return target


def test_code_of_a_model_s_own_is_not_run_unasked(tmp_path: Path, model_folder: Path) -> None:
    mark = tmp_path / "mark"
    model = write_foreign_model(model_folder, tmp_path / "model", mark)
    require_refused(lambda: load_base(str(model), ON_CPU, None), "trust_remote_code|custom code", ModelError)
    require_refused(lambda: rightrank.plan(str(model)), "trust_remote_code|custom code", ModelError)
    assert not mark.exists()


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "experts_implementation", "text_config"]
)
def test_a_configuration_that_names_compiled_code_on_the_hub(tmp_path: Path, model_folder: Path, key: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    config = json.loads((model / "config.json").read_text())
    value = {"attn_implementation": {"": "someone/kernel"}} if key == "text_config" else "someone/kernel"
    (model / "config.json").write_text(json.dumps(config | {key: value}))
    require_refused(lambda: load_base(str(model), ON_CPU, None), "code from the hub", ModelError)
    require_refused(lambda: rightrank.plan(str(model)), "code from the hub", ModelError)


def test_an_adapter_in_a_model_s_folder_does_not_name_another_base(tmp_path: Path, model_folder: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    (model / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "someone/else"})
    )
    require_refused(lambda: load_base(str(model), ON_CPU, None), "adapter_config.json too", ModelError)


# what is no file


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data.jsonl")
    for path in (tmp_path / "data.jsonl", Path("/dev/zero")):
        require_refused(lambda path=path: load_data(path, build_small_settings()), "no such file or folder", DataError)  # type: ignore[misc]
        require_refused(lambda path=path: decide(path), "no such file or folder", ResultsError)  # type: ignore[misc]
    require_refused(lambda: read_config(Path("/dev/zero")), "not a regular file", SettingsError)
    folder = write_adapter(tmp_path / "adapter")
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")
    require_refused(lambda: inspect(folder), "not a regular file", ModelError)


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in generate_sentences(80)])
    (tmp_path / "more.csv").mkdir()
    assert load_data(tmp_path, build_small_settings()).form == "text"
    require_refused(lambda: read_config(tmp_path), "a folder", SettingsError)


def test_weights_that_are_cut_off_or_a_pipe_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    for size in (0, 4, len(content) // 2, len(content) - 1):
        weights.write_bytes(content[:size])
        require_refused(lambda: inspect(folder), "not a readable safetensors file", ModelError)
        # The same check is before every load by PEFT.
        require_refused(lambda: ensure_peft_format(folder).__enter__(), "not a readable safetensors file", ModelError)
    weights.unlink()
    os.mkfifo(weights)
    require_refused(lambda: inspect(folder), "not a regular file", ModelError)
