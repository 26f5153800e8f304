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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rightrank import resize
from rightrank.runs.local import Prepared
from rightrank.runs.prepare import prepare
from rightrank.runs.values import Request
from rightrank.schema.errors import RightrankError
from rightrank.schema.events import Listener
from rightrank.schema.plan_settings import PlanSettings
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.train.loop import train_trials
from rightrank.train.pace import multi_lora_obstacle
from rightrank.train.runtime import Runtime
from rightrank.train.trial import TrialFolders
from tests.helpers import fresh_adapter, trainable_parameters
from tests.tiny import make_tokenizer, sentences, small_settings, write_completions, write_jsonl
from tests.train.architecture_cases import Case, make_case, model_of

STEPS, RATE, CLASSES = 2, 1e-2, ("far", "near", "sea")
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS, "eval_points": 1, "eval_items": 6, "batch_size": 3, "device": "cpu", "warmup_ratio": 0.0,
    "lr_scheduler_type": "linear",
}  # fmt: skip
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
    """What was found for one configuration; a figure is a relative difference."""

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


def check(name: str, seed: int, folder: Path) -> Row:
    """All checks of one configuration, in an empty folder."""
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
            _require_early(case, folder, row)
        except AssertionError as error:
            row.outcome, row.reason = "unequal", str(error)
        except CRASHES as error:
            row.outcome, row.reason = "crashed", f"{type(error).__name__}: {error}".splitlines()[0]
    row.seconds = round(time.perf_counter() - begun, 2)
    return row


def _check(case: Case, tokenizer: Any, folder: Path, row: Row) -> None:
    base, request = _saved(case, tokenizer, folder)
    prepared = prepare(request, folder / "cache")
    runtime = prepared.runtime
    paths = runtime.fast_paths
    taken = {
        "joined": paths.sequence_packing,
        "label rows": paths.last_block is not None,
        "prefix": paths.prefix is not None,
    }
    row.shortcuts = tuple(name for name, holds in taken.items() if holds)
    arms = [
        Arm(rank=rank, learning_rate=RATE, lora_alpha=16.0, seed=number, steps=STEPS)
        for number, rank in enumerate(case.ranks)
    ]
    alone = _trained(runtime, arms, folder / "alone", 1)
    row.parameters = alone[-1].trainable_parameters
    for number, (one, arm) in enumerate(zip(alone, arms, strict=True)):
        _require_as_plain(row, one.train_losses, (runtime, arm, base, folder / "alone" / f"t{number}"))
    row.alone = multi_lora_obstacle(runtime, arms) or ""
    if not row.alone:
        together = _trained(runtime, arms, folder / "together", 2)
        assert all(one.adapters_per_pass == 2 for one in together)
        row.figures["together"] = max(
            _far(one.train_losses + one.item_losses, other.train_losses + other.item_losses)
            for one, other in zip(together, alone, strict=True)
        )
        _require(row, "together", 1e-4)
    row.figures["loaded"] = max(
        _far(one.item_losses, loaded_losses(runtime, base, folder / "alone" / f"t{number}"))
        for number, one in enumerate(alone)
    )
    _require(row, "loaded", TOLERANCE)
    _require_counts(case, prepared, base, folder / "alone")
    row.figures["truncated"] = truncation_error(folder / "alone" / "t1", folder / "cut")
    _require(row, "truncated", 1e-5)


def _saved(case: Case, tokenizer: Any, folder: Path) -> tuple[Path, Request]:
    if not case.pads:
        tokenizer.pad_token = None
    base = folder / "base"
    model = model_of(case, len(CLASSES))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    data = folder / "data.jsonl"
    if case.task == "classes":
        write_jsonl(
            data, [{"text": text, "label": CLASSES[number % 3]} for number, text in enumerate(sentences(60, seed=2))]
        )
    elif case.task == "text":  # every token is a label; batches of training pad much, batches of evaluation little
        words = " ".join(sentences(200, seed=2)).split()
        texts = [" ".join(words[number : number + (8 if number % 3 else 24)]) for number in range(60)]
        write_jsonl(data, [{"text": text} for text in texts])
    else:
        write_completions(data, 60)
    return base, _request(case, folder)


def _request(case: Case, folder: Path) -> Request:
    settings = small_settings(ranks=tuple(sorted(case.ranks)), **SETTINGS, **case.settings)
    return Request(str(folder / "base"), None, folder / "data.jsonl", settings)


def _trained(runtime: Runtime, arms: list[Arm], folder: Path, size: int) -> list[TrialFinished]:
    trials = [Trial(trial_id=f"t{number}", arm=arm) for number, arm in enumerate(arms)]

    def places(trial: Trial) -> TrialFolders:
        return TrialFolders(folder / f"{trial.trial_id}.safetensors", folder / trial.trial_id)

    ended = sorted(train_trials(runtime, trials, None, places, Listener(), size), key=lambda one: one.trial_id)
    for one in ended:
        assert isinstance(one, TrialFinished), one
    return ended  # type: ignore[return-value]  # shown above


def fresh_base(runtime: Runtime, base: Path) -> Any:
    """The saved model as transformers loads it."""
    if not runtime.data.is_classification:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(CLASSES), dtype=torch.float32
    ).eval()
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = _padding(runtime)
    return model


def _padding(runtime: Runtime) -> int:
    return int(runtime.loaded.tokenizer.pad_token_id)


def batch_of(runtime: Runtime, split: Any, indices: list[int], wider: int = 0) -> dict[str, torch.Tensor]:
    """Examples padded on the right, as any collator does; with `wider` further columns of padding."""
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
    """The losses of a plain loop; where rounding decides them, no farther from it than the same loop with more padding is.

    The first step of Adam moves a value by its gradient's sign: where a gradient is nearly 0, two plain loops whose batches differ in
    padding alone end apart too.
    """
    plain = plain_losses(*loop)
    far = _far(losses, plain)
    if far > TOLERANCE and (apart := _far(plain_losses(*loop, wider=5), plain)) > TOLERANCE:
        row.rounding, far = max(row.rounding, apart), max(0.0, far - apart)
    row.figures["to PEFT"] = max(far, row.figures.get("to PEFT", 0.0))
    _require(row, "to PEFT", TOLERANCE)


def plain_losses(runtime: Runtime, arm: Arm, base: Path, adapter: Path, wider: int = 0) -> list[float]:
    """The losses of a plain loop with the adapter's own configuration."""
    config = LoraConfig.from_pretrained(str(adapter))
    config.inference_mode = False
    model: Any = get_peft_model(fresh_base(runtime, base), config).eval()
    with fresh_adapter(runtime, arm) as ours:
        first = {name: value.detach().clone() for name, value in trainable_parameters(ours).items()}
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert named.keys() == first.keys(), sorted(named.keys() ^ first.keys())[:4]
    with torch.no_grad():
        for name, value in named.items():
            value.copy_(first[name])
    optimizer = torch.optim.AdamW(named.values(), lr=arm.learning_rate, weight_decay=0.0)
    losses = []
    for step, indices in enumerate(runtime.batch_plan(arm.seed)):
        for group in optimizer.param_groups:
            group["lr"] = arm.learning_rate * (1 - step / arm.steps)  # linear, without a warm-up
        loss = model(**batch_of(runtime, "train", indices, wider)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def loaded_losses(runtime: Runtime, base: Path, adapter: Path) -> list[float]:
    """The summed losses of each validation example with the saved adapter, one at a time."""
    model = PeftModel.from_pretrained(fresh_base(runtime, base), str(adapter)).eval()
    found = []
    for index in range(len(runtime.data.splits["selection"])):
        batch = batch_of(runtime, "selection", [index])
        labels = 1 if runtime.data.is_classification else int((batch["labels"][:, 1:] != -100).sum())
        found.append(float(model(**batch).loss) * labels)
    return found


def _require_counts(case: Case, prepared: Prepared, base: Path, adapters: Path) -> None:
    """The plan of the selection has the parameters and the bytes of its adapters; `plan` alone those of PEFT's `all-linear`."""
    if find_spec("rightrank.plugins.plan") is None:
        return
    from rightrank.plugins.plan.estimate import Estimator
    from rightrank.plugins.plan.planner import step_settings
    from rightrank.plugins.plan.skeleton import read_config

    runtime, whole = prepared.runtime, fresh_base(prepared.runtime, base)
    classes, config = len(CLASSES) if runtime.data.is_classification else None, runtime.model.config
    each = 2 if runtime.data.summary.form == "preference" else 1
    step = step_settings(config, prepared.settings, runtime.data.longest, "cpu", classes, each)
    selection = Estimator(config, step)
    for number, rank in enumerate(case.ranks):
        stored = adapters / f"t{number}" / "adapter_model.safetensors"
        counted = sum(tensor.numel() for tensor in load_file(stored).values()), stored.stat().st_size
        _require_counted("select's plan", selection, rank, counted)
    rank = case.ranks[0]
    settings = PlanSettings(ranks=(rank,), num_labels=classes, dtype="float32")
    estimator = Estimator(read_config(str(base), False, classes is not None), settings)
    parameters = sum(parameter.numel() for parameter in whole.parameters())
    assert estimator.skeleton.base_parameters == parameters, (
        f"plan: {estimator.skeleton.base_parameters} parameters of the base for {parameters}"
    )
    task = "CAUSAL_LM" if classes is None else "SEQ_CLS"
    lora = LoraConfig(
        r=rank, target_modules="all-linear", task_type=task, exclude_modules=LEFT_OUT.get(whole.config.model_type)
    )
    model = get_peft_model(whole, lora)
    model.save_pretrained(adapters / "by PEFT")
    counted = (
        model.get_nb_trainable_parameters()[0],
        (adapters / "by PEFT" / "adapter_model.safetensors").stat().st_size,
    )
    _require_counted("plan", estimator, rank, counted)


def _require_counted(what: str, estimator: Any, rank: int, wanted: tuple[int, int]) -> None:
    parts = estimator.inventory(rank)
    found = parts.trainable_parameters, parts.adapter_bytes
    assert found == wanted, f"{what}: parameters and bytes {found} for {wanted}"


def truncation_error(adapter: Path, out: Path) -> float:
    """The largest difference of `resize` to rank 1 from the best rank-1 matrix of each update, relative to the update."""
    resize(adapter, out, rank=1)
    before, after = (_updates(folder) for folder in (adapter, out))
    assert before.keys() == after.keys()
    worst = 0.0
    for name, update in before.items():
        u, s, v = torch.linalg.svd(update)
        best = u[:, :1] * s[0] @ v[:1]
        worst = max(worst, float(torch.linalg.norm(after[name] - best) / (torch.linalg.norm(update) or 1.0)))
    return worst


def _updates(folder: Path) -> dict[str, torch.Tensor]:
    """s·B·A of every module, in float64, from the files alone."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            b, rank = tensors[key.replace("lora_A", "lora_B")], a.shape[0]
            alpha = config["alpha_pattern"].get(
                key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"), config["lora_alpha"]
            )
            scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
            found[key] = scale * b.double() @ a.double()
    return found


def _require(row: Row, name: str, limit: float) -> None:
    assert row.figures[name] <= limit, f"{name}: {row.figures[name]:.1e}"


def _far(found: list[float], wanted: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(one / other - 1) for one, other in zip(found, wanted, strict=True))


def _require_early(case: Case, folder: Path, row: Row) -> None:
    """A refusal is one line, and the same where the weights can't be read."""
    for file in (folder / "base").glob("*.safetensors"):
        file.write_bytes(b"\xff" * 64)
    try:
        prepare(_request(case, folder), folder / "again")
    except RightrankError as error:
        again = str(error).replace(str(folder), "…")
        if again != row.reason:
            row.outcome, row.reason = "unequal", f"refused after the weights are loaded: {row.reason}"
    if "\n" in row.reason:
        row.outcome = "unequal"
