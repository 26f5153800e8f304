"""Merge an adapter into its base model (`export --to merged`) and compare the result with the adapter on held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from rightrank.adapters.adapter_files import ensure_peft_format
from rightrank.bases.base_models import load_base
from rightrank.data.files import replace_folder, write_text
from rightrank.data.splits import DataSplits, load_data
from rightrank.evaluation.attached_adapters import require_matching_base
from rightrank.evaluation.peft_models import suppress_peft_warnings
from rightrank.exports.servers import MERGED, ExportResult
from rightrank.runs.compare import compare_adapters, read_labels
from rightrank.schema.errors import DataError, ModelError, SettingsError, get_first_line
from rightrank.schema.events import EvaluationProgress
from rightrank.schema.settings import SelectSettings

VALUE_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def write_merged_model(
    adapter: Path,
    base: str,
    folder: Path,
    settings: SelectSettings,
    value_type: str,
    run_data: str | None,
    check_files: Sequence[Path],
    on_event: Callable[[EvaluationProgress], None],
) -> ExportResult:
    """Write the merged model into `folder`, and compare it with the adapter.

    Args:
        settings: for loading the base and the rows, with the metric and the margin.
        run_data: the data of the adapter's run, whose test split is compared on if there are no `check_files`.

    Raises:
        SettingsError: an unknown type of values.
        ModelError: the base or the adapter cannot be loaded.
        DataError: rows that cannot be used.
        RunError: the disk is full.
    """
    if value_type not in VALUE_TYPES:
        raise SettingsError(f"--type {value_type!r}: {MERGED} can be written as {', '.join(VALUE_TYPES)}")
    splits = None if check_files else _load_test_split(run_data, settings, adapter)
    with replace_folder(folder) as temporary:
        float32 = settings.model_copy(update={"dtype": "float32", "load_in_4bit": False, "load_in_8bit": False})
        loaded_base = load_base(base, float32, read_labels(str(adapter)))
        require_matching_base(adapter, loaded_base)
        # Values are merged in 32 bits and rounded once.
        merge_adapter(loaded_base.model, adapter).to(VALUE_TYPES[value_type]).save_pretrained(temporary)
        loaded_base.tokenizer.save_pretrained(temporary)
    files = check_files or [Path("the run's test split")]
    comparison = compare_adapters((str(adapter), str(folder)), base, files, settings, on_event, run_splits=splits)
    rows = ", ".join(map(str, files))
    write_text(
        folder / "README.md",
        f"---\nbase_model: {base}\ntags: [rightrank, {MERGED}]\n---\n\n# {Path(base).name} with an adapter, {MERGED} in {value_type}\n\n"
        f"Compared with the adapter over its base, on {rows}:\n\n> {comparison.sentence}\n",
    )
    names = sorted(path.name for path in folder.iterdir())
    return ExportResult(
        MERGED, folder, names, "vllm serve .", [comparison.sentence], comparison.model_dump(mode="json")
    )


def merge_adapter(model: Any, adapter: Path) -> Any:
    """Return the base model with the adapter's update in its weights, merged by PEFT.

    Raises:
        ModelError: PEFT cannot attach or merge the adapter.
    """
    try:
        with suppress_peft_warnings(), ensure_peft_format(adapter) as peft_path:
            merged_model = PeftModel.from_pretrained(model, str(peft_path)).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError) as error:  # of shapes, and of names or merged values
        raise ModelError(f"{adapter}: PEFT can't merge it ({get_first_line(error)})") from None
    if hasattr(merged_model.config, "quantization_config"):  # of a GGUF file, whose values are plain now
        del merged_model.config.quantization_config
    merged_model.hf_quantizer, merged_model.is_quantized = None, False
    return merged_model


def _load_test_split(data: str | None, settings: SelectSettings, adapter: Path) -> DataSplits:
    if data is None or not Path(data).exists():
        raise DataError(
            f"there are no held-out rows to compare on ({data or 'the adapter belongs to no run'}); give them with --check DATA"
        )
    splits = load_data(Path(data), settings, classes=read_labels(str(adapter)))
    rows = splits.examples["test"] or splits.examples["validation"]
    return replace(splits, examples={"train": rows, "validation": rows, "test": rows})
