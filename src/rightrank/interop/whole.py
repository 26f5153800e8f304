"""`export --to merged`, `gguf` and `mlx`: a whole model out of a base and an adapter, written as its consumer loads it, loaded back as that
consumer does, and compared with the adapter over its base on held-out examples.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from rightrank.adapters.compare import compare_adapters, labels_of_side
from rightrank.data.files import replacing_folder, write_text
from rightrank.data.splits import DataSplits, load_data
from rightrank.interop.exports import Exported
from rightrank.models.adapter_files import peft_folder
from rightrank.models.base_models import load_base
from rightrank.models.formats import GGUF_TYPES, MLX_TYPES, SHORT, write_gguf, write_mlx
from rightrank.report.format import size
from rightrank.schema.errors import DataError, ModelError, RunError, SettingsError, first_line
from rightrank.schema.events import Evaluating
from rightrank.schema.settings import SelectSettings
from rightrank.train.adapter_runtime import require_base
from rightrank.train.targets import without_peft_noise

TYPES: dict[str, Sequence[str]] = {"merged": tuple(SHORT), "gguf": GGUF_TYPES, "mlx": MLX_TYPES}
TEST_SPLIT = "the run's test split"


@dataclass(frozen=True, slots=True)
class WholeModel:
    """What to write, from what, and what to compare it on."""

    adapter: Path
    base: str
    settings: SelectSettings  # with which base and rows are read, the metric and the margin
    kind: str | None  # of the values, of `TYPES`; None: in 8 bits for GGUF, else as in the base
    check: Sequence[Path]  # held-out rows; empty: the test split of `data`
    data: str | None  # of the adapter's run
    on_event: Callable[[Evaluating], None]


def write_whole(to: str, wanted: WholeModel, folder: Path) -> Exported:
    """Write the model into `folder`, which is replaced, and compare it with the adapter.

    Raises:
        SettingsError: a type that the target does not have.
        ModelError: the base or the adapter can't be loaded, or an architecture that the target can't be written for.
        DataError: rows that can't be used.
        RunError: the disk is full; what was there before stays.
    """
    if wanted.kind is not None and wanted.kind not in TYPES[to]:
        raise SettingsError(f"--type {wanted.kind!r}: {to} is written as {', '.join(TYPES[to])}")
    rows, splits = wanted.check, None
    if not rows:
        splits, rows = _test_split(wanted), [Path(TEST_SPLIT)]
    # Merged in 32 bits, and rounded once.
    settings = wanted.settings.model_copy(update={"dtype": "float32", "load_in_4bit": False, "load_in_8bit": False})
    with replacing_folder(folder) as temporary:
        kind = _write(to, wanted, settings, temporary)
    artefact = folder if to != "gguf" else folder / f"model-{kind}.gguf"
    comparison = compare_adapters(
        (str(wanted.adapter), str(artefact)), wanted.base, rows, wanted.settings, wanted.on_event, of_run=splits
    )
    command = {
        "merged": "vllm serve .",
        "gguf": f"llama-server -m {artefact.name}",
        "mlx": "mlx_lm.generate --model . --prompt Hello",
    }[to]
    exported = Exported(to, folder, sorted(path.name for path in folder.iterdir()), command, [comparison.sentence])
    exported = replace(exported, check=comparison.model_dump(mode="json"))
    write_text(folder / "export.json", json.dumps(asdict(exported) | {"folder": str(folder)}, indent=1) + "\n")
    write_text(folder / "README.md", _card(to, kind, wanted, comparison.sentence))
    return exported


def _write(to: str, wanted: WholeModel, settings: SelectSettings, folder: Path) -> str:
    """Write the files, and return the type of their values."""
    loaded = load_base(wanted.base, settings, labels_of_side(str(wanted.adapter)))
    require_base(wanted.adapter, loaded)
    stored = str(loaded.model.config.dtype or torch.float32).removeprefix("torch.")
    kind = wanted.kind or ("q8_0" if to == "gguf" else next(short for short, name in SHORT.items() if name == stored))
    bits = {"f": 32, "b": 16}.get(kind[0], 9 if kind.startswith("q8") else 6) if kind != "f16" else 16
    needed, free = sum(p.numel() for p in loaded.model.parameters()) * bits // 8, shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"{folder.parent}: the model needs {size(needed)}, and {size(free)} are free; make room, or give another --out"
        )
    model = merged(loaded.model, wanted.adapter)
    if to == "gguf":
        write_gguf(model, loaded.tokenizer, folder / f"model-{kind}.gguf", kind)
    elif to == "mlx":
        write_mlx(model, loaded.tokenizer, folder, kind)
    else:
        model.to(getattr(torch, SHORT[kind])).save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    return kind


def merged(model: Any, adapter: Path) -> Any:
    """The base with the adapter's update in its weights, by PEFT.

    Raises:
        ModelError: PEFT can't attach or merge it.
    """
    try:
        with without_peft_noise(), peft_folder(adapter) as place:
            whole = PeftModel.from_pretrained(model, str(place)).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{adapter}: PEFT can't merge it ({first_line(error)})") from None
    if hasattr(whole.config, "quantization_config"):  # of a base that came from a GGUF file, whose values are plain now
        del whole.config.quantization_config
    whole.hf_quantizer, whole.is_quantized = None, False
    return whole


def _test_split(wanted: WholeModel) -> DataSplits:
    if wanted.data is None or not Path(wanted.data).exists():
        raise DataError(
            f"no held-out rows to compare on ({wanted.data or 'the adapter is of no run'}); give them with --check DATA"
        )
    splits = load_data(Path(wanted.data), wanted.settings, classes=labels_of_side(str(wanted.adapter)))
    rows = splits.examples["test"] or splits.examples["selection"]
    return replace(splits, examples={"train": rows, "selection": rows, "test": rows})


def _card(to: str, kind: str, wanted: WholeModel, sentence: str) -> str:
    return (
        f"---\nbase_model: {wanted.base}\ntags: [rightrank, {to}]\n---\n\n# {Path(wanted.base).name} with an adapter, {to} in {kind}\n\n"
        f"Compared with the adapter over its base, on {', '.join(map(str, wanted.check)) or TEST_SPLIT}:\n\n> {sentence}\n"
    )
