"""Compare the plan's bytes of quantised weights and 8-bit optimizer states with those of bitsandbytes, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rightrank.planning.estimate import Estimator
from rightrank.planning.peak import estimate_optimizer_memory
from rightrank.schema.plan_settings import PlanSettings
from tests.planning import CONFIGS

pytestmark = pytest.mark.trains

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra bnb")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("width", ["4bit", "8bit"])
def test_stored_bytes_of_a_quantised_model_are_its_own(name: str, width: str, tmp_path: Path) -> None:
    values = {"device": "cpu", "dtype": "float32", "ranks": (2,), f"load_in_{width}": True}
    settings = PlanSettings(**values | {"batch_size": 1, "seq_len": 16})
    planned = Estimator(CONFIGS[name](), settings).get_inventory(2).stored
    assert sum(tensor.nbytes for tensor in planned if not tensor.requires_grad) == _real_bytes(name, width, tmp_path)


def _real_bytes(name: str, width: str, folder: Path) -> int:
    """Return the bytes of every storage after transformers has loaded the model, including quantisation states."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).save_pretrained(folder)
    options: dict[str, Any] = {"load_in_8bit": True}
    if width == "4bit":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code]
        scales = getattr(getattr(module, "weight", None), "SCB", None)
        tensors += [] if scales is None else [scales]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.filterwarnings("ignore")
def test_states_of_the_eight_bit_optimizer_are_its_own() -> None:
    """Large, odd and small parameters: bytes of all states after a step."""
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((200, 1000), (63, 67), (50, 10))]
    optimizer = bitsandbytes.optim.AdamW8bit(parameters)
    torch.autograd.backward([parameter.sum() for parameter in parameters])
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    real = {state.untyped_storage().data_ptr(): state.untyped_storage().nbytes() for state in states}
    assert sum(estimate_optimizer_memory(parameters, "adamw_8bit", "cpu").states) == sum(real.values())
