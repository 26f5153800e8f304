"""Every kind of adapter passes the same checks, and a new kind takes one class and one entry in the list of kinds."""

from __future__ import annotations

import pytest

from rightrank.adapters.adapter_files import find_expert_parameter
from tests.adapters.kind_checks import CASES, CHECKS, Suite

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def suite(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return Suite.of(request.param, tmp_path_factory.mktemp("kind"))


@pytest.mark.parametrize(
    "check",
    CHECKS,
)
def test_a_kind_keeps(check: str, suite: Suite) -> None:
    getattr(suite, check)()


def test_factors_of_experts_are_told_from_those_of_a_linear_layer_by_the_configuration() -> None:
    config = {"target_parameters": ["mlp.experts.down_proj"]}
    assert find_expert_parameter("layers.0.mlp.experts", config) == "layers.0.mlp.experts.down_proj"
    assert find_expert_parameter("layers.0.mlp.down_proj", config) is None
