"""Merge an adapter into its base model (`export --to merged`) and compare the result with the adapter on held-out examples."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from rightrank.adapters.adapter_files import ensure_peft_format
from rightrank.bases.base_models import load_base
from rightrank.data.files import replace_folder, write_text
from rightrank.data.splits import DataSplits, load_data
from rightrank.exports.servers import MERGED, ExportResult
from rightrank.report.format import format_bytes
from rightrank.runs.compare import compare_adapters, read_labels
from rightrank.schema.errors import DataError, ModelError, RunError, SettingsError, get_first_line
from rightrank.schema.events import EvaluationProgress
from rightrank.schema.settings import SelectSettings
from rightrank.training.adapter_runtime import require_matching_base
from rightrank.training.peft_models import suppress_peft_warnings

VALUE_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
TEST_SPLIT = "the run's test split"


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """An adapter to merge, and the held-out rows on which the merged model is compared."""

    adapter: Path
    base: str
    settings: SelectSettings  # for loading the base and the rows, with the metric and the margin
    data: str | None  # data of the adapter's run
    value_type: str  # a key of `VALUE_TYPES`
    check_files: Sequence[Path]  # held-out rows; if empty, the test split of `data` is used
    on_event: Callable[[EvaluationProgress], None]


def write_merged_model(request: MergeRequest, folder: Path) -> ExportResult:
    """Write the merged model into `folder`, which is replaced, and compare it with the adapter.

    Raises:
        SettingsError: an unknown type of values.
        ModelError: the base or the adapter cannot be loaded.
        DataError: rows that cannot be used.
        RunError: the disk is full; the previous folder stays in place.
    """
    if request.value_type not in VALUE_TYPES:
        raise SettingsError(f"--type {request.value_type!r}: {MERGED} can be written as {', '.join(VALUE_TYPES)}")
    check_files, splits = request.check_files, None
    if not check_files:
        splits, check_files = _load_test_split(request), [Path(TEST_SPLIT)]
    with replace_folder(folder) as temporary:
        _write_model(request, VALUE_TYPES[request.value_type], temporary)
    comparison = compare_adapters(
        (str(request.adapter), str(folder)),
        request.base,
        check_files,
        request.settings,
        request.on_event,
        run_splits=splits,
    )
    files = sorted(path.name for path in folder.iterdir())
    comparison_values = comparison.model_dump(mode="json")
    result = ExportResult(MERGED, folder, files, "vllm serve .", [comparison.sentence], comparison_values)
    write_text(folder / "export.json", json.dumps(asdict(result) | {"folder": str(folder)}, indent=1) + "\n")
    write_text(folder / "README.md", _format_card(request, comparison.sentence))
    return result


def _write_model(request: MergeRequest, dtype: torch.dtype, folder: Path) -> None:
    """Merge in 32 bits and round the result once."""
    settings = request.settings.model_copy(update={"dtype": "float32", "load_in_4bit": False, "load_in_8bit": False})
    loaded_base = load_base(request.base, settings, read_labels(str(request.adapter)))
    require_matching_base(request.adapter, loaded_base)
    needed_bytes = sum(parameter.numel() for parameter in loaded_base.model.parameters()) * dtype.itemsize
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise RunError(
            f"{folder.parent}: the model needs {format_bytes(needed_bytes)}, but only {format_bytes(free_bytes)} are free; make room, or give another --out"
        )
    merge_adapter(loaded_base.model, request.adapter).to(dtype).save_pretrained(folder)
    loaded_base.tokenizer.save_pretrained(folder)


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
    if hasattr(
        merged_model.config, "quantization_config"
    ):  # of a base that came from a GGUF file, whose values are plain now
        del merged_model.config.quantization_config
    merged_model.hf_quantizer, merged_model.is_quantized = None, False
    return merged_model


def _load_test_split(request: MergeRequest) -> DataSplits:
    if request.data is None or not Path(request.data).exists():
        raise DataError(
            f"there are no held-out rows to compare on ({request.data or 'the adapter belongs to no run'}); give them with --check DATA"
        )
    splits = load_data(Path(request.data), request.settings, classes=read_labels(str(request.adapter)))
    rows = splits.examples["test"] or splits.examples["validation"]
    return replace(splits, examples={"train": rows, "validation": rows, "test": rows})


def _format_card(request: MergeRequest, sentence: str) -> str:
    return (
        f"---\nbase_model: {request.base}\ntags: [rightrank, {MERGED}]\n---\n\n# {Path(request.base).name} with an adapter, {MERGED} in {request.value_type}\n\n"
        f"Compared with the adapter over its base, on {', '.join(map(str, request.check_files)) or TEST_SPLIT}:\n\n> {sentence}\n"
    )
