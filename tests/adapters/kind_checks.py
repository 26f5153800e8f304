"""Small random models for each kind of adapter, the checks that every kind passes, and plain PEFT loops."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, get_scheduler

from rightrank import inspect, resize
from rightrank.adapters.adapter_files import open_adapter
from rightrank.bases.base_models import prepare_model
from rightrank.data.splits import load_data
from rightrank.evaluation.peft_models import suppress_peft_warnings
from rightrank.evaluation.tokens import encode_splits
from rightrank.schema.errors import InterruptedRun
from rightrank.schema.events import Listener, StepDone
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.training.loop import TrialFolders
from rightrank.training.pace import find_multi_lora_obstacle
from rightrank.training.runtime import Runtime, build_runtime
from tests.helpers import attach_fresh_adapter, list_trainable_parameters, run_trial
from tests.tiny import GPT2_SIZES, SIZES, build_small_settings, make_tokenizer, write_completions
from tests.watch import Watch

STEPS, RANK = 3, 4
ARM = Arm(rank=RANK, learning_rate=1e-2, lora_alpha=32.0, seed=0, steps=STEPS)

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SIZES | {"head_dim": 8, "tie_word_embeddings": False}),
    "gpt2": ("GPT2LMHeadModel", GPT2_SIZES),
    "mixtral": ("MixtralForCausalLM", SIZES | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
FUSED = {
    "target_modules": ("q_proj", "v_proj"),
    "target_parameters": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of adapter on a model."""

    name: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    shares_a_pass: bool = False
    is_truncated: bool = True


CASES = {
    case.name: case
    for case in (
        Case("embedding", "llama", {"target_modules": ("q_proj", "embed_tokens")}),
        Case("DoRA", "llama", {"use_dora": True}),
        Case("experts (Mixtral)", "mixtral", FUSED),
        Case("unknown (lora_bias)", "gpt2", {"peft_options": {"lora_bias": True}}, is_truncated=False),
    )
}


def make_model(name: str, vocabulary: int) -> Any:
    """Create a random model, the same on every call."""
    architecture, sizes = MODELS[name]
    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    return kind(kind.config_class(vocab_size=vocabulary, **sizes)).eval()


def build_settings(case: Case) -> SelectSettings:
    return build_small_settings(max_steps=STEPS, num_evaluations=1, ranks=(2, RANK), dtype="float32", **case.settings)


def make_runtime(case: Case, folder: Path) -> Runtime:
    """Save the base model in `folder/base`, and build the runtime that trains on it."""
    tokenizer, settings = make_tokenizer(), build_settings(case)
    model = make_model(case.model, len(tokenizer))
    model.save_pretrained(folder / "base")
    loaded = prepare_model(model, tokenizer, str(folder / "base"), torch.device("cpu"))
    data = write_completions(folder / "data.jsonl", 120)
    return build_runtime(
        loaded, encode_splits(load_data(data, settings), loaded, settings), settings, STEPS, folder / "cache"
    )


@dataclass(slots=True)
class Trained:
    """A case after its training."""

    case: Case
    runtime: Runtime
    folder: Path

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def base(self) -> Path:
        return self.folder / "base"


TOLERANCE = 2e-5  # relative, of losses


class Suite:
    """One case, trained once, and the checks on it."""

    def __init__(self, trained: Trained) -> None:
        self.case, self.runtime, self.folder = trained.case, trained.runtime, trained.folder
        self.trained = trained
        self.outcome = self._train("whole", ARM, trained.adapter)

    @classmethod
    def of(cls, case: Any, folder: Path) -> Suite:
        return cls(Trained(case, make_runtime(case, folder), folder))

    def equals_peft(self) -> None:
        """Compare the loss of every step with a plain loop over PEFT's model."""
        plain = train_plain_loop(self.runtime, ARM)
        largest = max(
            abs(loss / plain_loss - 1) for loss, plain_loss in zip(self.outcome.train_losses, plain, strict=True)
        )
        assert largest <= TOLERANCE, largest

    def is_loaded(self) -> None:
        """Check that PEFT loads the adapter on the saved base model and gives the losses that the run reported."""
        model = self._loaded(self.trained.adapter)
        losses = compute_example_losses(model, self.runtime)
        largest = float(np.max(np.abs(np.array(losses) / np.array(self.outcome.example_losses) - 1)))
        assert largest <= TOLERANCE, largest

    def is_counted(self) -> None:
        """Check that the file holds the trained parameters, and that reading it counts them."""
        adapter = open_adapter(self.trained.adapter)
        stored = sum(value.numel() for value in load_file(adapter.weights_file).values())
        assert stored == self.outcome.trainable_parameters == adapter.trainable_parameters

    def is_planned(self) -> None:
        """Check that the plan has the parameters and bytes of the adapter, and traces a step."""
        from rightrank.planning.estimate import Estimator
        from rightrank.planning.planner import build_step_settings, plan_selection

        config = self.runtime.model.config
        settings, longest = build_settings(self.case), self.runtime.data.max_sequence_length
        assert plan_selection(config, settings, longest, "cpu").peak_bytes[RANK] > 0
        inventory = Estimator(config, build_step_settings(config, settings, longest, "cpu", None)).get_inventory(RANK)
        assert inventory.trainable_parameters == self.outcome.trainable_parameters
        if "embed_tokens" not in self.case.settings.get(
            "target_modules", ()
        ):  # PEFT's own default also saves embeddings
            assert inventory.adapter_bytes == (self.trained.adapter / "adapter_model.safetensors").stat().st_size

    def is_inspected(self) -> None:
        """Compare the singular values with those of PEFT's own ΔW."""
        updates = compute_peft_updates(self._loaded(self.trained.adapter))
        inspection = inspect(self.trained.adapter)
        assert len(inspection.modules) == len(updates)
        largest = 0.0
        for module in inspection.modules:
            exact = torch.linalg.svdvals(updates[module.name])[: module.rank].numpy()
            largest = max(largest, float(np.max(np.abs(exact - module.singular_values))) / float(exact[0] or 1.0))
        assert largest < 1e-5, largest

    def is_truncated(self) -> None:
        """Check that a lower rank loads in PEFT, and that the reported error is that of PEFT's own ΔW."""
        out = self.folder / "small"
        resized = resize(self.trained.adapter, out, rank=1)
        full_updates, truncated_updates = (
            compute_peft_updates(self._loaded(folder)) for folder in (self.trained.adapter, out)
        )
        error = (
            sum(float((truncated_updates[name] - full_updates[name]).square().sum()) for name in full_updates) ** 0.5
        )
        norm = sum(float(update.square().sum()) for update in full_updates.values()) ** 0.5
        assert abs(error / norm - resized.relative_delta_error) < 1e-5

    def is_truncated_in_a_run(self) -> None:
        """Check that an arm that truncates the trained one starts where `resize` ends, or that the run gives a reason."""
        if not self.case.is_truncated:
            reason = self.runtime.targets.untruncatable_reason
            assert reason is not None
            return
        arm = ARM.model_copy(update={"rank": RANK // 2, "steps": 0, "truncate_from": "whole"})
        folders = TrialFolders(
            self.folder / "cut.ckpt", self.folder / "cut", None, self.trained.adapter, self.folder / "moments"
        )
        outcome = run_trial(self.runtime, Trial(trial_id="cut", arm=arm), None, folders, Listener())
        assert isinstance(outcome, TrialFinished)
        losses = compute_example_losses(self._loaded(self.folder / "cut"), self.runtime)
        assert np.allclose(losses, outcome.example_losses, rtol=TOLERANCE)

    def is_resumed(self) -> None:
        """Check that an interrupted and resumed training ends with exactly the same losses."""
        steps = []

        def note(event: Any) -> None:
            steps.extend([event.step] if isinstance(event, StepDone) else [])

        folders = TrialFolders(self.folder / "again.ckpt", self.folder / "again")
        trial = Trial(trial_id="again", arm=ARM)
        observer = Watch(on_event=note, should_stop=lambda: len(steps) == 1)
        with contextlib.suppress(InterruptedRun):
            run_trial(self.runtime, trial, None, folders, observer)
        assert steps == [1]
        outcome = run_trial(self.runtime, trial, None, folders, Watch(on_event=note))
        assert steps == list(range(1, STEPS + 1))
        assert isinstance(outcome, TrialFinished)
        assert outcome.example_losses == self.outcome.example_losses

    def shares_a_pass(self) -> None:
        """Check that two adapters run in one pass if the kind allows it, or that there is a reason."""
        obstacle = find_multi_lora_obstacle(self.runtime, [ARM, ARM.model_copy(update={"seed": 1})])
        assert (obstacle is None) == self.case.shares_a_pass, obstacle

    def _train(self, name: str, arm: Arm, adapter: Path) -> TrialFinished:
        folders = TrialFolders(self.folder / f"{name}.ckpt", adapter)
        outcome = run_trial(self.runtime, Trial(trial_id=name, arm=arm), None, folders, Listener())
        assert isinstance(outcome, TrialFinished)
        return outcome

    def _loaded(self, adapter: Path) -> Any:
        base = AutoModelForCausalLM.from_pretrained(self.trained.base, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            # PEFT applies patterns to parameters, and warns that they match no module.
            warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
            warnings.filterwarnings("ignore", message="The following alpha_pattern keys did not match")
            loaded: Any = PeftModel.from_pretrained(base, str(adapter))
        return loaded.eval()


CHECKS = [
    "equals_peft", "is_loaded", "is_counted", "is_planned", "is_inspected", "is_truncated", "is_truncated_in_a_run", "is_resumed", "shares_a_pass",
]  # fmt: skip


def copy_initial_values(runtime: Runtime, arm: Arm, peft_model: Any) -> dict[str, torch.nn.Parameter]:
    """Set the trainable parameters of another PEFT model to the initial values of a training of `arm`, and return them by name."""
    with attach_fresh_adapter(runtime, arm) as ours:
        initial = {name: value.detach().clone() for name, value in list_trainable_parameters(ours).items()}
    named = {name: value for name, value in peft_model.named_parameters() if value.requires_grad}
    assert named.keys() == initial.keys()
    with torch.no_grad():
        for name, value in named.items():
            value.copy_(initial[name])
    return named


def train_plain_loop(
    runtime: Runtime,
    arm: Arm,
    peft_model: Any = None,
    compute_loss: Callable[[Any, Any], torch.Tensor] | None = None,
) -> list[float]:
    """Train with a plain loop: PEFT's model, the model's own loss, transformers' schedule, torch's AdamW. Return the losses.

    By default the model is a copy of the base with an adapter that has the initial values of a training of `arm`.
    """
    settings = runtime.settings
    if peft_model is None:
        with suppress_peft_warnings():
            peft_model = get_peft_model(copy.deepcopy(runtime.model), runtime.make_config(arm)).eval()
        copy_initial_values(runtime, arm, peft_model)
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arm.learning_rate, weight_decay=0.0)
    warmup_steps = math.ceil(settings.warmup_ratio * arm.steps)
    schedule = get_scheduler(settings.lr_scheduler_type, optimizer, warmup_steps, arm.steps)
    losses: list[float] = []
    for indices in runtime.plan_batches(arm.seed):
        batch = runtime.evaluator.make_batch("train", indices)
        if compute_loss is not None:
            loss = compute_loss(peft_model, batch)
        else:
            loss = peft_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def compute_example_losses(model: Any, runtime: Runtime) -> list[float]:
    """Compute the summed label losses of each validation example, one at a time, by transformers' own loss."""
    losses = []
    for index in range(len(runtime.data.splits["validation"])):
        batch = runtime.evaluator.make_batch("validation", [index])
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        labels = 1 if runtime.data.is_classification else int((batch.labels[:, 1:] != -100).sum())
        losses.append(float(loss.detach()) * labels)
    return losses


@torch.no_grad()
def compute_peft_updates(model: Any) -> dict[str, torch.Tensor]:
    """Return PEFT's own ΔW of every matrix [out, in] in float64, by the names that `inspect` uses."""
    updates: dict[str, torch.Tensor] = {}
    for path, module in model.base_model.model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        delta = module.get_delta_weight("default").double()
        name = path.replace(".base_layer", "")
        if type(module).__name__ == "ParamWrapper":
            stored = delta if module._did_swap_in_out_features else delta.transpose(1, 2)
            updates |= {f"{name}.{module.parameter_name}.{expert}": update for expert, update in enumerate(stored)}
        elif type(module).__name__ == "Embedding" or getattr(module, "fan_in_fan_out", False):
            updates[name] = delta.T
        else:
            updates[name] = delta.reshape(delta.shape[0], -1)
    return updates
