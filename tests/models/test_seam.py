"""A kind that the package does not have: one class, and one line in the list of kinds."""

from __future__ import annotations

from typing import Any

import pytest

from rightrank.models import kinds
from rightrank.models.kinds.base import AdapterKind, StoredPair
from rightrank.models.kinds.linear import Linear
from tests.models.kind_cases import Case
from tests.models.kind_checks import CHECKS, Suite

pytestmark = pytest.mark.trains


class Biased(AdapterKind):
    """PEFT's lora_bias: B has a bias, which the scale multiplies too."""

    name = "linear"
    label = "an adapter with a bias"
    why_alone = "only PEFT's own forward pass adds the bias"

    def adapts(self, module: Any) -> bool:
        return any(module.lora_bias.values())

    def stores(self, pair: StoredPair) -> bool:
        return bool(pair.config.get("lora_bias"))


@pytest.mark.parametrize(
    "check", ["equal to a PEFT loop", "loaded by PEFT", "parameters", "truncated in a run", "resumed"]
)
def test_a_new_kind_takes_one_class_and_one_line(check: str, suite: Suite) -> None:
    assert CHECKS[check](suite)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "KINDS", (Biased(), *kinds.KINDS))
        yield Suite.of(Case("biased", "gpt2", {"peft_options": {"lora_bias": True}}), tmp_path_factory.mktemp("seam"))


def test_the_first_kind_that_claims_a_pair_describes_it() -> None:
    pair = StoredPair(
        "model.layers.0.mlp.experts", False, (8, 4), (6, 8), {"target_parameters": ["mlp.experts.down_proj"]}
    )
    found = kinds.stored_kind(pair)
    assert found is not None
    assert found.name == "expert"
    layout = found.layout(pair, 2)
    assert layout is not None
    assert layout.names == tuple(f"model.layers.0.mlp.experts.down_proj.{expert}" for expert in range(4))
    plain = kinds.stored_kind(StoredPair("model.layers.0.mlp.down_proj", False, (8, 4), (6, 8), {}))
    assert isinstance(plain, Linear)
