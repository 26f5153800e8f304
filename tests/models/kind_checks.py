"""What holds for every kind of adapter. Each check returns its figure, and raises AssertionError where it does not hold."""

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
from tests.helpers import fresh_adapter, trainable_parameters
from tests.models.kind_cases import ARM, RANK, STEPS, Trained, make_runtime, settings_of
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
        """Losses of every step are those of a plain loop over PEFT's model."""
        plain = plain_losses(self.runtime, ARM)
        largest = max(abs(one / other - 1) for one, other in zip(self.outcome.train_losses, plain, strict=True))
        assert largest <= TOLERANCE, largest
        return f"{largest:.0e}"

    def is_loaded(self) -> str:
        """PEFT loads the adapter on the saved base, and gives the losses that the run reported."""
        model = self._loaded(self.trained.adapter)
        found = example_losses(model, self.runtime)
        largest = float(np.max(np.abs(np.array(found) / np.array(self.outcome.example_losses) - 1)))
        assert largest <= TOLERANCE, largest
        return f"{largest:.0e}"

    def is_counted(self) -> str:
        """The file holds the parameters that were trained, and its reading counts them."""
        adapter = open_adapter(self.trained.adapter)
        stored = sum(value.numel() for value in load_file(adapter.weights).values())
        assert stored == self.outcome.trainable_parameters == adapter.trained
        return str(stored)

    def is_planned(self) -> str:
        """The plan has the parameters and the bytes of the adapter, and traces its step."""
        from rightrank.plugins.plan.estimate import Estimator
        from rightrank.plugins.plan.planner import build_step_settings, plan_selection

        config = self.runtime.model.config
        settings, longest = settings_of(self.case), self.runtime.data.longest
        assert plan_selection(config, settings, longest, "cpu").peak_bytes[RANK] > 0
        parts = Estimator(config, build_step_settings(config, settings, longest, "cpu", None)).inventory(RANK)
        assert parts.trainable_parameters == self.outcome.trainable_parameters
        if "embed_tokens" not in self.case.settings.get(
            "target_modules", ()
        ):  # PEFT's own default also saves embeddings
            assert parts.adapter_bytes == (self.trained.adapter / "adapter_model.safetensors").stat().st_size
        return "traced"

    def is_inspected(self) -> str:
        """Singular values are those of PEFT's own ΔW."""
        updates = peft_updates(self._loaded(self.trained.adapter))
        found = inspect(self.trained.adapter)
        assert len(found.modules) == len(updates)
        largest = 0.0
        for module in found.modules:
            exact = torch.linalg.svdvals(updates[module.name])[: module.rank].numpy()
            largest = max(largest, float(np.max(np.abs(exact - module.singular_values))) / float(exact[0] or 1.0))
        assert largest < 1e-5, largest
        return f"{largest:.0e}"

    def is_truncated(self) -> str:
        """A lower rank loads in PEFT, and the reported error is that of PEFT's own ΔW; or a reason says why not."""
        out = self.folder / "small"
        resized = resize(self.trained.adapter, out, rank=1)
        before, after = (peft_updates(self._loaded(folder)) for folder in (self.trained.adapter, out))
        error = sum(float((after[name] - before[name]).square().sum()) for name in before) ** 0.5
        whole = sum(float(update.square().sum()) for update in before.values()) ** 0.5
        assert abs(error / whole - resized.relative_delta_error) < 1e-5
        return f"{resized.relative_delta_error:.3f}"

    def is_truncated_in_a_run(self) -> str:
        """An arm that truncates the trained one starts where `resize` ends; or the run says why it can't."""
        if not self.case.is_truncated:
            reason = self.runtime.targets.why_not_truncated
            assert reason is not None
            return "no: " + reason
        arm = ARM.model_copy(update={"rank": RANK // 2, "steps": 0, "truncate_from": "whole"})
        folders = TrialFolders(
            self.folder / "cut.ckpt", self.folder / "cut", None, self.trained.adapter, self.folder / "moments"
        )
        outcome = run_trial(self.runtime, Trial(trial_id="cut", arm=arm), None, folders, Listener())
        assert isinstance(outcome, TrialFinished)
        found = example_losses(self._loaded(self.folder / "cut"), self.runtime)
        assert np.allclose(found, outcome.example_losses, rtol=TOLERANCE)
        return f"{outcome.truncation}"

    def is_resumed(self) -> str:
        """Interrupted after a step and resumed, the training ends with the same losses, to the bit."""
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
        """Two adapters in one pass, where the kind allows it; or a reason says why not."""
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


def with_first_values(runtime: Runtime, arm: Arm, peft_model: Any) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters of another PEFT model by name, set to the values that a training of `arm` starts from."""
    with fresh_adapter(runtime, arm) as ours:
        initial = {name: value.detach().clone() for name, value in trainable_parameters(ours).items()}
    named = {name: value for name, value in peft_model.named_parameters() if value.requires_grad}
    assert named.keys() == initial.keys()
    with torch.no_grad():
        for name, value in named.items():
            value.copy_(initial[name])
    return named


def plain_losses(runtime: Runtime, arm: Arm) -> list[float]:
    """The loop anyone would write: PEFT's model and forward pass, the model's own loss, torch's AdamW."""
    settings = runtime.settings
    with suppress_peft_warnings():
        peft_model: Any = get_peft_model(copy.deepcopy(runtime.model), runtime.config(arm)).eval()
    named = with_first_values(runtime, arm, peft_model)
    optimizer = torch.optim.AdamW(named.values(), lr=arm.learning_rate, weight_decay=0.0)
    first = [group["lr"] for group in optimizer.param_groups]
    factor = make_schedule(settings, arm.steps)
    losses: list[float] = []
    for step, indices in enumerate(runtime.batch_plan(arm.seed)):
        batch = runtime.batch("train", indices)
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
def example_losses(model: Any, runtime: Runtime) -> list[float]:
    """The summed label losses of each validation example, one at a time, by transformers' own loss."""
    found = []
    for index in range(len(runtime.data.splits["selection"])):
        batch = runtime.batch("selection", [index])
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        found.append(float(loss.detach()) * int((batch.labels[:, 1:] != -100).sum()))
    return found


@torch.no_grad()
def peft_updates(model: Any) -> dict[str, torch.Tensor]:
    """PEFT's own ΔW of every matrix [out, in] in float64, by the names that `inspect` gives them."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.base_model.model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        delta = module.get_delta_weight("default").double()
        name = path.replace(".base_layer", "")
        if type(module).__name__ == "ParamWrapper":
            stored = delta if module._did_swap_in_out_features else delta.transpose(1, 2)
            found |= {f"{name}.{module.parameter_name}.{expert}": one for expert, one in enumerate(stored)}
        elif type(module).__name__ == "Embedding" or getattr(module, "fan_in_fan_out", False):
            found[name] = delta.T
        else:
            found[name] = delta.reshape(delta.shape[0], -1)
    return found
