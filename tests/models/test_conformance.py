"""What holds for every kind of adapter."""

from __future__ import annotations

import pytest

from tests.models.kind_cases import Case, case_named
from tests.models.kind_checks import CHECKS, Suite

pytestmark = pytest.mark.trains
NAMES = ("embedding", "DoRA", "experts (Mixtral)", "unknown (lora_bias)")


@pytest.fixture(scope="module", params=NAMES)
def suite(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Suite:
    case: Case = case_named(request.param)
    return Suite.of(case, tmp_path_factory.mktemp("kind"))


@pytest.mark.parametrize(
    "check", [pytest.param(name, marks=pytest.mark.plug_in("plan")) if name == "planned" else name for name in CHECKS]
)
def test_a_kind_keeps(check: str, suite: Suite) -> None:
    assert CHECKS[check](suite)
