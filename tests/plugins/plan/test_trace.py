"""The trace: two ranks stand for the ranks between, and nothing of it is approximate."""

from __future__ import annotations

from typing import Any

import pytest

from rightrank.plugins.plan.estimate import Estimator
from rightrank.schema.plan_settings import PlanSettings, make_plan_settings
from tests.plugins.plan import CONFIGS

pytestmark = pytest.mark.trains


def settings_of(**values: Any) -> PlanSettings:
    return make_plan_settings({"ranks": (4, 12), "batch_size": 2, "seq_len": 32} | values)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "bert"])
def test_two_ranks_give_the_ranks_between(name: str) -> None:
    """Rank 8 from traces of 4 and 12 is rank 8 traced."""
    settings = settings_of(exclude_modules=["shared_expert_gate"] if name == "moe" else [])
    between = Estimator(CONFIGS[name](), settings).estimate(8)
    direct = Estimator(CONFIGS[name](), settings.model_copy(update={"ranks": (8,)})).estimate(8)
    assert between.training == direct.training
    assert between.inventory.stored == direct.inventory.stored
    assert between.flops == direct.flops
    assert between.source == direct.source == "traced"


def test_components_add_up_to_the_peak() -> None:
    highest = Estimator(CONFIGS["llama"](), settings_of(loss="chunked")).estimate(12).training
    assert sum(highest.components.values()) == highest.peak_bytes
    assert min(highest.components.values()) >= 0
    assert highest.reserved_bytes >= highest.peak_bytes


def test_a_step_that_cannot_be_traced_is_planned_by_formula_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    from rightrank.plugins.plan.planner import plan_config

    settings = settings_of(memory_bytes=2**40)
    traced = plan_config(CONFIGS["llama"](), "llama", settings)

    def fail(*_: Any) -> None:
        raise NotImplementedError("aten::nonzero: attempted to run this operator with Meta tensors")

    monkeypatch.setattr(Estimator, "_trace", fail)
    plan = plan_config(CONFIGS["llama"](), "llama", settings)
    assert plan.source == "formula"
    assert any("cannot be traced" in note for note in plan.notes)
    assert plan.ranks[0].trainable_parameters == traced.ranks[0].trainable_parameters
    share = plan.error_share
    assert share > traced.error_share
    assert abs(plan.ranks[0].peak_bytes / traced.ranks[0].peak_bytes - 1) < share


def test_arms_add_evenly() -> None:
    """The second, third and fourth arm of a pass add the same bytes, so two traces predict any number of arms."""
    passes = {
        arms: Estimator(CONFIGS["llama"](), settings_of(loss="chunked", adapters_per_pass=arms, device="cpu")).estimate(
            4
        )
        for arms in (2, 3, 4)
    }
    peaks = {arms: estimate.training.peak_bytes for arms, estimate in passes.items()}
    assert peaks[4] - peaks[3] == pytest.approx(peaks[3] - peaks[2], rel=0.001)
    assert all(estimate.source == "traced" for estimate in passes.values())


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_classifications_are_traced(name: str) -> None:
    settings = settings_of(num_labels=3, padding=True, packed=True)
    estimate = Estimator(CONFIGS[name](), settings).estimate(8)
    assert estimate.source == "traced"
    assert "classifier" in str(estimate.inventory.saved) or "score" in str(estimate.inventory.saved)
