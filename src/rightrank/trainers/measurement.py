"""Measure the truncations of an adapter in memory after a training, and write `adapter/`, `answer.json` and `report.html`.

Each truncation replaces the trained factors for one evaluation. Afterwards the model is restored: parameters, modes, gradients, hooks,
configurations and random states.
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rightrank.adapters.adapter_files import AdapterFolder
from rightrank.adapters.adapter_folders import BASE_FILE
from rightrank.adapters.find_smallest import SmallestAdapterAnswer, find_smallest
from rightrank.adapters.resize import RankedAdapter, list_candidate_ranks, write_truncation
from rightrank.bases.base_models import compute_base_identity
from rightrank.data.files import replace_folder, write_text
from rightrank.decision.adapter import Criterion, ScoredAdapter
from rightrank.evaluation.loss import BatchLoss
from rightrank.evaluation.peft_models import (
    MOMENT_TOKENS,
    GatheredMoments,
    accumulate_moments,
    find_lora_modules,
    set_update_to_zero,
)
from rightrank.evaluation.scores import Scores
from rightrank.report.format import format_training_settings
from rightrank.schema.errors import DataError, NotFiniteError, RunFolderError, SettingsError
from rightrank.schema.metrics import LossKind, Margin
from rightrank.schema.results import AdapterAnswer
from rightrank.schema.settings import SelectSettings
from rightrank.trainers.in_memory import (
    copy_factors,
    gather_objects,
    get_process_index,
    get_world_size,
    preserve_state,
    save_trained_adapter,
    sync_errors,
)
from rightrank.trainers.trainer_batches import (
    BETA,
    GROUP_KEY,
    Batch,
    TrainerLoss,
    add_reference,
    compute_batch_loss,
    count_positions,
    has_class_labels,
    read_batch,
)

log = logging.getLogger("rightrank")

ANSWER_FILE = "answer.json"
TRAINED_FOLDER = "trained"  # holds the adapter before truncation while it is measured


@dataclass(frozen=True, slots=True)
class InMemoryAdapter:
    model: Any  # a PEFT model with a LoRA adapter of linear layers
    held_out: list[Batch]  # batches of examples that the training did not see
    # Batches of training examples for second moments; without them, adapters are truncated by singular values.
    train: Sequence[Batch] = ()
    name: str = "default"  # the adapter's name in PEFT
    beta: float = BETA  # of the loss of preference pairs
    moment_tokens: int = MOMENT_TOKENS  # the maximum number of tokens of `train` that are read
    trainer_loss: TrainerLoss | None = None  # replaces the losses of the model's form

    @property
    def loss_kind(self) -> LossKind:
        if self.trainer_loss is not None:
            return "loss"
        batch = self.held_out[0]
        return "pair_loss" if "completion_mask" in batch else "loss" if has_class_labels(batch) else "token_loss"

    def compute_loss(self, batch: Batch) -> BatchLoss:
        if self.trainer_loss is not None:
            return self.trainer_loss(batch)
        return compute_batch_loss(self.model, batch, self.beta)

    @torch.no_grad()
    def score(self) -> Scores:
        """Score every held-out example with the factors in memory.

        Each process scores its share of the batches, and returns the scores of all, in one order.
        """
        columns: tuple[list[Any], ...] = [], [], [], []
        with sync_errors():
            for number in range(get_process_index(), len(self.held_out), get_world_size()):
                # The log-probabilities of pairs under the reference do not change, so they are computed once.
                batch = self.held_out[number] = add_reference(self.model, self.held_out[number])
                loss = self.compute_loss(batch)
                examples = loss.example_tokens.nonzero()[:, 0]
                groups = batch.get(GROUP_KEY, torch.zeros(0)).tolist()
                if groups and self.trainer_loss is None:  # a row may hold several examples or none
                    groups = read_batch(self.model, batch).get_example_groups(groups, examples)
                accuracy = loss.example_metrics.get("accuracy", torch.zeros(0)).tolist()
                losses, tokens = (values[examples].tolist() for values in (loss.example_losses, loss.example_tokens))
                for column, values in zip(columns, (losses, tokens, accuracy, groups), strict=True):
                    column += values
        gathered = zip(*gather_objects(columns), strict=True)
        losses, tokens, accuracy, groups = ([value for values in lists for value in values] for lists in gathered)
        return Scores(
            losses, tokens, {"accuracy": accuracy} if accuracy else {}, groups if len(groups) == len(losses) else None
        )


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    steps: int = 0  # 0 if unknown
    seconds: float | None = None  # without the measurement; None if unknown
    weights: str = "last"  # which of its checkpoints is measured
    learning_rate: float | None = None
    batch_size: int | None = None  # per device
    gradient_accumulation_steps: int | None = None
    notes: Sequence[str] = ()

    def format_settings(self, config: Mapping[str, Any]) -> str:
        """Format the settings of the training in the names of PEFT and transformers. `config` is that of the trained adapter."""
        modules = config["target_modules"]
        return format_training_settings(
            config["r"],
            config["lora_alpha"],
            modules if isinstance(modules, str) else sorted(modules),
            use_rslora=config["use_rslora"],
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            steps=self.steps,
        )


@dataclass(frozen=True, slots=True)
class SmallestAdapterResult:
    """The smallest adapter of a training within the margin. The last note of the answer states the cost."""

    answer: AdapterAnswer
    trained_scores: Scores  # held-out scores of the adapter before truncation
    folder: Path  # with `adapter/`, `answer.json` and `report.html`


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
        ModelError: PEFT saves another adapter than the one in memory.
        NotFiniteError: a held-out loss is NaN or infinite.
        RunFolderError: `out` holds another run or files of another program.
        OSError: `out` cannot be written.
    """
    is_first, start_time = get_process_index() == 0, time.monotonic()
    level = logging.WARNING if is_first else logging.DEBUG
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        with sync_errors():
            require_result_folder(out)
            folder = (out if is_first else Path(name)) / TRAINED_FOLDER
            trained = _save_adapter(in_memory_adapter, folder, write_tokenizer)
        command = build_resize_command(out, margin, metric)
        advice = "" if in_memory_adapter.trainer_loss is not None else f"; if this is interrupted: {command}"
        log.log(level, "rightrank: measuring truncations on %d batches%s", len(in_memory_adapter.held_out), advice)
        criterion = Criterion(metric, metric == "accuracy", margin, in_memory_adapter.loss_kind)
        with sync_errors():
            candidates = list_candidate_ranks(trained, ranks)
            smallest, scores, notices = measure_truncations(
                in_memory_adapter, trained, candidates, criterion, Path(name)
            )
            seconds = time.monotonic() - start_time
            time_share = f", {seconds / training.seconds:.1%} of the training's time" if training.seconds else ""
            cost = f"Measured on the {training.weights} weights with {len(scores.losses)} held-out examples in {seconds:.1f} s{time_share}."
            notes = [*training.notes, *smallest.answer.notes, *notices, cost]
            answer = smallest.answer.model_copy(update={"notes": notes})
            settings = training.format_settings(trained.config)
            if is_first:
                _write_result(out, smallest.adapter.folder, answer, criterion, settings)
    for line in (answer.sentence, f"adapter: {out / 'adapter'}", f"train: {settings}", *answer.notes):
        log.log(level, "rightrank: %s", line)
    return SmallestAdapterResult(answer, scores, out)


def measure_truncations(
    in_memory_adapter: InMemoryAdapter, trained: AdapterFolder, ranks: Sequence[int], criterion: Criterion, folder: Path
) -> tuple[SmallestAdapterAnswer[RankedAdapter], Scores, Sequence[str]]:
    """Truncate an adapter in memory downward, and score each truncation on the held-out batches. The model is restored afterwards.

    Args:
        trained: the saved adapter, which is truncated to files in `folder`.

    Returns:
        The smallest adapter, the scores of the trained one, and notes on how truncations were computed.

    Raises:
        DataError: fewer than two held-out examples have a label.
        NotFiniteError: a held-out loss is NaN or infinite.
    """
    model, name = in_memory_adapter.model, in_memory_adapter.name
    scores_by_rank: dict[int, Scores] = {}
    with preserve_state(model, name):
        # The model still holds the trained factors here. Later each truncation replaces them.
        gathered = gather_adapter_moments(in_memory_adapter)

        def truncate(rank: int) -> RankedAdapter:
            if rank == 0:
                return RankedAdapter(0, trained)  # evaluated with its update set to zero
            with sync_errors():
                return write_truncation(trained, folder / f"rank-{rank}", rank, gathered.moments)

        def evaluate(adapter: RankedAdapter) -> ScoredAdapter:
            is_trained = adapter.rank == trained.rank
            if adapter.rank == 0:
                set_update_to_zero(model, name)
            elif not is_trained:
                copy_factors(model, name, adapter.folder)
            scores = scores_by_rank[adapter.rank] = in_memory_adapter.score()
            if not np.isfinite(scores.losses).all():
                raise NotFiniteError(
                    f"rank {adapter.rank}: a held-out loss is NaN or infinite; the training may have diverged"
                )
            if len(scores.losses) < 2:
                raise DataError("fewer than two held-out examples have a label; give more examples")
            return scores.build_scored_adapter(
                f"rank-{adapter.rank}", adapter.rank, criterion, method="trained" if is_trained else "truncated"
            )

        smallest = find_smallest(RankedAdapter(trained.rank, trained), ranks, truncate, evaluate, criterion)
    return smallest, scores_by_rank[trained.rank], gathered.notices


def gather_adapter_moments(in_memory_adapter: InMemoryAdapter) -> GatheredMoments:
    if not in_memory_adapter.train:
        notice = "truncated by singular values: no training examples were given for second moments"
        return GatheredMoments({}, 0, (notice,))
    model, name = in_memory_adapter.model, in_memory_adapter.name

    def run_passes() -> Iterator[tuple[int, int]]:
        num_positions = 0
        for batch in in_memory_adapter.train:
            if num_positions >= in_memory_adapter.moment_tokens:
                return
            loss, positions = in_memory_adapter.compute_loss(batch), count_positions(batch)
            torch.autograd.backward(loss.total)
            num_positions += positions
            yield positions, int(loss.example_tokens.sum())

    modules = [module for module, layer in find_lora_modules(model).items() if name in layer.lora_A]
    return accumulate_moments(model, modules, run_passes(), name)


def _save_adapter(
    in_memory_adapter: InMemoryAdapter, folder: Path, write_tokenizer: Callable[[Path], object] | None
) -> AdapterFolder:
    """Save the trained adapter with the identity of its base and with the tokenizer."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    adapter = save_trained_adapter(in_memory_adapter.model, in_memory_adapter.name, folder)
    identity = compute_base_identity(in_memory_adapter.model.get_base_model(), adapter.base_model or "")
    write_text(folder / BASE_FILE, identity.to_json().decode())
    if write_tokenizer is not None:
        write_tokenizer(folder)
    return adapter


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
