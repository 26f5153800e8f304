"""Every kind of adapter passes the same checks, and a new kind takes one class and one entry in the list of kinds."""

from __future__ import annotations

from typing import Any

import pytest

from rightrank.adapters import kinds
from rightrank.adapters.kinds.base import AdapterKind, StoredPair
from rightrank.adapters.kinds.linear import Linear
from tests.adapters.kind_checks import CASES, CHECKS, Case, Suite

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


class Biased(AdapterKind):
    """PEFT's lora_bias: B has a bias, which the scale multiplies too."""

    name = "linear"
    label = "an adapter with a bias"
    unshared_reason = "only PEFT's own forward pass adds the bias"

    def can_adapt(self, module: Any) -> bool:
        return any(module.lora_bias.values())

    def can_store(self, pair: StoredPair) -> bool:
        return bool(pair.config.get("lora_bias"))


@pytest.mark.parametrize("check", ["equals_peft", "is_loaded", "is_counted", "is_truncated_in_a_run", "is_resumed"])
def test_a_new_kind_takes_one_class_and_one_line(check: str, biased_suite: Suite) -> None:
    getattr(biased_suite, check)()


@pytest.fixture(scope="module")
def biased_suite(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "KINDS", (Biased(), *kinds.KINDS))
        yield Suite.of(Case("biased", "gpt2", {"peft_options": {"lora_bias": True}}), tmp_path_factory.mktemp("seam"))


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
