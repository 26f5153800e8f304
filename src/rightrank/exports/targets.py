"""The export targets by name, and the function that writes one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rightrank.errors import SettingsError, did_you_mean
from rightrank.exports.configs import axolotl, llamafactory
from rightrank.exports.recipe import Recipe
from rightrank.exports.servers import llama_cpp, ollama, served_rank, sglang, vllm
from rightrank.exports.trainers import diffusers, kohya, ms_swift, peft, trl, unsloth
from rightrank.exports.written import Written
from rightrank.io.files import replacing_folder

TARGETS: dict[str, Callable[[Recipe], Written]] = {
    "peft": peft,
    "trl": trl,
    "axolotl": axolotl,
    "llamafactory": llamafactory,
    "unsloth": unsloth,
    "ms-swift": ms_swift,
    "vllm": vllm,
    "sglang": sglang,
    "llama.cpp": llama_cpp,
    "ollama": ollama,
    "diffusers": diffusers,
    "kohya": kohya,
}
SERVERS = ("vllm", "sglang", "llama.cpp", "ollama")  # they load the adapter itself, which --pad can pad
PADDED_FOLDER = "adapter"


@dataclass(frozen=True, slots=True)
class Exported:
    """The written files, the command that uses them from inside the folder, and what the target cannot express."""

    target: str
    folder: Path
    files: list[str]
    command: str
    notes: list[str]
    hub: str | None = None  # address of the repository, if the adapter was pushed

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"folder": str(self.folder)}


def require_target(name: str) -> None:
    """Refuse an unknown target.

    Raises:
        SettingsError: lists the targets.
    """
    if name not in TARGETS:
        raise SettingsError(
            f"export target {name!r} is not known{did_you_mean(name, [*TARGETS, 'optuna'])}; allowed: {', '.join(TARGETS)}, optuna"
        )


def require_paddable(name: str) -> None:
    """Refuse to pad for a target that is not a server.

    Raises:
        SettingsError: lists the servers.
    """
    if name not in SERVERS:
        raise SettingsError(f"--pad goes with a server ({', '.join(SERVERS)}), not with --to {name}")


def write_export(name: str, recipe: Recipe, folder: Path, pad: bool = False) -> Exported:
    """Write a target's files into `folder`, which is replaced.

    Args:
        pad: write a copy of the adapter with one rank and one scale for a server: vLLM's next `--max-lora-rank`, or
            the highest rank of any module.

    Raises:
        SettingsError: an unknown target, or padding for a target that is not a server.
        ResultsError: a rank that the server does not serve.
        ModelError: an adapter that can't be padded.
    """
    require_target(name)
    if name != "peft":  # its folder may be published, and needs neither the model nor the data
        recipe = recipe.located()
    exported = recipe
    if pad:
        require_paddable(name)
        rank = served_rank(recipe.highest_rank) if name == "vllm" else recipe.highest_rank
        exported = recipe.padded_to(rank, folder / PADDED_FOLDER)
    uses_adapter = name in (*SERVERS, "peft")
    written = TARGETS[name](exported if uses_adapter else exported.training())
    comments = recipe.comments()
    with replacing_folder(folder) as temporary:
        if pad:
            from rightrank.exports.padding import write_padded  # imports torch

            write_padded(recipe.adapter, temporary / PADDED_FOLDER, exported.r)
        for file, (form, part) in written.lora_files.items():
            from rightrank.io.adapter_writing import write_lora_file

            write_lora_file(recipe.adapter, temporary / file, form, part)
        if written.with_adapter:
            for path in sorted(path for path in recipe.adapter.iterdir() if path.is_file()):
                shutil.copy2(path, temporary / path.name)
        for file, text in written.files.items():
            (temporary / file).write_text(_commented(file, text, comments), encoding="utf-8")
    files = sorted(path.name for path in folder.iterdir())
    return Exported(name, folder, files, written.command, [*written.notes, *comments])


def _commented(file: str, text: str, comments: Sequence[str]) -> str:
    """The text of a file with comments at its start, below the interpreter's line; JSON has none."""
    if file.endswith(".json") or not comments:
        return text
    lines = "".join(f"# {' '.join(comment.splitlines())}\n" for comment in comments)  # a name may hold a line's end
    first, newline, rest = text.partition("\n")
    return f"{first}{newline}{lines}{rest}" if first.startswith("#!") else lines + text
