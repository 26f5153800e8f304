"""Every kind of adapter passes the same checks, and a new kind takes one class and one entry in the list of kinds."""

from __future__ import annotations

import pytest

from rightrank.adapters import kinds
from rightrank.adapters.kinds.base import StoredPair
from rightrank.adapters.kinds.linear import Linear
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


def test_the_first_kind_that_claims_a_pair_describes_it() -> None:
    pair = StoredPair(
        "model.layers.0.mlp.experts", False, (8, 4), (6, 8), {"target_parameters": ["mlp.experts.down_proj"]}
    )
    kind = kinds.find_stored_kind(pair)
    assert kind.name == "expert"
    layout = kind.build_layout(pair, 2)
    assert layout.names == tuple(f"model.layers.0.mlp.experts.down_proj.{expert}" for expert in range(4))
    plain = kinds.find_stored_kind(StoredPair("model.layers.0.mlp.down_proj", False, (8, 4), (6, 8), {}))
    assert isinstance(plain, Linear)
