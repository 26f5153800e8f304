"""What the end of a training leaves on disk: `adapter/` with its card, `decision.json`, `report.html`; and, until these are there, what a
fresh process needs to measure again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from rightrank.adapters.compare import labels_of_side
from rightrank.adapters.live import LiveAdapter, LiveAnswer, save_trained, smallest_adapter
from rightrank.adapters.live_scores import Batch, gathered
from rightrank.data.files import read_json_object, replacing_folder, write_text
from rightrank.decision.adapter import METHODS, probable_ranks
from rightrank.models.adapter_files import BESIDE, AdapterFolder, open_adapter
from rightrank.models.base_models import base_identity
from rightrank.models.places import BASE_FILE, CONFIG_FILE
from rightrank.report.figure import Axis, Figure, Series
from rightrank.report.figures import figure_of
from rightrank.report.html import templates
from rightrank.report.tables import candidate_table
from rightrank.schema.decision import AdapterAnswer, HandedOver
from rightrank.schema.errors import ModelError, first_line
from rightrank.train.adapter_runtime import read_identity
from rightrank.train.device import peak_bytes
from rightrank.train.targets import without_peft_noise

MEASURE, TRAINED = "measure", "trained"  # folders
ELSEWHERE = (
    "model",
    "held_out",
    "train",
    "name",
    "write_beside",
)  # of a `LiveAdapter`: in files of their own, or as by default


@dataclass(frozen=True, slots=True)
class Training:
    """What is known of the training whose end is measured."""

    seconds: float | None = None  # without the end; None: not known
    peak_bytes: int = 0  # before the end; 0: not known
    checkpoint: str = "last"  # which weights were measured
    base: str = ""  # the base model's name or folder
    metric: str = "loss"
    curve: Sequence[tuple[int, int]] = ()  # (step, smallest rank that holds)
    notes: Sequence[str] = ()
    flags: Sequence[str] = ()
    command: str = ""  # of `select`, for the settings of this training
    fall: float | None = None  # between the best evaluation and the last; None: not known in the metric's unit

    def beside(self, rank: int, other: int) -> Training:
        """The training whose other checkpoint was measured too: the ranks that hold at the one used and at the other."""
        name = "best" if self.checkpoint.startswith("last") else "last"
        told = (
            f"rank {rank} holds at the checkpoint that is used, {self.checkpoint}, and rank {other} at the {name} one"
        )
        flags = ["checkpoint_matters"] if rank != other else []
        return replace(self, notes=[*self.notes, ": ".join([*flags, told])], flags=[*self.flags, *flags])

    def cost_sentence(self, found: LiveAnswer) -> str:
        share = f", {found.seconds / self.seconds:.1%} of the training's time" if self.seconds else ""
        more = peak_so_far() - self.peak_bytes if self.peak_bytes else 0
        above = f"{more / 2**20:.0f} MiB above" if more > 0 else "not above"
        known = f"; peak memory {above} the training's" if self.peak_bytes else ""
        return f"Measured on {found.examples} held-out examples in {found.seconds:.1f} s{share}{known}."


def peak_so_far() -> int:
    return peak_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def next_training(answer: AdapterAnswer, training: Training) -> tuple[str, str]:
    """`(an estimate of the rank to train at, in a sentence; the command that would prove it)`."""
    low, high = probable_ranks(answer)
    where = f"{low}" if low == high else f"{low} to {high}"
    ranks = ",".join(map(str, sorted({max(1, low // 2), low, high, answer.trained_rank})))
    command = f"{training.command} --ranks {ranks}"
    return (
        f"An estimate, not evidence: the rank to train at next time probably is {where}. This would prove it: {command}",
        command,
    )


def write_answer(found: LiveAnswer, out: Path, training: Training) -> None:
    """Write `adapter/`, `trained/`, `decision.json` and `report.html` to `out`; each replaces an older one whole."""
    for name, source in ((TRAINED, found.folder.parent / TRAINED), ("adapter", found.folder)):
        with replacing_folder(out / name) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
            if name == "adapter":
                (temporary / "README.md").write_text(_card(found, training), encoding="utf-8")
    write_text(out / "decision.json", json.dumps(_document(found, out, training), indent=2) + "\n")
    write_text(out / "report.html", _report(found, training))


def _document(found: LiveAnswer, out: Path, training: Training) -> dict[str, Any]:
    answer = found.answer
    estimate, command = next_training(answer, training)
    handed_over = HandedOver(
        **answer.model_dump(include={*HandedOver.model_fields}),
        max_module_rank=open_adapter(out / "adapter").rank,
        reference_adapter=TRAINED,
    )
    return {
        "adapter_sentence": answer.sentence,
        "handed_over": handed_over.model_dump(mode="json"),
        "truncation": found.truncation,
        "checkpoint": training.checkpoint,
        "cost": {  # of the end against the training
            "seconds": round(found.seconds, 2),
            "training_seconds": None if training.seconds is None else round(training.seconds, 2),
            "share": None if not training.seconds else round(found.seconds / training.seconds, 4),
            "peak_bytes": peak_so_far(),
            "training_peak_bytes": training.peak_bytes,
            "examples": found.examples,
        },
        "training_rank_estimate": {"sentence": estimate, "command": command},
        "curve": [{"step": step, "rank": rank} for step, rank in training.curve],
        "flags": list(training.flags),
        "notes": [*training.notes, *answer.notes, *found.notes],
        "answer": answer.model_dump(mode="json"),
    }


def _card(found: LiveAnswer, training: Training) -> str:
    answer = found.answer
    made = "as it was trained"
    if found.truncation is not None:
        made = f"truncated by {METHODS[found.truncation]} from rank {answer.trained_rank}"
    heading, *rows = candidate_table(answer, training.metric)
    lines = [heading, ["---"] * len(heading), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "".join(f"- {note}\n" for note in [*training.notes, *answer.notes, *found.notes])
    base = f"base_model: {training.base}\n" if training.base else ""
    return (
        f"---\n{base}library_name: peft\n---\n\n# LoRA adapter of rank {answer.rank}, {made}\n\n{answer.sentence}\n\n{table}\n\n"
        f"Made by rightrank at the end of the training, from the {training.checkpoint} weights, in the training's own process. "
        f"{training.cost_sentence(found)}\n\n{notes}{_loading(found.folder)}"
    )


def _loading(folder: Path) -> str:
    """Python that loads the adapter; PEFT keeps no number of labels. Empty for a task that is neither language nor texts by class."""
    task = read_json_object(folder / CONFIG_FILE).get("task_type")
    kind = {"CAUSAL_LM": "CausalLM", "SEQ_CLS": "SequenceClassification"}.get(str(task))
    if kind is None:
        return ""
    labels = labels_of_side(str(folder)) if task == "SEQ_CLS" else None
    more = f", num_labels={len(labels)}" if labels else ""
    return (
        f"\n```python\nfrom peft import AutoPeftModelFor{kind}\n\n"
        f"model = AutoPeftModelFor{kind}.from_pretrained('this/folder'{more})\n```\n"
    )


def _report(found: LiveAnswer, training: Training) -> str:
    answer = found.answer
    figures = [figure_of(answer, answer.candidates, training.metric, training.metric == "accuracy")]
    figures += [_curve_figure(training.curve, answer.trained_rank)] if training.curve else []
    estimate, _ = next_training(answer, training)
    texts = [*training.notes, *answer.notes, *found.notes, estimate, training.cost_sentence(found)]
    rows = candidate_table(answer, training.metric)
    page = templates().get_template("adapter.html")
    return page.render(sentence=answer.sentence, texts=texts, figures=figures, rows=rows)


def _curve_figure(curve: Sequence[tuple[int, int]], trained_rank: int) -> Figure:
    """The smallest rank that holds, over the steps of the training."""
    steps, ranks = tuple(step for step, _ in curve), tuple(rank for _, rank in curve)
    return Figure(
        name="smallest_rank",
        title="Smallest rank that holds, over the steps",
        alt="; ".join(f"step {step}: rank {rank}" for step, rank in curve),
        x=Axis("step", ticks=steps if len(steps) < 8 else ()),
        y=Axis("smallest rank that holds", "log2", tuple(sorted({*ranks, trained_rank}))),
        series=(Series("smallest rank that holds", steps, ranks, kind="line"),),
        columns=("step", "rank"),
        rows=tuple(curve),
    )


def keep(live: LiveAdapter, out: Path, training: Training) -> None:
    """Write what a fresh process needs to measure: the trained adapter, the batches, and what was asked."""
    base = live.model.get_base_model()
    with replacing_folder(out / MEASURE) as folder:
        with gathered(live.model):
            save_trained(live, folder / TRAINED)
        base.config.save_pretrained(folder / "base")
        tensors = {
            f"{split}.{number}.{key}": value.detach().cpu().contiguous().clone()
            for split, batches in (("held_out", live.held_out), ("train", live.train))
            for number, batch in enumerate(batches)
            for key, value in batch.items()
            if isinstance(value, torch.Tensor)
        }
        save_file(tensors, folder / "batches.safetensors")
        asked = {
            "base_class": type(base).__name__,
            "dtype": str(next(iter(base.parameters())).dtype).removeprefix("torch."),
            "live": {one.name: getattr(live, one.name) for one in fields(live) if one.name not in ELSEWHERE},
            "training": asdict(training),
        }
        write_text(folder / "measure.json", json.dumps(asked, indent=2, default=list))


def measure_again(out: Path) -> str:
    """Measure from the folder that `keep` left in `out`, write the answer there, and return its sentences.

    Raises:
        ModelError: the folder is not whole, or the base cannot be loaded or is another one.
        RunFolderError: `out` cannot be written.
    """
    folder = out / MEASURE
    if not (folder / "measure.json").is_file():
        raise ModelError(
            f"{out}: there is no {MEASURE}/measure.json; the measurement ended, or the training did not reach its end"
        )
    asked = read_json_object(folder / "measure.json")
    adapter = open_adapter(folder / TRAINED)
    base = _base(folder, asked)
    with without_peft_noise():
        model: Any = PeftModel.from_pretrained(base, str(adapter.path))
    batches = _read_batches(folder / "batches.safetensors")
    live = LiveAdapter(
        model,
        batches["held_out"],
        batches.get("train", ()),
        **asked["live"],
        write_beside=partial(_copy_beside, adapter),
    )
    # The peak memory of the training is that of another process.
    training = Training(**asked["training"] | {"peak_bytes": 0, "curve": list(map(tuple, asked["training"]["curve"]))})
    with tempfile.TemporaryDirectory(prefix="rightrank-") as working:
        found = smallest_adapter(live, Path(working))
        write_answer(found, out, training)
    shutil.rmtree(folder)
    return f"{found.answer.sentence} {out / 'adapter'}\n{training.cost_sentence(found)}"


def _copy_beside(adapter: AdapterFolder, folder: Path) -> None:
    for name in BESIDE:
        if (adapter.path / name).is_file():
            shutil.copy2(adapter.path / name, folder / name)


def _base(folder: Path, asked: Mapping[str, Any]) -> Any:
    name = asked["training"]["base"]
    if not name:
        raise ModelError("the base model has no name that it could be loaded by; the training made it in memory")
    try:
        config = transformers.AutoConfig.from_pretrained(folder / "base")
        base_class = getattr(transformers, asked["base_class"])
        base = base_class.from_pretrained(name, config=config, dtype=getattr(torch, asked["dtype"]))
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise ModelError(f"{name}: the base model cannot be loaded ({first_line(error)})") from None
    difference = read_identity(folder / TRAINED / BASE_FILE).difference(base_identity(base, name))
    if difference is not None:
        raise ModelError(f"{name}: this is not the base that was trained on ({difference})")
    return base


def _read_batches(file: Path) -> dict[str, list[Batch]]:
    if not file.is_file():
        raise ModelError(f"{file}: missing; the training did not reach its end")
    found: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, tensor in load_file(file).items():
        split, number, key = name.split(".", 2)
        found.setdefault(split, {}).setdefault(int(number), {})[key] = tensor
    return {split: [batches[number] for number in sorted(batches)] for split, batches in found.items()}
