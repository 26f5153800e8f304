"""Write what a server needs to serve adapters: a script with its command, and a copy of each adapter that it would load wrongly.

Servers give every module the scale of `lora_alpha` and `r`, and some require `r` rows in every A. An adapter whose modules differ in rank
or scale is therefore written again, as the same function at one rank.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rightrank.adapters.adapter_files import open_adapter
from rightrank.adapters.adapter_folders import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_adapter_config,
    require_adapter_folder,
    require_kept_base,
)
from rightrank.adapters.rank_math import (
    NON_PLAIN_OPTIONS,
    SERVER_RANKS,
    SERVING_COSTS,
    compute_slot_bytes,
    find_server_rank,
)
from rightrank.adapters.resize import write_uniform_adapter
from rightrank.bases.safetensors_files import open_tensors
from rightrank.data.files import replace_folder
from rightrank.report.format import format_bytes
from rightrank.schema.errors import ModelError, ResultsError, SettingsError

MERGED = "merged"  # a model without an adapter, written by `exports.merge`
MAX_PARENT_FOLDERS = 4  # parents of an adapter: the trials folder, the run, and two above the run
LOOPBACK = "127.0.0.1"  # vLLM listens on every interface by default, other servers only on this one


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter folder of PEFT, as its configuration and the header of its weights describe it."""

    name: str  # by which requests address it
    folder: Path
    config: Mapping[str, Any]
    shapes: tuple[tuple[int, int], ...]  # rows and columns of the adapted matrices
    ranks: tuple[int, ...]  # of the modules

    @property
    def rank(self) -> int:
        return max(self.ranks)

    @property
    def has_patterns(self) -> bool:
        """Return whether modules differ in rank or alpha."""
        return bool(self.config.get("rank_pattern") or self.config.get("alpha_pattern"))

    @property
    def is_rewritten(self) -> bool:
        """Return whether a server that reads `lora_alpha` and `r` alone would give a module another scale or rank."""
        return self.has_patterns or bool(self.config.get("use_rslora"))


@dataclass(frozen=True, slots=True)
class ExportResult:
    """The written files, the command to run inside the folder, and notes on limits and costs."""

    target: str
    folder: Path
    files: list[str]
    command: str
    notes: list[str]
    check: dict[str, Any] | None = None  # for a merged model, the comparison with the adapter


def read_served_adapter(name: str, folder: Path) -> ServedAdapter:
    """Read an adapter that a server is to load under this name, without its weights.

    Raises:
        ModelError: the folder holds no LoRA adapter of PEFT, one that may change the base model on loading, or one that servers do not load.
    """
    require_adapter_folder(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(f"{folder}: servers load adapter folders of PEFT, with {CONFIG_FILE} and {WEIGHTS_FILE}")
    config = read_adapter_config(folder)
    if config.get("peft_type") != "LORA" or not isinstance(config.get("r"), int):
        raise ModelError(
            f"{folder}: peft_type is {config.get('peft_type')!r}, r is {config.get('r')!r}; give a LoRA adapter"
        )
    require_kept_base(folder, config)
    if options := [option for option in NON_PLAIN_OPTIONS if config.get(option)]:
        raise ModelError(
            f"{folder}: servers load plain LoRA only, and this adapter has {' and '.join(options)}; merge it: "
            f"{shlex.join(['rightrank', 'export', str(folder), '--to', MERGED])} --check DATA"
        )
    header = open_tensors(folder / WEIGHTS_FILE).shapes
    factors = {key: shape for key, shape in header.items() if ".lora_A." in key and len(shape) == 2}
    pairs = [(header.get(key.replace(".lora_A.", ".lora_B.")), shape) for key, shape in factors.items()]
    shapes = tuple((b[0], a[1]) for b, a in pairs if b is not None and len(b) == 2)
    if not shapes:
        raise ModelError(f"{folder}: the weights hold no LoRA factors of matrices; save the adapter again")
    return ServedAdapter(name, folder, config, shapes, tuple(a[0] for a in factors.values()))


def name_adapters(folders: Sequence[Path]) -> list[str]:
    """Return a different name for each folder: its own, with that of the folder above it where two are the same.

    A server's option has `NAME=PATH`, so other characters than letters, digits, dots and hyphens are replaced.

    Raises:
        SettingsError: two names are still the same.
    """
    paths = [folder.resolve() for folder in folders]
    counts = Counter(path.name for path in paths)
    names = [path.name if counts[path.name] == 1 else f"{path.parent.name}-{path.name}" for path in paths]
    names = [re.sub(r"[^\w.-]", "-", name) for name in names]
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated is not None:
        raise SettingsError(f"two adapters would be served as {repeated!r}; rename one of the folders")
    return names


def find_base(adapters: Sequence[Path], base: str | None = None) -> str:
    """Return the base model of the adapters as an absolute path or a name on the hub.

    Args:
        base: the base model to use in place of the one that the adapters name.

    Raises:
        SettingsError: an adapter names no base model, or two name different ones.
    """
    names: list[str] = []
    for adapter in adapters:
        name = base or read_adapter_config(adapter).get("base_model_name_or_path")
        if not isinstance(name, str) or not name or "in memory" in name:
            raise SettingsError(f"{adapter}: the adapter names no base model; give --base MODEL")
        names.append(name)
        if Path(name).name != Path(names[0]).name:
            raise SettingsError(
                f"{adapters[0]} has the base model {names[0]}, and {adapter} has {name}; a server has one base model: export them "
                "separately, or give --base MODEL if they are the same"
            )
    return resolve_path(names[0], adapters[0])


def resolve_path(name: str, adapter: Path) -> str:
    """Return the absolute path of a file or folder. Names on the hub are returned unchanged.

    A relative path is looked up in the current folder, and then in the folders that contain the run, because the selection may have run there.
    """
    path = Path(name).expanduser()
    candidates = [path, *(folder / path for folder in list(adapter.resolve().parents)[:MAX_PARENT_FOLDERS])]
    return next((str(candidate.resolve()) for candidate in candidates if candidate.exists()), name)


def write_server_files(server: str, adapters: Sequence[ServedAdapter], base: str, folder: Path) -> ExportResult:
    """Write the script of a server into `folder`, which is replaced, with the adapters that it cannot load as they are.

    Raises:
        ResultsError: a rank that the server does not support.
    """
    served = [
        replace(adapter, folder=folder.resolve() / adapter.name) if adapter.is_rewritten else adapter
        for adapter in adapters
    ]
    arguments, notes = SERVERS[server](served, base)
    with replace_folder(folder) as temporary:
        for adapter in adapters:
            if adapter.is_rewritten:
                write_uniform_adapter(open_adapter(adapter.folder), temporary / adapter.name)
        (temporary / f"{server}.sh").write_text(f"#!/bin/sh\nexec {shlex.join(arguments)}\n", encoding="utf-8")
    files = sorted(path.name for path in folder.iterdir())
    notes = [*notes, SERVING_COSTS, *(note for adapter in adapters for note in _describe_serving_limits(adapter))]
    return ExportResult(server, folder, files, f"sh {server}.sh", notes)


def _build_vllm_command(adapters: Sequence[ServedAdapter], base: str) -> tuple[list[str], list[str]]:
    """Return the arguments of `vllm serve` and notes on its slots. vLLM rounds the rank up to one that it supports."""
    for adapter in adapters:
        if adapter.rank > SERVER_RANKS[-1]:
            raise ResultsError(
                f"vLLM supports ranks up to {SERVER_RANKS[-1]}, and {adapter.name} has {adapter.rank}: resize it, or merge it into the base"
            )
    max_rank = find_server_rank(max(adapter.rank for adapter in adapters))
    shapes = max((adapter.shapes for adapter in adapters), key=lambda shapes: compute_slot_bytes(shapes, max_rank))
    notes = [
        f"a slot takes {format_bytes(compute_slot_bytes(shapes, max_rank))} at --max-lora-rank {max_rank} (16 bits), whatever the "
        "rank of the adapter in it; the largest rank of all adapters of the server counts"
    ]
    if len(adapters) > 1:
        notes.append(_describe_largest_ranks(adapters, max_rank))
    arguments = ["vllm", "serve", base, "--host", LOOPBACK, "--enable-lora", "--max-lora-rank", str(max_rank)]
    return [*arguments, "--lora-modules", *map(_format_served_adapter, adapters)], notes


def _describe_largest_ranks(adapters: Sequence[ServedAdapter], max_rank: int) -> str:
    """Name the adapters that need the server's rank, and the rank that the others need."""
    largest = [adapter for adapter in adapters if find_server_rank(adapter.rank) == max_rank]
    others = [find_server_rank(adapter.rank) for adapter in adapters if adapter not in largest]
    listed = ", ".join(f"{adapter.name} (rank {adapter.rank})" for adapter in largest)
    smaller = f"; without {'it' if len(largest) == 1 else 'them'}, {max(others)} would do" if others else ""
    return f"--max-lora-rank {max_rank} is for {listed}{smaller}"


def _build_sglang_command(adapters: Sequence[ServedAdapter], base: str) -> tuple[list[str], list[str]]:
    """Return the arguments of SGLang's server. Its default address is the local machine."""
    arguments = ["python", "-m", "sglang.launch_server", "--model-path", base, "--enable-lora", "--max-lora-rank"]
    arguments += [str(max(adapter.rank for adapter in adapters)), "--lora-paths"]
    return [*arguments, *map(_format_served_adapter, adapters)], []


SERVERS: dict[str, Callable[[Sequence[ServedAdapter], str], tuple[list[str], list[str]]]] = {
    "vllm": _build_vllm_command,
    "sglang": _build_sglang_command,
}


def _format_served_adapter(adapter: ServedAdapter) -> str:
    return f"{adapter.name}={adapter.folder.resolve()}"


def _describe_serving_limits(adapter: ServedAdapter) -> list[str]:
    """Return notes on what servers cannot load, and on how the adapter was changed for them."""
    notes, config, name = [], adapter.config, adapter.name
    if adapter.has_patterns:
        notes.append(
            f"the modules of {name} differ in rank ({min(adapter.ranks)} to {adapter.rank}) or alpha, and servers require the same rank "
            f"and scale in all modules: {name}/ contains the same function at rank {adapter.rank}, padded with zeros"
        )
    elif adapter.is_rewritten:
        notes.append(
            f"some servers do not read use_rslora of {name}: {name}/ contains the same function with its scale in lora_alpha"
        )
    if (task := config.get("task_type")) not in (None, "CAUSAL_LM"):
        notes.append(f"servers load adapters of causal language models; the task of {name} is {task}")
    return notes
