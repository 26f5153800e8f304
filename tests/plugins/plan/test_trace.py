"""The trace: a few blocks stand for all, two ranks for the ranks between, and nothing of it is approximate."""

from __future__ import annotations

from typing import Any

import pytest

from rightrank.plugins.plan.estimate import Estimator
from rightrank.plugins.plan.skeleton import adapt, build_base
from rightrank.plugins.plan.stack import TRACED_GROUPS, deepen, find_reduction, reduced_config
from rightrank.plugins.plan.step import Groups, blocks_of, trace_step
from rightrank.schema.plan_settings import PlanSettings, make_plan_settings
from tests.plugins.plan import CONFIGS

pytestmark = pytest.mark.trains

SETTINGS: list[dict[str, Any]] = [
    {},
    {"padding": True},
    {"loss": "chunked"},
    {"gradient_checkpointing": True},
    {"device": "cpu", "dtype": "float32"},
    {"load_in_4bit": True},
    {"attn_implementation": "eager"},
    {"dtype": "float32", "autocast": "bfloat16"},
    {"loss": "chunked", "adapters_per_pass": 2},
]


def settings_of(**values: Any) -> PlanSettings:
    return make_plan_settings({"ranks": (4, 12), "batch_size": 2, "seq_len": 32} | values)


@pytest.mark.parametrize("values", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_few_blocks_give_the_whole_depth(name: str, values: dict[str, Any]) -> None:
    """The trace written out from four blocks is the trace of all six, event for event."""
    settings = settings_of(**values)
    estimator = Estimator(CONFIGS[name](), settings)
    whole = adapt(build_base(CONFIGS[name](), settings), settings, 4, settings.adapters_per_pass)
    full = trace_step(whole, settings, None)
    blocks = blocks_of(estimator.skeleton.base)
    assert blocks is not None
    reduction = find_reduction(blocks)
    assert reduction is not None
    small = adapt(
        build_base(reduced_config(CONFIGS[name](), TRACED_GROUPS), settings), settings, 4, settings.adapters_per_pass
    )
    few = blocks_of(small.base)
    assert few is not None
    deep = deepen(trace_step(small, settings, Groups(few, 1)), reduction.groups)
    assert deep is not None
    assert deep.events == full.events
    assert deep.sizes == full.sizes
    assert deep.gradients == full.gradients
    assert sum(deep.flops.values()) == sum(full.flops.values())


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


@pytest.mark.parametrize("ranks", [(4, 12), (12,)])
def test_two_ranks_give_the_rank_above(ranks: tuple[int, ...]) -> None:
    """Rank 24, the next doubling in a plan, from traces of 4 and 12 is rank 24 traced; one rank alone gives no line."""
    settings = settings_of(ranks=ranks)
    above = Estimator(CONFIGS["llama"](), settings).beyond(24)
    direct = Estimator(CONFIGS["llama"](), settings.model_copy(update={"ranks": (24,)})).estimate(24)
    assert above.training == direct.training
    assert above.inventory.stored == direct.inventory.stored
    assert above.flops == direct.flops


def test_components_add_up_to_the_peak() -> None:
    highest = Estimator(CONFIGS["llama"](), settings_of(loss="chunked")).estimate(12).training
    assert sum(highest.components.values()) == highest.peak_bytes
    assert min(highest.components.values()) >= 0
    assert highest.reserved_bytes >= highest.peak_bytes


def test_blocks_that_differ_are_traced_whole() -> None:
    """Adapters on some layers only: the blocks are not alike, and no reduction is made."""
    settings = settings_of(layers_to_transform=(1, 4), target_modules=("q_proj",))
    estimator = Estimator(CONFIGS["llama"](), settings)
    blocks = blocks_of(estimator.skeleton.base)
    assert blocks is not None
    assert find_reduction(blocks) is None
    assert estimator.estimate(12).source == "traced"


def test_a_step_that_cannot_be_traced_is_planned_by_formula_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    from rightrank.plugins.plan import estimate
    from rightrank.plugins.plan.planner import plan_config

    settings = settings_of(memory_bytes=2**40)
    traced = plan_config(CONFIGS["llama"](), "llama", settings, prices=False)

    def fail(*_: Any) -> None:
        raise NotImplementedError("aten::nonzero: attempted to run this operator with Meta tensors")

    monkeypatch.setattr(estimate, "trace_step", fail)
    plan = plan_config(CONFIGS["llama"](), "llama", settings, prices=True)
    assert plan.sources["peak_bytes"] == "formula"
    assert plan.sources["trainable_parameters"] == "exact"
    assert any("cannot be traced" in note for note in plan.notes)
    assert plan.ranks[0].trainable_parameters == traced.ranks[0].trainable_parameters
    share = plan.ranks[0].error_share
    assert share > traced.ranks[0].error_share
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
