"""Measure the truncations of an adapter in memory after a training, and write `adapter/`, `answer.json` and `report.html`."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rightrank.adapters.adapter_folders import BASE_FILE
from rightrank.adapters.adapter_reader import AdapterFolder
from rightrank.adapters.resize import list_candidate_ranks
from rightrank.bases.base_models import compute_base_identity
from rightrank.data.files import replace_folder, write_text
from rightrank.decision.adapter import Criterion
from rightrank.report.format import format_training_settings
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.errors import ModelError, RunFolderError, SettingsError
from rightrank.schema.metrics import LossKind, Margin
from rightrank.schema.settings import SelectSettings
from rightrank.trainers.batch_scores import has_class_labels, read_batch
from rightrank.trainers.distributed import gather_parameters, get_process_index, is_partitioned, sync_errors
from rightrank.trainers.in_memory import InMemoryAdapter, measure_truncations, save_trained_adapter
from rightrank.trainers.preserved_state import preserve_state
from rightrank.training.evaluation import Scores

log = logging.getLogger("rightrank")

ANSWER_FILE = "answer.json"
TRAINED_FOLDER = "trained"  # holds the adapter before truncation while it is measured


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """What is known about the training whose adapter is truncated."""

    steps: int = 0  # 0 if unknown
    seconds: float | None = None  # without the measurement; None if unknown
    checkpoint_step: int | None = None  # step of the best checkpoint if it is measured; None for the last one
    learning_rate: float | None = None
    batch_size: int | None = None  # per device
    gradient_accumulation_steps: int | None = None
    notes: Sequence[str] = ()

    @property
    def checkpoint(self) -> str:
        if self.checkpoint_step is not None:
            return f"best (step {self.checkpoint_step})"
        return f"last (step {self.steps})" if self.steps else "last"

    def format_settings(self, config: Mapping[str, Any]) -> str:
        """Format the settings of the training in the names of PEFT and transformers. `config` is that of the trained adapter."""
        modules = config["target_modules"]
        return format_training_settings(
            config["r"],
            config["lora_alpha"],
            config["use_rslora"],
            modules if isinstance(modules, str) else sorted(modules),
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            steps=self.steps,
        )

    def format_cost(self, examples: int, seconds: float) -> str:
        """Describe the cost of the measurement, compared with that of the training."""
        time_share = f", {seconds / self.seconds:.1%} of the training's time" if self.seconds else ""
        return f"Measured on the {self.checkpoint} weights with {examples} held-out examples in {seconds:.1f} s{time_share}."


@dataclass(frozen=True, slots=True)
class SmallestAdapterResult:
    """The smallest adapter of a training within the margin. The last note of the answer states the cost."""

    answer: AdapterAnswer
    trained_scores: Scores  # held-out scores of the adapter before truncation
    folder: Path  # with `adapter/`, `answer.json` and `report.html`

    @property
    def num_examples(self) -> int:
        return len(self.trained_scores.losses)


def build_settings(margin: Margin | None, ranks: Sequence[int] | int | None, metric: str | None) -> SelectSettings:
    """Build the settings of a measurement. None selects the default.

    Raises:
        SettingsError: an invalid value.
    """
    if metric not in (None, "loss", "accuracy"):
        raise SettingsError(f"metric {metric!r}: allowed are loss and accuracy")
    values = {"margin": margin, "ranks": ranks, "metric": metric}
    return SelectSettings(**{name: value for name, value in values.items() if value is not None})


def require_result_folder(out: Path) -> None:
    """Raise if a training cannot write its result to `out`. Nothing is written.

    Raises:
        RunFolderError: `out` is a file, or holds a run or files of another program under the names of the result.
    """
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{out}: this is a file, not a folder; give another folder")
    present = [name for name in ("adapter", "report.html", "journal.jsonl") if (out / name).exists()]
    if present and not (out / ANSWER_FILE).is_file():
        raise RunFolderError(f"{out}: it holds {present[0]} of another run or program; give another folder")


def build_resize_command(out: Path, margin: Margin | None = None, metric: str = "loss") -> str:
    """Return the command that measures the saved adapter in a process of its own, on the user's files."""
    arguments = [
        str(out / TRAINED_FOLDER),
        str(out / "resized"),
        "--data",
        "HELD_OUT.jsonl",
        "--train",
        "TRAINING.jsonl",
    ]
    arguments += [] if margin is None else ["--margin", str(margin)]
    arguments += [] if metric == "loss" else ["--set", f"metric={metric}"]
    return shlex.join(["rightrank", "resize", *arguments])


def find_smallest_adapter(
    in_memory_adapter: InMemoryAdapter,
    out: Path,
    training: TrainingSummary,
    *,
    margin: Margin | None = None,
    ranks: Sequence[int] | None = None,
    metric: str = "loss",
    write_tokenizer: Callable[[Path], object] | None = None,
) -> SmallestAdapterResult:
    """Write the smallest adapter within the margin to `out`, in place of the result of an earlier training.

    If there are several processes, only the first one writes to `out` and logs warnings.

    Args:
        margin: the accepted loss of quality; None for 1% of the gain over the base.
        ranks: the candidates; None for the powers of two below the adapter's rank.
        write_tokenizer: writes the tokenizer into an adapter's folder.

    Raises:
        DataError: fewer than two held-out examples have a label.
        ModelError: the model returns no logits, or ZeRO-3 has partitioned its parameters.
        NotFiniteError: a held-out loss is NaN or infinite.
        RunFolderError: `out` holds another run or files of another program.
        OSError: `out` cannot be written.
    """
    is_first, start_time = get_process_index() == 0, time.monotonic()
    level = logging.WARNING if is_first else logging.DEBUG
    command = build_resize_command(out, margin, metric)
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        with sync_errors():
            require_result_folder(out)
            _require_logits(in_memory_adapter)
            folder = (out if is_first else Path(name)) / TRAINED_FOLDER
            trained = _save_adapter(in_memory_adapter, folder, write_tokenizer)
        if is_partitioned(in_memory_adapter.model):
            raise ModelError("ZeRO-3 partitions each parameter, so truncations cannot be loaded into the model")
        advice = "" if in_memory_adapter.trainer_loss is not None else f"; if this is interrupted: {command}"
        log.log(level, "rightrank: measuring truncations on %d batches%s", len(in_memory_adapter.held_out), advice)
        criterion = Criterion(metric, metric == "accuracy", margin, _find_loss_kind(in_memory_adapter))
        with sync_errors():
            candidates = list_candidate_ranks(trained, ranks)
            measured = measure_truncations(in_memory_adapter, trained, candidates, criterion, Path(name))
            scores, answer = measured.trained_scores, measured.smallest.answer
            cost = training.format_cost(len(scores.losses), time.monotonic() - start_time)
            answer = answer.model_copy(update={"notes": [*training.notes, *answer.notes, *measured.notes, cost]})
            settings = training.format_settings(trained.config)
            if is_first:
                _write_result(out, measured.smallest.adapter.folder, answer, criterion, settings)
    for line in (answer.sentence, f"adapter: {out / 'adapter'}", f"train: {settings}", *answer.notes):
        log.log(level, "rightrank: %s", line)
    return SmallestAdapterResult(answer, scores, out)


def _require_logits(in_memory_adapter: InMemoryAdapter) -> None:
    """Raise if the model is an encoder without a classification head. Its rows have no scores."""
    batch = next(iter(in_memory_adapter.held_out), {})
    if is_partitioned(in_memory_adapter.model) or "labels" not in batch or not has_class_labels(batch):
        return
    with preserve_state(in_memory_adapter.model, in_memory_adapter.name), torch.no_grad():
        output = in_memory_adapter.model(**read_batch(in_memory_adapter.model, batch).inputs)
    if getattr(output, "logits", None) is None:
        name = type(in_memory_adapter.model.get_base_model()).__name__
        raise ModelError(
            f"{name} returns no logits: an encoder without a head cannot score classes; give a model with a classification head, such as one "
            "of AutoModelForSequenceClassification"
        )


def _save_adapter(
    in_memory_adapter: InMemoryAdapter, folder: Path, write_tokenizer: Callable[[Path], object] | None
) -> AdapterFolder:
    """Save the trained adapter with the identity of its base and with the tokenizer."""
    model = in_memory_adapter.model
    folder.parent.mkdir(parents=True, exist_ok=True)
    with gather_parameters(model):
        adapter = save_trained_adapter(model, in_memory_adapter.name, folder)
        identity = compute_base_identity(model.get_base_model(), adapter.base_model or "")
    write_text(folder / BASE_FILE, identity.to_json().decode())
    if write_tokenizer is not None:
        write_tokenizer(folder)
    return adapter


def _find_loss_kind(in_memory_adapter: InMemoryAdapter) -> LossKind:
    batch = in_memory_adapter.held_out[0]
    if in_memory_adapter.trainer_loss is not None:
        return "loss"
    return "pair_loss" if "completion_mask" in batch else "loss" if has_class_labels(batch) else "token_loss"


def _write_result(
    out: Path, adapter: AdapterFolder, answer: AdapterAnswer, criterion: Criterion, training_settings: str
) -> None:
    from rightrank.report.adapter_page import render_adapter_page  # not needed before the training has ended

    with replace_folder(out / "adapter") as temporary:
        for file in adapter.path.iterdir():
            shutil.copy2(file, temporary / file.name)
    page = render_adapter_page(answer, criterion.metric, criterion.higher_is_better, adapter.config, training_settings)
    write_text(out / "report.html", page)
    document = {"metric": criterion.metric, "higher_is_better": criterion.higher_is_better, **answer.model_dump()}
    write_text(out / ANSWER_FILE, json.dumps(document, indent=2, allow_nan=False) + "\n")
    shutil.rmtree(out / TRAINED_FOLDER)
