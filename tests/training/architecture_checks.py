"""One configuration through `select`'s own preparation and engine, and against a plain loop over PEFT that knows nothing of either.

The plain loop reads the adapter's `adapter_config.json`, as anyone would who repeats a training, pads its batches itself and takes the
model's own loss. Only the order of examples and the first values are ours.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rightrank import resize
from rightrank.runs.prepare import LoadedSelection, prepare_selection
from rightrank.runs.selection import SelectionRequest
from rightrank.schema.errors import RightrankError
from rightrank.schema.settings import PlanSettings
from rightrank.schema.trials import Arm
from rightrank.training.pace import find_multi_lora_obstacle
from rightrank.training.runtime import Runtime
from tests.adapters.kind_checks import compute_example_losses, copy_initial_values, train_plain_loop
from tests.tiny import build_small_settings, generate_sentences, make_tokenizer, write_completions, write_jsonl
from tests.training.architecture_cases import Case, make_case, make_model
from tests.training.architectures import run

STEPS, RATE, CLASSES = 2, 1e-2, ("far", "near", "sea")
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS, "num_evaluations": 1, "max_eval_examples": 6, "batch_size": 3, "device": "cpu", "warmup_ratio": 0.0,
    "lr_scheduler_type": "linear",
}  # fmt: skip
SEES_LABELS = "it sees the tokens that follow"
LEFT_OUT = {  # of PEFT's all-linear, which refuses them
    "mamba": ["out_proj"],
    "mamba2": ["out_proj"],
    "falcon_mamba": ["out_proj"],
    "distilbert": ["pre_classifier"],
}
CRASHES = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    OSError,
    ImportError,
)  # into the table
TOLERANCE = 2e-5  # relative, of losses


@dataclass(slots=True)
class Row:
    """The results for one configuration; each figure is a relative difference."""

    architecture: str
    seed: int
    traits: tuple[str, ...]
    outcome: str = "equal"  # or `refused`, `unequal`, `crashed`
    reason: str = ""  # of a refusal or a crash, or what is unequal
    seconds: float = 0.0
    parameters: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    rounding: float = 0.0  # how far two plain loops are apart, where that is more than the tolerance
    alone: str = ""  # why no two adapters share a pass
    shortcuts: tuple[str, ...] = ()


def check_configuration(name: str, seed: int, folder: Path) -> Row:
    """Run all checks of one configuration in an empty folder."""
    torch.set_num_threads(1)
    begun = time.perf_counter()
    tokenizer = make_tokenizer()
    case = make_case(name, seed, len(tokenizer))
    row = Row(name, seed, case.traits)
    with warnings.catch_warnings(action="ignore"):
        try:
            _check(case, tokenizer, folder, row)
        except RightrankError as error:
            row.outcome, row.reason = "refused", str(error).replace(str(folder), "…")
            if SEES_LABELS not in row.reason:  # which is measured
                _require_early(case, folder, row)
        except AssertionError as error:
            row.outcome, row.reason = "unequal", str(error)
        except CRASHES as error:
            row.outcome, row.reason = "crashed", f"{type(error).__name__}: {error}".splitlines()[0]
    row.seconds = round(time.perf_counter() - begun, 2)
    return row


def _check(case: Case, tokenizer: Any, folder: Path, row: Row) -> None:
    base, request = _saved(case, tokenizer, folder)
    prepared = prepare_selection(request, folder / "cache")
    runtime = prepared.runtime
    paths = runtime.evaluator.fast_paths
    seconds_by_check = {
        "joined": paths.sequence_packing,
        "label rows": paths.last_block is not None,
        "prefix": paths.prefix is not None,
    }
    row.shortcuts = tuple(name for name, holds in seconds_by_check.items() if holds)
    arms = [
        Arm(rank=rank, learning_rate=RATE, lora_alpha=16.0, seed=number, steps=STEPS)
        for number, rank in enumerate(case.ranks)
    ]
    alone = run(runtime, arms, folder / "alone", 1)
    row.parameters = alone[-1].trainable_parameters
    for number, (trial, arm) in enumerate(zip(alone, arms, strict=True)):
        _require_as_plain(row, trial.train_losses, (runtime, arm, base, folder / "alone" / f"t{number}"))
    row.alone = find_multi_lora_obstacle(runtime, arms) or ""
    if not row.alone:
        shared_trials = run(runtime, arms, folder / "together", 2)
        assert all(trial.adapters_per_pass == 2 for trial in shared_trials)
        row.figures["together"] = max(
            _compute_largest_difference(
                trial.train_losses + trial.example_losses, reference.train_losses + reference.example_losses
            )
            for trial, reference in zip(shared_trials, alone, strict=True)
        )
        _require(row, "together", 1e-4)
    row.figures["loaded"] = max(
        _compute_largest_difference(
            trial.example_losses,
            compute_example_losses(
                PeftModel.from_pretrained(load_base(runtime, base), str(folder / "alone" / f"t{number}")).eval(),
                runtime,
            ),
        )
        for number, trial in enumerate(alone)
    )
    _require(row, "loaded", TOLERANCE)
    _require_counts(case, prepared, base, folder / "alone")
    row.figures["truncated"] = compute_truncation_error(folder / "alone" / "t1", folder / "cut")
    _require(row, "truncated", 1e-5)


def _saved(case: Case, tokenizer: Any, folder: Path) -> tuple[Path, SelectionRequest]:
    if not case.pads:
        tokenizer.pad_token = None
    base = folder / "base"
    model = make_model(case, len(CLASSES))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    data = folder / "data.jsonl"
    if case.task == "classes":
        write_jsonl(
            data,
            [
                {"text": text, "label": CLASSES[number % 3]}
                for number, text in enumerate(generate_sentences(60, seed=2))
            ],
        )
    elif case.task == "text":  # every token is a label; batches of training pad much, batches of evaluation little
        words = " ".join(generate_sentences(200, seed=2)).split()
        texts = [" ".join(words[number : number + (8 if number % 3 else 24)]) for number in range(60)]
        write_jsonl(data, [{"text": text} for text in texts])
    else:
        write_completions(data, 60)
    return base, _request(case, folder)


def _request(case: Case, folder: Path) -> SelectionRequest:
    settings = build_small_settings(ranks=tuple(sorted(case.ranks)), **SETTINGS, **case.settings)
    return SelectionRequest(str(folder / "base"), None, folder / "data.jsonl", settings)


def load_base(runtime: Runtime, base: Path) -> Any:
    """Load the saved model with transformers."""
    if not runtime.data.is_classification:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(CLASSES), dtype=torch.float32
    ).eval()
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = _padding(runtime)
    return model


def _padding(runtime: Runtime) -> int:
    return int(runtime.loaded.tokenizer.pad_token_id)


def collate_plainly(runtime: Runtime, split: Any, indices: list[int], wider: int = 0) -> dict[str, torch.Tensor]:
    """Pad examples on the right, as any collator does; with `wider`, add that many columns of padding."""
    items = [runtime.data.splits[split][index] for index in indices]
    longest = max(len(item.input_ids) for item in items) + wider
    ids = torch.full((len(items), longest), _padding(runtime))
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, item in enumerate(items):
        count = len(item.input_ids)
        ids[row, :count], mask[row, :count] = torch.tensor(list(item.input_ids)), 1
        labels[row, : len(item.labels)] = torch.tensor(list(item.labels))
    classes = runtime.data.is_classification
    return {"input_ids": ids, "attention_mask": mask, "labels": labels[:, 0] if classes else labels}


def _require_as_plain(row: Row, losses: list[float], loop: tuple[Runtime, Arm, Path, Path]) -> None:
    """Check that the losses equal those of a plain loop, or that rounding explains the difference.

    The same plain loop with more padding measures the effect of rounding. The first step of Adam moves a value by its gradient's sign:
    where a gradient is nearly 0, two plain loops whose batches differ in padding alone end differently too.
    """
    plain = train_plainly(*loop)
    difference = _compute_largest_difference(losses, plain)
    if (
        difference > TOLERANCE
        and (padding_difference := _compute_largest_difference(train_plainly(*loop, wider=5), plain)) > TOLERANCE
    ):
        row.rounding, difference = max(row.rounding, padding_difference), max(0.0, difference - padding_difference)
    row.figures["to PEFT"] = max(difference, row.figures.get("to PEFT", 0.0))
    _require(row, "to PEFT", TOLERANCE)


def train_plainly(runtime: Runtime, arm: Arm, base: Path, adapter: Path, wider: int = 0) -> list[float]:
    """Train a plain loop with the adapter's own configuration and return its losses."""
    config = LoraConfig.from_pretrained(str(adapter))
    config.inference_mode = False
    model: Any = get_peft_model(load_base(runtime, base), config).eval()
    copy_initial_values(runtime, arm, model)
    return train_plain_loop(
        runtime, arm, model, lambda model, batch: model(**collate_plainly(runtime, "train", batch.indices, wider)).loss
    )


def _require_counts(case: Case, prepared: LoadedSelection, base: Path, adapters: Path) -> None:
    """Check the numbers of parameters and bytes in the selection's plan, and those of `plan` for PEFT's `all-linear`."""
    from rightrank.planning.estimate import Estimator
    from rightrank.planning.planner import build_step_settings
    from rightrank.planning.trace import read_config

    runtime, full_base = prepared.runtime, load_base(prepared.runtime, base)
    classes, config = len(CLASSES) if runtime.data.is_classification else None, runtime.model.config
    each = 2 if runtime.data.summary.form == "preference" else 1
    step = build_step_settings(config, prepared.settings, runtime.data.max_sequence_length, "cpu", classes, each)
    selection = Estimator(config, step)
    for number, rank in enumerate(case.ranks):
        stored = adapters / f"t{number}" / "adapter_model.safetensors"
        counted = sum(tensor.numel() for tensor in load_file(stored).values()), stored.stat().st_size
        _require_counted("select's plan", selection, rank, counted)
    rank = case.ranks[0]
    settings = PlanSettings(ranks=(rank,), num_labels=classes, dtype="float32")
    estimator = Estimator(read_config(str(base), False, classes is not None), settings)
    parameters = sum(parameter.numel() for parameter in full_base.parameters())
    assert estimator.skeleton.base_parameters == parameters, (
        f"plan: {estimator.skeleton.base_parameters} parameters of the base for {parameters}"
    )
    task = "CAUSAL_LM" if classes is None else "SEQ_CLS"
    lora = LoraConfig(
        r=rank, target_modules="all-linear", task_type=task, exclude_modules=LEFT_OUT.get(full_base.config.model_type)
    )
    model = get_peft_model(full_base, lora)
    model.save_pretrained(adapters / "by PEFT")
    counted = (
        model.get_nb_trainable_parameters()[0],
        (adapters / "by PEFT" / "adapter_model.safetensors").stat().st_size,
    )
    _require_counted("plan", estimator, rank, counted)


def _require_counted(description: str, estimator: Any, rank: int, expected: tuple[int, int]) -> None:
    inventory = estimator.get_inventory(rank)
    counts = inventory.trainable_parameters, inventory.adapter_bytes
    assert counts == expected, f"{description}: parameters and bytes {counts} for {expected}"


def compute_truncation_error(adapter: Path, out: Path) -> float:
    """Return the largest difference of `resize` to rank 1 from the best rank-1 matrix of each update, relative to the update."""
    resize(adapter, out, rank=1)
    original, truncated = (_load_updates(folder) for folder in (adapter, out))
    assert original.keys() == truncated.keys()
    worst = 0.0
    for name, update in original.items():
        u, s, v = torch.linalg.svd(update)
        best = u[:, :1] * s[0] @ v[:1]
        worst = max(worst, float(torch.linalg.norm(truncated[name] - best) / (torch.linalg.norm(update) or 1.0)))
    return worst


def _load_updates(folder: Path) -> dict[str, torch.Tensor]:
    """Compute s·B·A of every module in float64, from the files alone."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    updates = {}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            b, rank = tensors[key.replace("lora_A", "lora_B")], a.shape[0]
            alpha = config["alpha_pattern"].get(
                key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"), config["lora_alpha"]
            )
            scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
            updates[key] = scale * b.double() @ a.double()
    return updates


def _require(row: Row, name: str, limit: float) -> None:
    assert row.figures[name] <= limit, f"{name}: {row.figures[name]:.1e}"


def _compute_largest_difference(values: list[float], references: list[float]) -> float:
    """Return the largest relative difference."""
    return max(abs(value / reference - 1) for value, reference in zip(values, references, strict=True))


def _require_early(case: Case, folder: Path, row: Row) -> None:
    """Check that a refusal is one line, and that it is the same if the weights cannot be read."""
    for file in (folder / "base").glob("*.safetensors"):
        file.write_bytes(b"\xff" * 64)
    try:
        prepare_selection(_request(case, folder), folder / "again")
    except RightrankError as error:
        again = str(error).replace(str(folder), "…")
        if again != row.reason:
            row.outcome, row.reason = "unequal", f"refused after the weights are loaded: {row.reason}"
    if "\n" in row.reason:
        row.outcome = "unequal"
