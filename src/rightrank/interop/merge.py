"""`export --to merged`: the base with an adapter's update in its weights, loaded back, and compared with the adapter over its base on
held-out examples.
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
from rightrank.interop.exports import MERGED, Exported
from rightrank.models.adapter_writer import peft_folder
from rightrank.models.base_models import load_base
from rightrank.report.format import format_bytes
from rightrank.schema.errors import DataError, ModelError, RunError, SettingsError, first_line
from rightrank.schema.events import Evaluating
from rightrank.schema.settings import SelectSettings
from rightrank.train.adapter_runtime import require_matching_base
from rightrank.train.targets import suppress_peft_warnings

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
TEST_SPLIT = "the run's test split"


@dataclass(frozen=True, slots=True)
class Merge:
    """What to merge, and what to compare the merged model on."""

    adapter: Path
    base: str
    settings: SelectSettings  # with which base and rows are read, the metric and the margin
    data: str | None  # of the adapter's run
    kind: str  # of the values, of `TYPES`
    check: Sequence[Path]  # held-out rows; empty: the test split of `data`
    on_event: Callable[[Evaluating], None]


def write_merged(merge: Merge, folder: Path) -> Exported:
    """Write the model into `folder`, which is replaced, and compare it with the adapter.

    Raises:
        SettingsError: another type.
        ModelError: the base or the adapter can't be loaded.
        DataError: rows that can't be used.
        RunError: the disk is full; what was there before stays.
    """
    if merge.kind not in TYPES:
        raise SettingsError(f"--type {merge.kind!r}: {MERGED} is written as {', '.join(TYPES)}")
    rows, splits = merge.check, None
    if not rows:
        splits, rows = _test_split(merge), [Path(TEST_SPLIT)]
    with replacing_folder(folder) as temporary:
        _write(merge, TYPES[merge.kind], temporary)
    comparison = compare_adapters(
        (str(merge.adapter), str(folder)), merge.base, rows, merge.settings, merge.on_event, of_run=splits
    )
    files = sorted(path.name for path in folder.iterdir())
    check = comparison.model_dump(mode="json")
    exported = Exported(MERGED, folder, files, "vllm serve .", [comparison.sentence], check)
    write_text(folder / "export.json", json.dumps(asdict(exported) | {"folder": str(folder)}, indent=1) + "\n")
    write_text(folder / "README.md", _card(merge, comparison.sentence))
    return exported


def _write(merge: Merge, dtype: torch.dtype, folder: Path) -> None:
    """Merge in 32 bits, and round once."""
    settings = merge.settings.model_copy(update={"dtype": "float32", "load_in_4bit": False, "load_in_8bit": False})
    loaded = load_base(merge.base, settings, labels_of_side(str(merge.adapter)))
    require_matching_base(merge.adapter, loaded)
    needed = sum(parameter.numel() for parameter in loaded.model.parameters()) * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"{folder.parent}: the model needs {format_bytes(needed)}, and {format_bytes(free)} are free; make room, or give another --out"
        )
    merged(loaded.model, merge.adapter).to(dtype).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def merged(model: Any, adapter: Path) -> Any:
    """The base with the adapter's update in its weights, by PEFT.

    Raises:
        ModelError: PEFT can't attach or merge it.
    """
    try:
        with suppress_peft_warnings(), peft_folder(adapter) as place:
            whole = PeftModel.from_pretrained(model, str(place)).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{adapter}: PEFT can't merge it ({first_line(error)})") from None
    if hasattr(whole.config, "quantization_config"):  # of a base that came from a GGUF file, whose values are plain now
        del whole.config.quantization_config
    whole.hf_quantizer, whole.is_quantized = None, False
    return whole


def _test_split(merge: Merge) -> DataSplits:
    if merge.data is None or not Path(merge.data).exists():
        raise DataError(
            f"no held-out rows to compare on ({merge.data or 'the adapter is of no run'}); give them with --check DATA"
        )
    splits = load_data(Path(merge.data), merge.settings, classes=labels_of_side(str(merge.adapter)))
    rows = splits.examples["test"] or splits.examples["selection"]
    return replace(splits, examples={"train": rows, "selection": rows, "test": rows})


def _card(merge: Merge, sentence: str) -> str:
    return (
        f"---\nbase_model: {merge.base}\ntags: [rightrank, {MERGED}]\n---\n\n# {Path(merge.base).name} with an adapter, {MERGED} in {merge.kind}\n\n"
        f"Compared with the adapter over its base, on {', '.join(map(str, merge.check)) or TEST_SPLIT}:\n\n> {sentence}\n"
    )
