"""A training that is cut to a lower rank on its way: equal to a loop by hand, in shared passes, and resumable at any step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.kinds.cases import STEPS, case_named
from benchmarks.kinds.cases import make_runtime as make_case
from benchmarks.kinds.checks import example_losses, with_first_values
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, get_scheduler

from rightrank.models.adapter_files import WEIGHTS_FILE, open_adapter
from rightrank.models.truncation import load_moments, projected_state, truncated_tensors
from rightrank.schema.errors import InterruptedRun, ModelError
from rightrank.schema.events import StepDone
from rightrank.schema.trials import Arm, Cut, Trial, TrialFailed, TrialFinished, TrialOutcome
from rightrank.train.loop import train_trials
from rightrank.train.runtime import Runtime, adapter_attached
from rightrank.train.trial import TrialFolders
from tests.helpers import make_runtime
from tests.tiny import small_settings
from tests.watch import Watch

pytestmark = pytest.mark.trains

TOP = Arm(rank=16, learning_rate=1e-2, lora_alpha=32.0, seed=0, steps=8)
FIRST = TOP.model_copy(update={"stop_at": 4})


def cut_of(parent: str, rank: int, cut: Cut, **changes: Any) -> Arm:
    fields = TOP.model_dump() | {"rank": rank, "continue_from": parent, "cut": cut} | changes
    return Arm(**fields)


def run(
    runtime: Runtime, arms: dict[str, Arm], folder: Path, watch: Watch | None = None, per_pass: int = 1
) -> dict[str, TrialOutcome]:
    """Outcomes by the names of the arms, which are their ids."""

    def folders(trial: Trial) -> TrialFolders:
        parent = trial.arm.continue_from
        return TrialFolders(
            folder / f"{trial.trial_id}.ckpt",
            folder / trial.trial_id,
            None if parent is None else folder / f"{parent}.ckpt",
            moments=folder / f"{parent}.moments",
        )

    trials = [Trial(trial_id=name, arm=arm) for name, arm in arms.items()]
    outcomes = train_trials(runtime, trials, None, folders, watch or Watch(), per_pass)
    return {outcome.trial_id: outcome for outcome in outcomes}


def finished(outcome: TrialOutcome) -> TrialFinished:
    assert isinstance(outcome, TrialFinished)
    return outcome


@pytest.fixture
def runtime(model_folder: Path, completion_file: Path, tmp_path: Path) -> Runtime:
    return make_runtime(model_folder, completion_file, small_settings(eval_points=4), tmp_path / "cache")


class ByHand:
    """The loop that anyone would write over PEFT's model and torch's AdamW."""

    def __init__(self, runtime: Runtime, base: Path, config: LoraConfig) -> None:
        self.runtime = runtime
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.peft_model: Any = get_peft_model(model, config)
        self.peft_model.train()
        self.named = {name: one for name, one in self.peft_model.named_parameters() if one.requires_grad}
        self.optimizer = torch.optim.AdamW(self.named.values(), lr=TOP.learning_rate, weight_decay=0.0)
        probe = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        self.factor = get_scheduler(runtime.settings.lr_scheduler_type, probe, 1, TOP.steps).lr_lambdas[0]

    def train(self, steps: Sequence[int], warm: Sequence[float] = ()) -> list[float]:
        losses: list[float] = []
        for place, step in enumerate(steps):
            batch = self.runtime.batch("train", self.runtime.batch_plan(TOP.seed)[step])
            for group in self.optimizer.param_groups:
                group["lr"] = TOP.learning_rate * self.factor(step) * (warm[place] if place < len(warm) else 1.0)
            given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
            loss = self.peft_model(**given).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.named.values(), self.runtime.settings.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize(
    "cut",
    [
        Cut(step=4, rank=16, by="svd", optimizer="fresh"),
        Cut(step=4, rank=16, by="svd", optimizer="projected", warmup=1),
        Cut(step=4, rank=16),
    ],
    ids=["svd-fresh", "svd-projected-warm", "kfac-projected"],
)
def test_it_is_what_a_loop_by_hand_gives(
    model_folder: Path, completion_file: Path, tmp_path: Path, cut: Cut, scaling: Any
) -> None:
    settings = small_settings(eval_points=4, scaling=scaling)
    runtime = make_runtime(model_folder, completion_file, settings, tmp_path / "cache")
    arms = {"first": FIRST, "cut": cut_of("first", 3, cut)}
    ours = finished(run(runtime, arms, tmp_path)["cut"])

    top = ByHand(runtime, model_folder, runtime.config(TOP))
    with_first_values(runtime, TOP, top.peft_model)
    losses = top.train(range(4))
    top.peft_model.save_pretrained(tmp_path / "top")
    moments = load_moments(tmp_path / "first.moments")
    assert bool(moments) == (cut.by == "kfac")
    config = runtime.config(arms["cut"])
    lower = truncated_tensors(tmp_path / "top", 3, config, moments)
    low = ByHand(runtime, model_folder, config)
    set_peft_model_state_dict(low.peft_model, lower)
    if cut.optimizer == "projected":
        for key, power in {"exp_avg": 1, "exp_avg_sq": 2}.items():
            means = {
                name.replace(".default", ""): top.optimizer.state[parameter][key]
                for name, parameter in top.named.items()
            }
            projected = projected_state(tmp_path / "top", config, lower, means, power)
            for name, parameter in low.named.items():
                state = low.optimizer.state[parameter]
                state["step"], state[key] = torch.tensor(4.0), projected[name.replace(".default", "")]
    losses += low.train(range(4, 8), [0.5] if cut.warmup else ())
    assert ours.train_losses == pytest.approx(losses, rel=1e-5, abs=1e-5)
    assert ours.truncation == cut.by
    saved, by_hand = load_file(tmp_path / "cut" / WEIGHTS_FILE), get_peft_model_state_dict(low.peft_model)
    assert saved.keys() == by_hand.keys()
    assert all(torch.allclose(saved[key], by_hand[key], atol=1e-4) for key in saved)


def test_the_state_is_that_of_gradients_of_the_new_factors(runtime: Runtime, tmp_path: Path) -> None:
    """s'·B'ᵀ·G and s'·G·A'ᵀ of any gradient G of ΔW; squares, where the new directions are some of the old ones."""
    run(runtime, {"top": TOP}, tmp_path)
    config = runtime.config(TOP.model_copy(update={"rank": 3}))
    old, new = load_file(tmp_path / "top" / WEIGHTS_FILE), truncated_tensors(tmp_path / "top", 3, config, {})
    scale, generator = TOP.lora_alpha / 3, torch.Generator().manual_seed(0)
    state, exact = {}, {}
    for module in open_adapter(tmp_path / "top").modules:
        a, b = module.a_key, module.b_key
        gradient = torch.randn(module.rows, module.columns, generator=generator)
        state[a], state[b] = module.scaling * old[b].T @ gradient, module.scaling * gradient @ old[a].T
        exact[a], exact[b] = scale * new[b].T @ gradient, scale * gradient @ new[a].T
    projected = projected_state(tmp_path / "top", config, new, state, 1)
    assert all(torch.allclose(projected[key], exact[key], rtol=1e-3, atol=1e-3) for key in exact)
    squares = projected_state(tmp_path / "top", config, new, {key: one.square() for key, one in state.items()}, 2)
    assert all(bool((squares[key] >= 0).all()) for key in exact)

    first = {key: one[:3] if "lora_A" in key else one[:, :3] for key, one in old.items()}
    squares = projected_state(tmp_path / "top", config, first, {key: one.square() for key, one in state.items()}, 2)
    ratio = (16 / 3) ** 2
    for key, one in state.items():
        kept = one[:3] if "lora_A" in key else one[:, :3]
        assert torch.allclose(squares[key], ratio * kept.square(), rtol=1e-3, atol=1e-4)


def test_branches_and_stages_share_passes_with_their_parent(runtime: Runtime, tmp_path: Path) -> None:
    early, late = Cut(step=2, rank=16), Cut(step=6, rank=16, by="svd")
    arms = {
        "quarter": TOP.model_copy(update={"stop_at": 2}),
        "late": TOP.model_copy(update={"stop_at": 6, "continue_from": "quarter"}),
        "whole": TOP.model_copy(update={"continue_from": "late"}),
        "low": cut_of("quarter", 1, early),
        "middle": cut_of("quarter", 8, early, stop_at=4),
        "staged": cut_of("middle", 2, Cut(step=4, rank=8)),
        "end": cut_of("late", 1, late),
    }
    together = run(runtime, arms, tmp_path / "together", per_pass=4)
    alone = run(runtime, dict(reversed(arms.items())), tmp_path / "alone")
    assert together.keys() == alone.keys() == arms.keys()
    for name in arms:
        left, right = finished(together[name]), finished(alone[name])
        assert left.item_losses == pytest.approx(right.item_losses, rel=1e-4)
        assert [point.step for point in left.points] == [step for step in (2, 4, 6, 8) if step <= left.arm.end]
    assert max(finished(outcome).adapters_per_pass for outcome in together.values()) == 4
    whole = finished(run(runtime, {"plain": TOP}, tmp_path)["plain"])
    assert finished(alone["whole"]).item_losses == pytest.approx(whole.item_losses, rel=1e-6)
    assert together["low"].arm.label() == "r=1 lr=0.01 seed=0 cut from rank 16 at step 2"
    with adapter_attached(runtime, tmp_path / "together" / "staged"):
        assert runtime.evaluate("selection").losses == pytest.approx(finished(together["staged"]).item_losses, rel=1e-4)


@pytest.mark.parametrize("step", [2, 4, 5, 7])
def test_a_run_killed_at_any_step_ends_the_same_to_the_byte(runtime: Runtime, tmp_path: Path, step: int) -> None:
    """Before the cut, at it, and after it."""
    arms = {"first": FIRST, "cut": cut_of("first", 2, Cut(step=4, rank=16))}
    run(runtime, arms, tmp_path / "whole")
    done = [0]
    watch = Watch(
        on_event=lambda event: done.append(event.step) if isinstance(event, StepDone) else None,
        should_stop=lambda: done[-1] == step,
    )
    if step == 4:
        run(runtime, {"first": FIRST}, tmp_path / "killed", watch)
    else:
        with pytest.raises(InterruptedRun):
            run(runtime, arms, tmp_path / "killed", watch)
    run(runtime, arms if step < 4 else {"cut": arms["cut"]}, tmp_path / "killed")
    for name in (WEIGHTS_FILE, "adapter_config.json"):
        assert (tmp_path / "killed" / "cut" / name).read_bytes() == (tmp_path / "whole" / "cut" / name).read_bytes()


@pytest.mark.parametrize("by", ["kfac", "svd"])
@pytest.mark.parametrize("name", ["embedding", "DoRA", "DoRA on an embedding", "experts (Mixtral)"])
def test_every_kind_that_can_be_truncated_is_cut(name: str, by: Any, tmp_path: Path) -> None:
    runtime = make_case(case_named(name), tmp_path)
    top = TOP.model_copy(update={"rank": 4, "steps": STEPS})
    arms = {
        "first": top.model_copy(update={"stop_at": 1}),
        "cut": top.model_copy(update={"rank": 2, "continue_from": "first", "cut": Cut(step=1, rank=4, by=by)}),
    }
    outcome = finished(run(runtime, arms, tmp_path)["cut"])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(tmp_path / "cut")).eval()
    assert example_losses(model, runtime) == pytest.approx(outcome.item_losses, rel=2e-5)
    assert open_adapter(tmp_path / "cut").config["r"] == 2


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
def test_a_kind_that_cannot_be_truncated_is_refused_before_the_first_step(tmp_path: Path) -> None:
    runtime = make_case(case_named("unknown (lora_bias)"), tmp_path)
    arms = {"first": FIRST, "cut": cut_of("first", 2, Cut(step=4, rank=16))}
    watch = Watch(on_event=lambda event: pytest.fail(str(event)))
    with pytest.raises(ModelError, match=r"no adapter can be cut .* train at one rank"):
        run(runtime, arms, tmp_path, watch)


def test_a_parent_that_left_nothing_fails_its_cut_alone(runtime: Runtime, tmp_path: Path) -> None:
    """Without a checkpoint, and with a damaged one."""
    arms = {"cut": cut_of("first", 2, Cut(step=4, rank=16)), "other": TOP.model_copy(update={"rank": 1})}
    outcomes = run(runtime, arms, tmp_path, per_pass=2)
    assert isinstance(outcomes["cut"], TrialFailed)
    assert "train that one again first" in outcomes["cut"].reason
    finished(outcomes["other"])
    save_file({"x": torch.zeros(1)}, tmp_path / "first.ckpt")
    assert isinstance(run(runtime, {"cut": arms["cut"]}, tmp_path)["cut"], TrialFailed)


@pytest.mark.parametrize("changes", [{"rank": 16}, {"continue_from": None}, {"cut": Cut(step=8, rank=16)}])
def test_a_cut_goes_down_inside_a_training(changes: dict[str, Any]) -> None:
    fields = cut_of("first", 2, Cut(step=4, rank=16)).model_dump() | changes
    with pytest.raises(ValidationError, match="give continue_from, a lower rank, and an earlier step"):
        Arm(**fields)


def test_the_best_checkpoint_is_one_after_the_cut(model_folder: Path, completion_file: Path, tmp_path: Path) -> None:
    settings = small_settings(eval_points=4, checkpoint="best")
    runtime = make_runtime(model_folder, completion_file, settings, tmp_path / "cache")
    first = FIRST.model_copy(update={"learning_rate": 0.05})
    arms = {"first": first, "cut": cut_of("first", 1, Cut(step=4, rank=16), learning_rate=2.0)}
    outcome = finished(run(runtime, arms, tmp_path)["cut"])
    assert min(outcome.points, key=lambda point: point.value).step <= 4  # at the higher rank
    assert outcome.kept_step in (None, 6)
    assert {module.rank for module in open_adapter(tmp_path / "cut").modules} != {16}
