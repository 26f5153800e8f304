"""`SmallestAdapter`: the smallest adapter that loses nothing, at the end of a training with the Trainer of transformers or TRL.

    trainer.add_callback(SmallestAdapter(trainer.eval_dataset, margin=0.005))
    trainer.train()   # at the end: one sentence, and <output_dir>/rightrank/adapter

What cannot work is refused before the first step. At the end nothing raises: what fails is one line, and the training's own result is safe.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rightrank.adapters.live import Batch, LiveAdapter, LiveAnswer, require_truncatable, smallest_adapter
from rightrank.data.files import replacing_folder, write_text
from rightrank.schema.decision import AdapterAnswer
from rightrank.schema.errors import DataError, RightrankError, SettingsError, first_line

log = logging.getLogger("rightrank")

MIN_EXAMPLES = 30
MOMENT_BATCHES = 64  # of training examples that are collated for second moments, at most
# What a measurement in someone else's process can end in; all else ends the process anyway.
FAILURES = (RightrankError, RuntimeError, OSError, ValueError, LookupError, TypeError, AttributeError, MemoryError)


class SmallestAdapter(TrainerCallback):
    """Truncates the trained adapter at the end of `train()` and keeps the smallest one that loses nothing.

    Args:
        eval_dataset: Held-out rows as the trainer has them, tokenized: `trainer.eval_dataset`. None: what the trainer evaluates on, where it
            evaluates before the end.
        margin: How much worse is still enough, nats a token; None for the default, 0.005.
        ranks: Candidates; None for the powers of two below the adapter's rank.
        metric: `loss`, or `accuracy` of a classifier.
        max_examples: Held-out examples to score at most.
        every_evaluation: Also look for the smallest rank at each evaluation of the training.

    Attributes:
        result: The answer after `train()`; None before, and where it failed.
        curve: `(step, smallest rank that holds)` of each evaluation.

    Raises at the training's begin:
        DataError: no held-out rows, fewer than two, or rows that are not tokenized.
        ModelError: an adapter that cannot be truncated.
        SettingsError: another metric.
    """

    def __init__(
        self,
        eval_dataset: Any = None,
        *,
        margin: float | None = None,
        ranks: Sequence[int] | None = None,
        metric: str = "loss",
        max_examples: int = 1000,
        every_evaluation: bool = False,
    ) -> None:
        self._rows = eval_dataset
        self._margin = margin
        self._ranks = ranks
        self._metric = metric
        self._max_examples = max_examples
        self._every_evaluation = every_evaluation
        self.curve: list[tuple[int, int]] = []
        self._loaders: Mapping[str, Any] = {}
        self.result: LiveAnswer | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot work at the end."""
        if self._metric not in ("loss", "accuracy"):
            raise SettingsError(f"metric {self._metric!r}: the end of a training is measured by loss or accuracy")
        require_truncatable(kwargs["model"], _adapter_name(kwargs["model"]))
        self._loaders = kwargs
        rows = self._held_out()
        if len(rows) < MIN_EXAMPLES:
            log.warning("rightrank: %d held-out examples can show little; give some hundred", len(rows))
        example = _like(rows[0], _keys(kwargs["train_dataloader"]))
        if "input_ids" not in example:
            raise DataError(
                f"SmallestAdapter: the held-out rows have {', '.join(sorted(rows[0]))}, and no input_ids; give trainer.eval_dataset, "
                "which the trainer has tokenized"
            )
        folder = _output(args)
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # a folder that can't be written fails here

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add a point to `curve`, where that was asked for."""
        if not self._every_evaluation or not state.is_world_process_zero:
            return
        try:
            with tempfile.TemporaryDirectory(prefix="rightrank-") as working:
                answer = self._walk(kwargs["model"], args, Path(working)).answer
        except FAILURES as error:
            log.warning("rightrank: step %d: no rank was looked for: %s", state.global_step, first_line(error))
            return
        self.curve.append((state.global_step, answer.rank))
        state.log_history.append({"step": state.global_step, "rightrank/rank": answer.rank})
        top = " The top may be too small: half of its rank loses more than the margin." if _is_tight(answer) else ""
        log.warning("step %d: rank %d of %d holds.%s", state.global_step, answer.rank, answer.trained_rank, top)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, write `<output_dir>/rightrank/`, and log the sentence."""
        if not state.is_world_process_zero or state.trial_name is not None:
            return  # of several processes the first measures; a search for hyperparameters ends many trainings
        out = _output(args) / "rightrank"
        try:
            with tempfile.TemporaryDirectory(prefix="rightrank-") as working:
                self.result = self._walk(kwargs["model"], args, Path(working))
                _write(self.result, out)
        except FAILURES as error:
            log.warning("rightrank: no smaller adapter was looked for: %s", first_line(error))
            return
        answer = self.result.answer
        logged: dict[str, float] = {"step": state.global_step, "rightrank/rank": answer.rank}
        if answer.difference_high is not None:
            logged["rightrank/difference_high"] = answer.difference_high
        state.log_history.append(logged)
        log.warning("%s %s", answer.sentence, out / "adapter")

    def _walk(self, model: Any, args: TrainingArguments, working: Path) -> LiveAnswer:
        loader, size = self._loaders["train_dataloader"], args.per_device_eval_batch_size
        live = LiveAdapter(
            model=model,
            held_out=_batches(self._held_out(), loader, size),
            train=_batches(_first(loader.dataset, MOMENT_BATCHES * size), loader, size),
            margin=self._margin,
            ranks=self._ranks,
            name=_adapter_name(model),
            metric=self._metric,
        )
        return smallest_adapter(live, working)

    def _held_out(self) -> Sequence[Mapping[str, Any]]:
        """The rows to score, at most `max_examples`.

        Raises:
            DataError: none were given, and the trainer has not evaluated yet.
        """
        loader = self._loaders.get("eval_dataloader")
        rows = self._rows if self._rows is not None else getattr(loader, "dataset", None)
        if rows is None or len(rows) < 2:
            raise DataError("SmallestAdapter has no held-out rows: give SmallestAdapter(trainer.eval_dataset)")
        return _first(rows, self._max_examples)


def _output(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".")


def _adapter_name(model: Any) -> str:
    active = getattr(model, "active_adapter", "default")
    return active if isinstance(active, str) else active[0]


def _first(rows: Any, count: int) -> list[Mapping[str, Any]]:
    return [rows[index] for index in range(min(len(rows), count))]


def _keys(loader: Any) -> set[str]:
    """The columns that reach the collator in training."""
    return set(loader.dataset[0])


def _like(row: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key in keys}


def _batches(rows: Sequence[Mapping[str, Any]], loader: Any, size: int) -> list[Batch]:
    """Batches by the trainer's own collator, in the order of the rows."""
    keys = _keys(loader)
    kept = [_like(row, keys) for row in rows]
    return [loader.collate_fn(kept[start : start + size]) for start in range(0, len(kept), size)]


def _is_tight(answer: AdapterAnswer) -> bool:
    """Whether the first rank below the top fails already."""
    lower = [one for one in answer.candidates if one.rank < answer.trained_rank]
    return bool(lower) and not max(lower, key=lambda one: one.rank).holds


def _write(found: LiveAnswer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with replacing_folder(out / "adapter") as adapter:
        shutil.copytree(found.folder, adapter, dirs_exist_ok=True)
        write_text(adapter / "README.md", _card(found))
    write_text(out / "decision.json", json.dumps(_document(found), indent=2) + "\n")


def _document(found: LiveAnswer) -> dict[str, Any]:
    answer = found.answer
    return {
        "adapter_sentence": answer.sentence,
        "handed_over": {
            "rank": answer.rank,
            "how": answer.how,
            "trained_rank": answer.trained_rank,
            "difference": answer.difference,
            "difference_high": answer.difference_high,
        },
        "cost": {"seconds": found.seconds, "examples": found.examples},
        "notes": [*answer.notes, *found.notes],
        "answer": answer.model_dump(mode="json"),
    }


def _card(found: LiveAnswer) -> str:
    answer = found.answer
    made = f"truncated from rank {answer.trained_rank}" if answer.rank < answer.trained_rank else "as it was trained"
    rows = "\n".join(
        f"| {one.rank} | {one.difference:+.4f} | {'' if one.difference_high is None else f'{one.difference_high:+.4f}'} |"
        for one in answer.candidates
    )
    return (
        f"# LoRA adapter of rank {answer.rank}, {made}\n\n{answer.sentence}\n\n"
        f"| rank | difference | 95% upper bound |\n| --- | --- | --- |\n{rows}\n\n"
        f"Held-out loss, nats a token, against rank {answer.trained_rank}, on {found.examples} examples that were scored in the training's "
        "own process by rightrank.\n"
    )
