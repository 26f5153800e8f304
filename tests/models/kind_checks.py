"""Checks of every kind of adapter. Each one returns a figure, and raises AssertionError if it fails."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rightrank import inspect, resize
from rightrank.models.adapter_reader import open_adapter
from rightrank.schema.errors import InterruptedRun
from rightrank.schema.events import Listener, StepDone
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.train.loop import run_trial
from rightrank.train.optimizer import make_schedule
from rightrank.train.pace import find_multi_lora_obstacle
from rightrank.train.runtime import Runtime
from rightrank.train.targets import suppress_peft_warnings
from rightrank.train.trial import TrialFolders
from tests.helpers import attach_fresh_adapter, list_trainable_parameters
from tests.models.kind_cases import ARM, RANK, STEPS, Trained, build_settings, make_runtime
from tests.watch import Watch

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

    def equals_peft(self) -> str:
        """Compare the loss of every step with a plain loop over PEFT's model."""
        plain = train_plain_loop(self.runtime, ARM)
        largest = max(
            abs(loss / plain_loss - 1) for loss, plain_loss in zip(self.outcome.train_losses, plain, strict=True)
        )
        assert largest <= TOLERANCE, largest
        return f"{largest:.0e}"

    def is_loaded(self) -> str:
        """Check that PEFT loads the adapter on the saved base model and gives the losses that the run reported."""
        model = self._loaded(self.trained.adapter)
        losses = compute_example_losses(model, self.runtime)
        largest = float(np.max(np.abs(np.array(losses) / np.array(self.outcome.example_losses) - 1)))
        assert largest <= TOLERANCE, largest
        return f"{largest:.0e}"

    def is_counted(self) -> str:
        """Check that the file holds the trained parameters, and that reading it counts them."""
        adapter = open_adapter(self.trained.adapter)
        stored = sum(value.numel() for value in load_file(adapter.weights_file).values())
        assert stored == self.outcome.trainable_parameters == adapter.trainable_parameters
        return str(stored)

    def is_planned(self) -> str:
        """Check that the plan has the parameters and bytes of the adapter, and traces a step."""
        # `test_conformance` marks this check with `plug_in("plan")`, so that it is skipped without the plug-in.
        from rightrank.plugins.plan.estimate import Estimator
        from rightrank.plugins.plan.planner import build_step_settings, plan_selection

        config = self.runtime.model.config
        settings, longest = build_settings(self.case), self.runtime.data.max_sequence_length
        assert plan_selection(config, settings, longest, "cpu").peak_bytes[RANK] > 0
        inventory = Estimator(config, build_step_settings(config, settings, longest, "cpu", None)).get_inventory(RANK)
        assert inventory.trainable_parameters == self.outcome.trainable_parameters
        if "embed_tokens" not in self.case.settings.get(
            "target_modules", ()
        ):  # PEFT's own default also saves embeddings
            assert inventory.adapter_bytes == (self.trained.adapter / "adapter_model.safetensors").stat().st_size
        return "traced"

    def is_inspected(self) -> str:
        """Compare the singular values with those of PEFT's own ΔW."""
        updates = compute_peft_updates(self._loaded(self.trained.adapter))
        inspection = inspect(self.trained.adapter)
        assert len(inspection.modules) == len(updates)
        largest = 0.0
        for module in inspection.modules:
            exact = torch.linalg.svdvals(updates[module.name])[: module.rank].numpy()
            largest = max(largest, float(np.max(np.abs(exact - module.singular_values))) / float(exact[0] or 1.0))
        assert largest < 1e-5, largest
        return f"{largest:.0e}"

    def is_truncated(self) -> str:
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
        return f"{resized.relative_delta_error:.3f}"

    def is_truncated_in_a_run(self) -> str:
        """Check that an arm that truncates the trained one starts where `resize` ends, or that the run gives a reason."""
        if not self.case.is_truncated:
            reason = self.runtime.targets.untruncatable_reason
            assert reason is not None
            return "no: " + reason
        arm = ARM.model_copy(update={"rank": RANK // 2, "steps": 0, "truncate_from": "whole"})
        folders = TrialFolders(
            self.folder / "cut.ckpt", self.folder / "cut", None, self.trained.adapter, self.folder / "moments"
        )
        outcome = run_trial(self.runtime, Trial(trial_id="cut", arm=arm), None, folders, Listener())
        assert isinstance(outcome, TrialFinished)
        losses = compute_example_losses(self._loaded(self.folder / "cut"), self.runtime)
        assert np.allclose(losses, outcome.example_losses, rtol=TOLERANCE)
        return f"{outcome.truncation}"

    def is_resumed(self) -> str:
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
        return "same"

    def shares_a_pass(self) -> str:
        """Check that two adapters run in one pass if the kind allows it, or that there is a reason."""
        obstacle = find_multi_lora_obstacle(self.runtime, [ARM, ARM.model_copy(update={"seed": 1})])
        assert (obstacle is None) == self.case.shares_a_pass, obstacle
        return "yes" if obstacle is None else "no: " + obstacle.rpartition("(")[2].rstrip(")")

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


CHECKS: dict[str, Callable[[Suite], str]] = {
    "equal to a PEFT loop": Suite.equals_peft,
    "loaded by PEFT": Suite.is_loaded,
    "parameters": Suite.is_counted,
    "planned": Suite.is_planned,
    "inspected": Suite.is_inspected,
    "resized": Suite.is_truncated,
    "truncated in a run": Suite.is_truncated_in_a_run,
    "resumed": Suite.is_resumed,
    "shares a pass": Suite.shares_a_pass,
}


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


def train_plain_loop(runtime: Runtime, arm: Arm) -> list[float]:
    """Train with a plain loop: PEFT's model and forward pass, the model's own loss, torch's AdamW. Return the losses."""
    settings = runtime.settings
    with suppress_peft_warnings():
        peft_model: Any = get_peft_model(copy.deepcopy(runtime.model), runtime.make_config(arm)).eval()
    named = copy_initial_values(runtime, arm, peft_model)
    optimizer = torch.optim.AdamW(named.values(), lr=arm.learning_rate, weight_decay=0.0)
    first = [group["lr"] for group in optimizer.param_groups]
    factor = make_schedule(settings, arm.steps)
    losses: list[float] = []
    for step, indices in enumerate(runtime.plan_batches(arm.seed)):
        batch = runtime.make_batch("train", indices)
        for group, rate in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = rate * factor(step)
        loss = peft_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def compute_example_losses(model: Any, runtime: Runtime) -> list[float]:
    """Compute the summed label losses of each validation example, one at a time, by transformers' own loss."""
    losses = []
    for index in range(len(runtime.data.splits["validation"])):
        batch = runtime.make_batch("validation", [index])
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        losses.append(float(loss.detach()) * int((batch.labels[:, 1:] != -100).sum()))
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
