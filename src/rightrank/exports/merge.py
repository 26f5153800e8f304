"""Merge an adapter into its base model (`export --to merged`) and compare the result with the adapter on held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from rightrank.adapters.adapter_files import ensure_peft_format
from rightrank.bases.base_models import LoadedModel, load_base
from rightrank.data.files import replace_folder, write_text
from rightrank.data.rows import can_be_read
from rightrank.data.splits import DataSplits, load_data, load_held_out
from rightrank.evaluation.attached_adapters import require_matching_base
from rightrank.evaluation.batches import Batch, collate
from rightrank.evaluation.peft_models import suppress_peft_warnings
from rightrank.evaluation.tokens import encode_splits
from rightrank.exports.servers import MERGED, ExportResult
from rightrank.runs.compare import compare_adapters, read_labels
from rightrank.schema.errors import DataError, ModelError, SettingsError, get_first_line
from rightrank.schema.events import EvaluationProgress
from rightrank.schema.settings import SelectSettings

VALUE_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
COMPARED_ROWS = 4
# The largest ‖merged logits − adapter's logits‖ / ‖adapter's logits‖ that is rounding: of merging in 32 bits, and of the stored type.
TOLERANCES = {"f32": 1e-4, "bf16": 0.05, "f16": 0.01}


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
    labels = read_labels(str(adapter))
    splits = None if check_files else _load_test_split(run_data, settings, adapter)
    rows = splits or load_held_out(check_files[0], settings, labels)
    with replace_folder(folder) as temporary:
        float32 = settings.model_copy(update={"dtype": "float32", "load_in_4bit": False, "load_in_8bit": False})
        loaded_base = load_base(base, float32, labels)
        require_matching_base(adapter, loaded_base)
        batch = _make_batch(rows, loaded_base, float32)
        # Values are merged in 32 bits and rounded once.
        merged_model, logits = merge_adapter(loaded_base.model, adapter, batch)
        merged_model.to(VALUE_TYPES[value_type]).save_pretrained(temporary)
        loaded_base.tokenizer.save_pretrained(temporary)
        del merged_model, loaded_base
        read_back = load_base(str(temporary), float32, labels).model
        _require_equal_logits(adapter, read_back, batch, logits, TOLERANCES[value_type])
    files = check_files or [Path("the run's test split")]
    comparison = compare_adapters((str(adapter), str(folder)), base, files, settings, on_event, run_splits=splits)
    row_files = ", ".join(map(str, files))
    write_text(
        folder / "README.md",
        f"---\nbase_model: {base}\ntags: [rightrank, {MERGED}]\n---\n\n# {Path(base).name} with an adapter, {MERGED} in {value_type}\n\n"
        f"Compared with the adapter over its base, on {row_files}:\n\n> {comparison.sentence}\n",
    )
    names = sorted(path.name for path in folder.iterdir())
    return ExportResult(
        MERGED, folder, names, "vllm serve .", [comparison.sentence], comparison.model_dump(mode="json")
    )


def merge_adapter(model: Any, adapter: Path, batch: Batch) -> tuple[Any, torch.Tensor]:
    """Return the base model with the adapter's update in its weights, merged by PEFT, and the logits of the adapter before the merge.

    Args:
        batch: rows on which the logits of the merged model must be those of the adapter.

    Raises:
        ModelError: PEFT cannot attach or merge the adapter, or the merged model is another one.
    """
    try:
        with suppress_peft_warnings(), ensure_peft_format(adapter) as peft_path:
            peft_model = PeftModel.from_pretrained(model, str(peft_path))
            logits = _compute_logits(peft_model, batch)
            merged_model: Any = peft_model.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError) as error:  # of shapes, and of names or merged values
        raise ModelError(f"{adapter}: PEFT can't merge it ({get_first_line(error)})") from None
    if hasattr(merged_model.config, "quantization_config"):  # of a GGUF file, whose values are plain now
        del merged_model.config.quantization_config
    merged_model.hf_quantizer, merged_model.is_quantized = None, False
    _require_equal_logits(adapter, merged_model, batch, logits, TOLERANCES["f32"])
    return merged_model, logits


def _make_batch(splits: DataSplits, base: LoadedModel, settings: SelectSettings) -> Batch:
    data = encode_splits(splits, base, settings)
    if data.is_classification:  # transformers uses it to find an example's last token
        base.model.config.get_text_config().pad_token_id = base.tokenizer.pad_token_id
    examples = data.splits["validation"]
    indices = range(min(COMPARED_ROWS, len(examples)))
    return collate(examples, indices, base.tokenizer.pad_token_id, base.device)


@torch.no_grad()
def _compute_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Return the logits in float32, those of a language model at real tokens alone."""
    model.eval()
    logits: torch.Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
    return logits[batch.attention_mask.bool()] if logits.dim() > 2 else logits


def _require_equal_logits(adapter: Path, model: Any, batch: Batch, expected: torch.Tensor, tolerance: float) -> None:
    """Raise if the logits of a merged model are not those of the adapter.

    Raises:
        ModelError: they differ by more than the share `tolerance` of their norm.
    """
    deviation = float((_compute_logits(model, batch) - expected).norm() / expected.norm())
    if deviation <= tolerance:
        return
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    cause = (
        "this base uses one weight for its embeddings and its output head, which cannot hold an update of one of them alone; "
        if is_tied
        else ""
    )
    raise ModelError(
        f"{adapter}: the merged model would differ from the adapter by {deviation:.1%} of the logits; {cause}use the adapter unmerged"
    )


def _load_test_split(data: str | None, settings: SelectSettings, adapter: Path) -> DataSplits:
    if data is None or not can_be_read(data):
        raise DataError(
            f"there are no held-out rows to compare on ({data or 'the adapter belongs to no run'}); give them with --check DATA"
        )
    splits = load_data(Path(data), settings, classes=read_labels(str(adapter)))
    rows = splits.examples["test"] or splits.examples["validation"]
    return replace(splits, examples={"train": rows, "validation": rows, "test": rows})
